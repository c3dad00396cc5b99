"""Checkpoint averaging: one model out of the best few of a run, the paper's weight averaging."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pha.train.checkpoint import TRAINING_FILES
from pha.utils.errors import PHAError
from pha.utils.files import atomic_folder, write_json
from pha.utils.formats import read_json

WEIGHTS = "model.safetensors"


def average_weights(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of every tensor over saved models, in float32.

    Sums are formed in float64, so the order of the models does not matter. One tensor of each
    model is in memory at a time.

    Raises:
        PHAError: weights that are missing, damaged or of different shapes.
    """
    mean: dict[str, Tensor] = {}
    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(safe_open(folder / WEIGHTS, framework="pt"))
                for folder in folders
            ]
            names = [sorted(file.keys()) for file in files]
            for folder, other in zip(folders, names, strict=True):
                if other != names[0]:
                    raise PHAError(f"{folder} holds another kind of model than {folders[0]}")
            for name in names[0]:
                tensors = [file.get_tensor(name) for file in files]
                if len({tensor.shape for tensor in tensors}) > 1:
                    raise PHAError(f"the models to average differ in the shape of {name}")
                total = torch.stack([tensor.double() for tensor in tensors]).sum(0)
                mean[name] = (total / len(tensors)).float()
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PHAError(f"a model to average cannot be read ({reason})") from error
    return mean


def average_models(folders: Sequence[Path], out: Path) -> None:
    """Write the average of saved models as a model, with the first one's files, atomically.

    Raises:
        PHAError: see `average_weights`; or a configuration that is damaged, or another one.
    """
    first = folders[0]
    shape = _shape(first)
    for folder in folders[1:]:
        if _shape(folder) != shape:
            raise PHAError(f"{folder} and {first} differ in config.json; only equals are averaged")
    mean = average_weights(folders)
    with atomic_folder(out) as temporary:
        for file in first.iterdir():
            # Of a checkpoint only the model: not its optimiser, nor where it stood.
            if file.is_file() and file.name not in (WEIGHTS, *TRAINING_FILES):
                shutil.copy2(file, temporary / file.name)
        write_json(temporary / "config.json", shape | {"dtype": "float32"})
        save_file(mean, temporary / WEIGHTS, metadata={"format": "pt"})


def _shape(folder: Path) -> dict[str, object]:
    """The configuration of a saved model, but for how and by which version it was saved."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise PHAError(f"{folder}/config.json is damaged; get it again")
    return {k: v for k, v in config.items() if k not in ("dtype", "transformers_version")}
