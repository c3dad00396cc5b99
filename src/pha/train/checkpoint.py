"""Checkpoints: written whole or not at all, verified when read, never unpickled."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from pha.modeling import PHAForCausalLM
from pha.runs import RunFolder
from pha.utils.errors import PHAError
from pha.utils.files import atomic_folder, sha256_file, write_json
from pha.utils.formats import read_json

FORMAT = 3


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


def save_model(folder: Path, model: PHAForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write weights, configuration and tokenizer as `from_pretrained` reads them, atomically."""
    with atomic_folder(folder) as temporary:
        _write_model(temporary, model, tokenizer)


def _write_model(folder: Path, model: PHAForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    # A bar for each of many small files would tear the progress line of the run apart.
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_checkpoint(
    run: RunFolder,
    model: PHAForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int,
) -> None:
    """Write `checkpoints/step-N` and delete all but the newest `keep`."""
    with atomic_folder(run.checkpoint(progress.step)) as folder:
        _write_model(folder, model, tokenizer)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        files = {f.name: sha256_file(f) for f in sorted(folder.iterdir()) if f.is_file()}
        content = {"format": FORMAT, "progress": asdict(progress), "sha256": files}
        write_json(folder / "trainer.json", content)
    for step in run.checkpoint_steps()[:-keep]:
        shutil.rmtree(run.checkpoint(step))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Verify a checkpoint and load it into a model and its optimiser.

    Raises:
        PHAError: a file is missing, truncated or altered, or belongs to another model.
    """
    content = read_json(folder / "trainer.json")
    remedy = f"delete {folder} to resume from the checkpoint before it"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PHAError(f"{folder} was written by another version of pha; {remedy}")
    for name, expected in content["sha256"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != expected:
            raise PHAError(f"checkpoint {folder} is damaged: {name} is lost or altered; {remedy}")
    weights = load_file(folder / "model.safetensors")
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        # The head is tied with the embedding and stored once.
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise PHAError(f"checkpoint {folder} belongs to another model; choose another --out")
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
    except RuntimeError as error:
        raise PHAError(
            f"checkpoint {folder} belongs to another model ({str(error).splitlines()[0]})"
        ) from error
    progress = Progress(**content["progress"])
    # JSON has no infinity: what is none is no better than any number.
    best = [(math.inf if value is None else value, step) for value, step in progress.best]
    progress.best = best
    return progress
