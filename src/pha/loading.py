"""From a path to a model: a run folder, one of its checkpoints, or any saved PHA model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from pha.modeling import PHAForCausalLM
from pha.runs import RunFolder
from pha.utils.errors import PHAError, is_out_of_memory


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for evaluation, with the tokenizer that travels with it."""

    path: Path
    model: PHAForCausalLM
    tokenizer: PreTrainedTokenizerFast
    run: RunFolder | None


def model_folder(path: Path) -> tuple[Path, RunFolder | None]:
    """The folder with config.json and weights that `path` stands for, and the run it belongs to.

    A run stands for its chosen weights in `model/`, or its newest checkpoint before there are any.

    Raises:
        PHAError: nothing there, or nothing of a model in it.
    """
    if not path.is_dir():
        raise PHAError(f"{path} does not exist; give a run folder or a saved model")
    if (path / "config.json").is_file():
        # run/model and run/checkpoints/step-N still know their run, and so its protocol.
        above = [RunFolder(folder) for folder in path.resolve().parents[:2]]
        return path, next((run for run in above if run.config.is_file()), None)
    run = RunFolder(path)
    if run.config.is_file() or run.checkpoints.is_dir():
        if (run.model / "config.json").is_file():
            return run.model, run
        if steps := run.checkpoint_steps():
            return run.checkpoint(steps[-1]), run
        raise PHAError(f"{path} has no weights yet; train it first (`pha train`)")
    raise PHAError(f"{path} is neither a run folder nor a saved model (no config.json)")


def load_model(
    path: Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a run, checkpoint or model for evaluation. Weights come from safetensors only.

    Args:
        path: see `model_folder`.
        device: where the model goes; the CPU if absent.
        dtype: of the weights, whatever they are saved in; decays and mixing stay in fp32.

    Raises:
        PHAError: nothing there, damaged weights, or another kind of model.
    """
    folder, run = model_folder(path)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise PHAError(f"{folder}/config.json cannot be read ({error})") from error
    if kind != "pha":
        raise PHAError(f"{folder} holds a {kind!r} model; this command reads PHA models")
    if not (folder / "tokenizer.json").is_file():
        raise PHAError(f"{folder} has no tokenizer.json; models are saved with their tokenizer")
    logging.disable_progress_bar()
    try:
        model = PHAForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise PHAError(f"{folder} is damaged and cannot be loaded ({reason})") from error
    return LoadedModel(path, model.to(device or "cpu").eval(), tokenizer, run)
