"""Checkpoints: written whole or not at all, verified when read, never unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from pha.loading import LanguageModel
from pha.runs import RunFolder
from pha.utils.errors import PHAError, is_out_of_memory
from pha.utils.files import atomic_folder, remove_folder, sha256_file, write_json
from pha.utils.formats import read_json
from pha.utils.records import record_from
from pha.utils.text import shorten
from pha.utils.versions import check_format

FORMAT = 4  # 3 had no state of the numerics watch

CARRIED = "carried.safetensors"


class DamagedError(PHAError):
    """A checkpoint is not as it was written."""


@dataclass
class Progress:
    """Where a run stands. Data order and dropout are pure functions of seed and step, so with the
    weights and the optimiser's moments this is all that an exact continuation needs.
    """

    step: int = 0  # optimiser steps taken
    tokens: int = 0  # tokens seen
    seconds: float = 0.0  # time spent training, evaluations apart
    data_seconds: float = 0.0  # of these, what the main process waited for data
    peak_memory: int = 0  # most bytes held, over all parts of an interrupted run
    schedule: dict[str, Any] = field(default_factory=dict)  # state of the learning rate's schedule
    # (validation perplexity, step) of the best evaluations, best first; `model/` holds the weights
    # of the first, `best/` those of all where several are kept
    best: list[tuple[float, int]] = field(default_factory=list)
    watch: dict[str, Any] = field(default_factory=dict)  # state of the numerics watch
    metrics_bytes: int = 0  # length of metrics.jsonl, to which it is cut on resuming
    data_sha256: str = ""  # of the token store, which must not change under a run

    def rank(self, perplexity: float, keep: int) -> int | None:
        """Enter the evaluation at the present step into `best`.

        Its place there, 0 for the best; None if it is not among the best `keep`. Of equal
        perplexities the earlier is better.
        """
        entry = (perplexity, self.step)
        self.best = sorted([*self.best, entry])[:keep]
        return self.best.index(entry) if entry in self.best else None


def save_model(folder: Path, model: LanguageModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write weights, configuration and tokenizer as `from_pretrained` reads them, atomically."""
    with atomic_folder(folder) as temporary:
        _write_model(temporary, model, tokenizer)


def _write_model(folder: Path, model: LanguageModel, tokenizer: PreTrainedTokenizerFast) -> None:
    # A bar for each of many small files would tear the progress line of the run apart.
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(
    run: RunFolder,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int,
    carried: dict[str, Tensor] | None = None,
) -> None:
    """Write `checkpoints/step-N` and delete all but the newest `keep`.

    `carried` is what the rows of this step leave to the next ones, by name, if they do.
    """
    with atomic_folder(run.checkpoint(progress.step)) as folder:
        _write_model(folder, model, tokenizer)
        with (folder / "optimizer.pt").open("wb") as file:  # by name, no error would say its reason
            torch.save(optimizer.state_dict(), file)
        if carried is not None:
            save_file(carried, folder / CARRIED)
        files = {f.name: sha256_file(f) for f in sorted(folder.iterdir()) if f.is_file()}
        content = {"format": FORMAT, "progress": asdict(progress), "sha256": files}
        write_json(folder / "trainer.json", content | {"digest": _digest(content)})
    for step in run.checkpoint_steps()[:-keep]:
        remove_folder(run.checkpoint(step))


def steps_needed(run: RunFolder) -> set[int]:
    """Steps whose best weights a run that goes on from any of its checkpoints may ask for."""
    found: set[int] = set()
    for step in run.checkpoint_steps():
        # One that is damaged asks for nothing.
        with contextlib.suppress(DamagedError):
            found |= {step for _, step in _read(run.checkpoint(step))["progress"]["best"]}
    return found


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it is not counted among those to go on from."""
    aside = folder.with_name(f"{folder.name}.damaged")
    if aside.exists():
        remove_folder(aside)
    folder.rename(aside)


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of a record, the same before it is written and after, where infinities are null."""
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint; those of earlier versions have no digest.

    Raises:
        DamagedError: it is lost or altered.
    """
    try:
        content = read_json(folder / "trainer.json")
    except PHAError as error:
        raise DamagedError(f"checkpoint {folder} is damaged: {error}") from error
    digest = content.pop("digest", None) if isinstance(content, dict) else ""
    if digest is not None and digest != _digest(content):
        raise DamagedError(f"checkpoint {folder} is damaged: trainer.json is altered")
    return dict(content)


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint, all of whose files are as they were written.

    Raises:
        DamagedError: a file is missing, truncated or altered.
        PHAError: it was written by another version of the package.
    """
    content = _read(folder)
    check_format(folder, content.get("format"), FORMAT, oldest=3)
    hashes = content.get("sha256")
    for name, expected in hashes.items() if isinstance(hashes, dict) else [("trainer.json", "")]:
        if not (folder / name).is_file() or sha256_file(folder / name) != expected:
            raise DamagedError(f"checkpoint {folder} is damaged: {name} is lost or altered")
    return content


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Verify a checkpoint and load it into a model and its optimiser.

    Raises:
        DamagedError: a file is missing, truncated or altered; nothing was loaded.
        PHAError: it belongs to another model, or to another version of the package.
    """
    content = verify_checkpoint(folder)
    try:
        weights = load_file(folder / "model.safetensors")
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        progress = record_from(Progress, content["progress"], str(folder / "trainer.json"))
    except Exception as error:  # whatever safetensors and torch make of such files
        if is_out_of_memory(error):
            raise
        raise DamagedError(f"checkpoint {folder} is damaged: {shorten(str(error), 200)}") from error
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        # Weights that are tied, such as head and embedding, are stored once.
        own = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        stored = {own[name] for name in weights.keys() & own.keys()}
        if unexpected or any(own[name] not in stored for name in missing):
            raise PHAError(f"checkpoint {folder} belongs to another model; choose another --out")
        optimizer.load_state_dict(state)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise PHAError(
            f"checkpoint {folder} belongs to another model ({shorten(str(error), 200)})"
        ) from error
    # JSON has no infinity, and what is none is no better than any number.
    progress.best = [(math.inf if math.isnan(p) else p, step) for p, step in progress.best]
    return progress
