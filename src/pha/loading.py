"""From a path to a model: a run folder, one of its checkpoints, or any saved model.

`hf:` before a path or a name of the Hub stands for a model of transformers that is not ours.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from pha.data.tokenizer import load_tokenizer, read_saved_tokenizer, vocabulary_size
from pha.foreign import ForeignModel, in_one_line, load_foreign, source_folder
from pha.model.parameters import count_parameters
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.peers import PREFIX
from pha.runs import RunFolder
from pha.utils.errors import PHAError
from pha.utils.formats import read_json
from pha.utils.records import record_from
from pha.utils.text import shorten

LanguageModel = PHAForCausalLM | ForeignModel
"""What is trained and evaluated: it has `states`, `token_statistics` and a loss in `forward`."""

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Index:
    """Which file holds which weight, where there are several."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for evaluation, with the tokenizer that travels with it."""

    path: Path
    model: LanguageModel
    tokenizer: PreTrainedTokenizerFast
    run: RunFolder | None

    @property
    def pha(self) -> PHAForCausalLM:
        """The model, for what only ours can do.

        Raises:
            PHAError: it is another one.
        """
        if not isinstance(self.model, PHAForCausalLM):
            kind = self.model.config.model_type
            raise PHAError(f"{self.path} holds a {kind!r} model; this command reads PHA models")
        return self.model


def model_folder(path: Path) -> tuple[Path, RunFolder | None]:
    """The folder with config.json and weights that `path` stands for, and the run it belongs to.

    A run stands for its chosen weights in `model/`, or its newest checkpoint before there are any.
    Behind `hf:` a name that is no folder is one of the Hub.

    Raises:
        PHAError: nothing there, or nothing of a model in it.
    """
    if str(path).startswith(PREFIX):
        path = source_folder(str(path).removeprefix(PREFIX))
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


def _check_files(folder: Path) -> dict[str, Any]:
    """Refuse what transformers would take from elsewhere; the configuration.

    Raises:
        PHAError: files outside the folder, or an adapter.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise PHAError(f"{folder}/config.json is damaged; get it again")
    names = [config.get("transformers_weights") or "model.safetensors"]
    if (folder / _INDEX).is_file():
        index = record_from(_Index, read_json(folder / _INDEX), str(folder / _INDEX))
        names += index.weight_map.values()
    if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise PHAError(f"{folder} names weights that are no file in it; get the model again")
    if (folder / "adapter_config.json").exists():
        raise PHAError(f"{folder} holds an adapter; merge it into its model with PEFT first")
    return config


def _check_ours(folder: Path, config: dict[str, Any]) -> PHAConfig:
    """Refuse a folder of which transformers would make room for more than it has weights for.

    Returns its configuration.

    Raises:
        PHAError: no tokenizer, or a configuration of more parameters than there are bytes of
            weights.
    """
    if not (folder / "tokenizer.json").is_file():
        raise PHAError(f"{folder} has no tokenizer.json; models are saved with their tokenizer")
    try:
        described = PHAConfig(**config)
        parameters = sum(count_parameters(described).values())
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
    return described


def attention_changes(config: PHAConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration has to have for attention with these options in every layer.

    No weight depends on them, so that a model can be loaded with others than it was trained with.

    Args:
        config: the model's.
        options: of the branch `attention`; its `window` goes to the model's, which bounds memory.

    Returns:
        Fields of a configuration with new values.

    Raises:
        PHAError: a window beyond what attention saw in training.
    """
    options, changes = dict(options), dict[str, Any]()
    length = config.longest_trained
    layers = config.attention_options()
    own = [layer.get("window") or length for layer in layers]
    if (window := options.pop("window", None)) is not None:
        widest = min(length, config.attention_window or length, max(own, default=length))
        if type(window) is int and window > widest:
            raise PHAError(
                f"a window of {window} keys is beyond the {widest} that attention saw in training; "
                "give at most that"
            )
        changes["attention_window"] = window
    # Where all layers share one base and nothing else reads it, it stays one: the decoder knows it.
    shared = all(layer.get("theta") is None for layer in layers)
    if shared and set(config.branch_names) <= {"attention", "gss", "aux_ffn"}:
        changes |= {"rope_theta": options.pop("theta")} if "theta" in options else {}
    if options:
        every = config.branch_options
        changes["branch_options"] = every | {"attention": every.get("attention", {}) | options}
        changes["layer_pattern"] = [
            [
                {"attention": entry["attention"] | options}
                if isinstance(entry, dict) and "attention" in entry
                else entry
                for entry in layer
            ]
            for layer in config.layer_pattern
        ]
    return changes


def load_model(
    path: Path,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] = MappingProxyType({}),
    attention: Mapping[str, Any] = MappingProxyType({}),
) -> LoadedModel:
    """Load a run, checkpoint or model for evaluation. Weights come from safetensors only.

    Args:
        path: see `model_folder`.
        device: where the model goes; the CPU if absent.
        dtype: of the weights, whatever they are saved in; decays and mixing stay in fp32.
        changes: fields of the configuration to change, of a model that is not ours.
        attention: options of attention to change, of a model of ours; see `attention_changes`.

    Raises:
        PHAError: nothing there, damaged weights, or another kind of model.
    """
    folder, run = model_folder(path)
    config = _check_files(folder)
    kind = config.get("model_type")
    modules = {} if run is None else run.read_config().get("run", {})
    for name in modules.get("imports", []):
        if name not in sys.modules:  # a run may be from anybody: only who says so runs its code
            raise PHAError(f"{path} was trained with module {name}: `pha --import {name} ...`")
    if kind != "pha" and attention:
        raise PHAError(
            f"{path} holds a {kind!r} model; with options of attention this reads PHA models"
        )
    if kind == "pha" and changes:
        raise PHAError(f"{path} holds a model of PHA, which transformers.set does not change")
    if kind == "pha":
        changes = attention_changes(_check_ours(folder, config), attention)
        tokenizer = read_saved_tokenizer(folder)
        model: LanguageModel = _load_ours(folder, dtype, changes)
    elif run is not None or str(path).startswith(PREFIX):
        model = load_foreign(folder, dtype, changes)
        is_saved = (folder / "tokenizer.json").is_file()
        tokenizer = read_saved_tokenizer(folder) if is_saved else load_tokenizer(str(folder))
        if vocabulary_size(tokenizer) > model.config.vocab_size:
            raise PHAError(f"{folder} has a tokenizer of another model; get both from one place")
    else:
        raise PHAError(f"{folder} holds a {kind!r} model; write {PREFIX}{path}, or give one of PHA")
    model = model.to(device or "cpu").eval()
    if isinstance(model, ForeignModel):
        model.look()
    return LoadedModel(path, model, tokenizer, run)


def _load_ours(folder: Path, dtype: torch.dtype, changes: Mapping[str, Any]) -> PHAForCausalLM:
    with in_one_line(f"{folder} is damaged and cannot be loaded"):
        model: PHAForCausalLM = PHAForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=dtype,
            **changes,
        )
    return model
