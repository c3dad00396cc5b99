"""From a path to a model: a run folder, one of its checkpoints, or any saved PHA model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from pha.data.tokenizer import read_saved_tokenizer
from pha.model.parameters import count_parameters
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.runs import RunFolder
from pha.utils.errors import PHAError, is_out_of_memory
from pha.utils.formats import read_json
from pha.utils.records import record_from
from pha.utils.text import shorten

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Index:
    """Which file holds which weight, where there are several."""

    weight_map: dict[str, str]


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


def _check_files(folder: Path) -> None:
    """Refuse what transformers would take from elsewhere, or make room for without having weights.

    Raises:
        PHAError: another kind of model, no tokenizer, files outside the folder, or a configuration
            of more parameters than there are bytes of weights.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "pha":
        raise PHAError(f"{folder} holds a {kind!r} model; this command reads PHA models")
    if not (folder / "tokenizer.json").is_file():
        raise PHAError(f"{folder} has no tokenizer.json; models are saved with their tokenizer")
    names = [config.get("transformers_weights") or "model.safetensors"]
    if (folder / _INDEX).is_file():
        index = record_from(_Index, read_json(folder / _INDEX), str(folder / _INDEX))
        names += index.weight_map.values()
    if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise PHAError(f"{folder} names weights that are no file in it; get the model again")
    if (folder / "adapter_config.json").exists():
        raise PHAError(f"{folder} holds an adapter; merge it into its model with PEFT first")
    try:
        parameters = sum(count_parameters(PHAConfig(**config)).values())
    except PHAError:
        raise
    except Exception as error:  # what transformers makes of names and values it does not know
        raise PHAError(f"{folder}/config.json is damaged ({shorten(str(error), 200)})") from error
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    if parameters > size > 0:
        raise PHAError(
            f"{folder}/config.json describes {parameters:,} parameters, which its weights of "
            f"{size:,} bytes are not; get both from one place"
        )


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
    _check_files(folder)
    tokenizer = read_saved_tokenizer(folder)
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is wrong with weights is told in one line
    try:
        model = PHAForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=dtype,
        )
    except PHAError:
        raise
    except Exception as error:  # whatever transformers and safetensors make of damaged files
        if is_out_of_memory(error):
            raise
        reason = shorten(str(error), 200)
        raise PHAError(f"{folder} is damaged and cannot be loaded ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
    return LoadedModel(path, model.to(device or "cpu").eval(), tokenizer, run)
