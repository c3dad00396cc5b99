"""From a name to a model of transformers: random weights in its shape, or those of a folder.

Reading runs no code but that of transformers: weights are safetensors, and a configuration that
brings code of its own is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from pha.foreign.model import ForeignModel
from pha.peers import PEERS, PREFIX, peer_config, peer_names
from pha.utils.errors import PHAError, is_out_of_memory
from pha.utils.files import user_path
from pha.utils.formats import read_json
from pha.utils.text import did_you_mean, shorten

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.bpe"]
_TIMEOUT = 10  # seconds for the Hub's first answer
# Constants that earlier versions of transformers wrote beside the weights.
_CONSTANTS = (".attn.masked_bias", ".rotary_emb.inv_freq")
# In what a shape is changed by, these are settled elsewhere.
_SETTLED = ("vocab_size", "dtype", "architectures", "transformers_version")


def source_folder(name: str) -> Path:
    """The folder that a name without `hf:` stands for: a folder here, or a model of the Hub.

    Of a model of the Hub, configuration, tokenizer and safetensors are fetched into its cache.

    Raises:
        PHAError: neither, or the Hub does not answer.
    """
    folder = user_path(name)
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(name):
        raise PHAError(f"no folder {name}, and no name of the Hub's form OWNER/NAME")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, etag_timeout=_TIMEOUT))
    except RepositoryNotFoundError as error:
        raise PHAError(
            f"the Hugging Face Hub has no public model {name!r}: check the name, or log in with "
            "`hf auth login` if it is private or gated"
        ) from error
    except Exception as error:  # network errors have no common class
        raise PHAError(
            f"no folder {name}, and the Hugging Face Hub does not answer for a model of that name: "
            "check the network, or download it elsewhere and give its folder"
        ) from error


def check_config(folder: Path) -> dict[str, Any]:
    """The configuration in a folder, of a class that transformers itself has.

    Raises:
        PHAError: no such file, an unknown kind of model, code of its own, or quantised weights.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if "auto_map" in (config if kind is not None else ()):
        raise PHAError(
            f"{folder} brings code of its own (auto_map in config.json), which is never run; use a "
            "model whose class is part of transformers"
        )
    try:
        known = bool(kind) and AutoConfig.for_model(kind)
    except Exception:  # whatever transformers makes of such a name
        known = False
    if not known:
        raise PHAError(f"{folder} holds a {kind!r} model, which this version of transformers lacks")
    if config.get("quantization_config") is not None:
        raise PHAError(f"{folder} holds quantised weights; use the model's own, in full precision")
    return dict(config)


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Say in a line what transformers makes of bad files or fields."""
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except PHAError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise PHAError(f"{what} ({shorten(str(error), 200)})") from error
    finally:
        logging.set_verbosity(verbosity)


def shape_config(
    name: str, vocab_size: int, positions: int, changes: Mapping[str, Any]
) -> PreTrainedConfig:
    """The configuration of a model to be trained from random weights.

    Args:
        name: a peer, a folder or a model of the Hub.
        vocab_size: V.
        positions: the sequence length of its training.
        changes: fields to change.

    Raises:
        PHAError: no such model, a field that its class does not have, or an impossible value.
    """
    if name in PEERS:
        kind, shape = PEERS[name].model_type, PEERS[name].shape
    else:
        if not (user_path(name).is_dir() or "/" in name):
            close = difflib.get_close_matches(name, PEERS, n=2, cutoff=0.4) or peer_names()
            raise PHAError(
                f"there is no {PREFIX}{name}; did you mean {' or '.join(PREFIX + c for c in close)}"
                "? A folder or OWNER/NAME of the Hub works too"
            )
        shape = check_config(source_folder(name))
        kind = shape.pop("model_type")
        special = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
        alias = getattr(AutoConfig.for_model(kind), "attribute_map", {})
        left_out = {*_SETTLED, *special, *(alias.get(key, key) for key in special)}
        shape = {key: value for key, value in shape.items() if key not in left_out}
    with in_one_line(f"transformers refuses the shape of {PREFIX}{name}"):
        known = peer_config(kind, shape, vocab_size, positions)
        _require_fields(known, changes)
        return peer_config(kind, {**shape, **changes}, vocab_size, positions)


def _require_fields(config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
    """Refuse fields that a class of transformers does not have, which it would take in silence."""
    for key in changes:
        if key.startswith("_") or key in _SETTLED or not hasattr(config, key):
            hint = did_you_mean(key, vars(config))
            raise PHAError(f"transformers.set: {config.model_type} has no field {key} to set{hint}")


def read_shape(folder: Path, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a saved model, with fields changed.

    Raises:
        PHAError: see `check_config`; or a field that its class does not have.
    """
    check_config(folder)
    with in_one_line(f"{folder}/config.json is damaged"):
        shape: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **changes
        )
        _require_fields(shape, changes)
    return shape


def make_foreign(config: PreTrainedConfig) -> ForeignModel:
    """A model with random weights in float32.

    Raises:
        PHAError: an impossible shape.
    """
    with in_one_line(f"transformers cannot make this {config.model_type}"):
        return ForeignModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def _tensors(path: Path) -> int:
    """How many a file of safetensors holds."""
    with safe_open(path, "pt") as file:
        return len(file.keys())


def load_foreign(
    folder: Path, dtype: torch.dtype, changes: Mapping[str, Any] = MappingProxyType({})
) -> ForeignModel:
    """Load the model in a folder, from safetensors only.

    Args:
        folder: with config.json and weights, whose names `pha.loading` has checked.
        dtype: of the weights.
        changes: fields of its configuration to change, such as dropout.

    Raises:
        PHAError: see `check_config`; weights that are no safetensors, damaged, or of another model.
    """
    config = check_config(folder)
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    if not files:
        raise PHAError(
            f"{folder} has no safetensors; other weights are pickled programs and are not read: "
            "convert them elsewhere"
        )
    with in_one_line(f"{folder} is damaged and cannot be loaded"):
        tensors = sum(map(_tensors, files))
        layers = max(int(config.get(k) or 0) for k in ("num_hidden_layers", "n_layer", "n_layers"))
        settings = read_shape(folder, changes)
        parameters = 0
        if layers <= tensors:
            with torch.device("meta"):
                blank = AutoModelForCausalLM.from_config(settings)
            parameters = sum(p.numel() for p in blank.parameters())
        size = sum(path.stat().st_size for path in files)
        if layers > tensors or parameters > size:
            raise PHAError(
                f"{folder}/config.json describes another model than its weights of {size:,} bytes; "
                "get both from one place"
            )
        inner, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=settings,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    wrong = [name for name in found["unexpected_keys"] if not name.endswith(_CONSTANTS)]
    wrong += found["missing_keys"]
    wrong += [name for name, *_ in found["mismatched_keys"]]
    if wrong:
        raise PHAError(
            f"{folder}: config.json and the weights are of two models, as they differ in "
            f"{min(wrong)}; get both from one place"
        )
    # What a file beside the weights says of sampling is not what was asked for.
    inner.generation_config = GenerationConfig()
    return ForeignModel(inner)
