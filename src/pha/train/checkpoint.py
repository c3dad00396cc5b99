"""Checkpoints: written whole or not at all, verified when read, never unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pha.loading import LanguageModel
from pha.runs import RunFolder
from pha.train.sharding import part
from pha.utils.errors import PHAError, is_out_of_memory
from pha.utils.files import remove_folder, sha256_file
from pha.utils.formats import read_json
from pha.utils.records import record_from
from pha.utils.text import shorten
from pha.utils.versions import check_format

FORMAT = 5  # up to 4 the optimiser's state was in `optimizer.pt`; 3 had none of the numerics watch

MOMENTS, CARRIED = "optimizer.safetensors", "carried.safetensors"
OLD_MOMENTS = "optimizer.pt"
TRAINING_FILES = {MOMENTS, CARRIED, OLD_MOMENTS, "trainer.json"}
"""Of a checkpoint, beside the model."""


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
    losses: list[float] = field(default_factory=list)  # of the steps since the last record
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


def digest(content: dict[str, Any]) -> str:
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
    kept = content.pop("digest", None) if isinstance(content, dict) else ""
    if kept is not None and kept != digest(content):
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


def load_checkpoint(
    folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer
) -> Progress:
    """Verify a checkpoint and load it into a model, sharded or not, and its optimiser.

    Raises:
        DamagedError: a file is missing, truncated or altered; nothing was loaded.
        PHAError: it belongs to another model, or to another version of the package.
    """
    content = verify_checkpoint(folder)
    try:
        weights = load_file(folder / "model.safetensors")
        if (folder / MOMENTS).is_file():
            moments = load_file(folder / MOMENTS)
        else:
            state = torch.load(folder / OLD_MOMENTS, map_location="cpu", weights_only=True)["state"]
            moments = None
        progress = record_from(Progress, content["progress"], str(folder / "trainer.json"))
    except Exception as error:  # whatever safetensors and torch make of such files
        if is_out_of_memory(error):
            raise
        raise DamagedError(f"checkpoint {folder} is damaged: {shorten(str(error), 200)}") from error
    try:
        own = model.state_dict(keep_vars=True)
        missing, unexpected = model.load_state_dict(
            {name: part(x, own[name]) if name in own else x for name, x in weights.items()},
            strict=False,
        )
        # Weights that are tied, such as head and embedding, are stored once.
        stored = {id(own[name]) for name in weights.keys() & own.keys()}
        if unexpected or any(id(own[name]) not in stored for name in missing):
            raise PHAError(f"checkpoint {folder} belongs to another model; choose another --out")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if moments is not None:
            state = defaultdict(dict)  # none of a parameter that has had no gradient yet
            names = {id(p): name for name, p in model.named_parameters()}
            numbers = {names[id(p)]: number for number, p in enumerate(parameters)}
            for place, x in moments.items():
                name, _, key = place.rpartition(".")
                state[numbers[name]][key] = x
        state = {
            number: {key: part(x, parameters[number]) for key, x in kept.items()}
            for number, kept in state.items()
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise PHAError(
            f"checkpoint {folder} belongs to another model ({shorten(str(error), 200)})"
        ) from error
    # JSON has no infinity, and what is none is no better than any number.
    progress.best = [(math.inf if math.isnan(p) else p, step) for p, step in progress.best]
    return progress
