"""What a model remembers of a text, in a file: read once, gone on from any number of times.

The file is safetensors, so reading it runs no code: keys and values, recurrent states, and in its
metadata the model, tokenizer, type and text that they belong to. Loaded again, they are the same
bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from pha.caching import CacheAdapter, PHACache
from pha.data.encoding import TextEncoder
from pha.data.tokenizer import tokenizer_sha256
from pha.inputs import check_rows
from pha.loading import LoadedModel
from pha.model.config import vars_of
from pha.modeling import PHAForCausalLM
from pha.utils.errors import PHAError
from pha.utils.files import atomic_file
from pha.utils.formats import parse_json
from pha.utils.outputs import require_file, writing
from pha.utils.records import record_from
from pha.utils.versions import __version__, check_format, version_of

FORMAT = 1
_RECORD = "pha_state"  # its name in the metadata


@dataclass(frozen=True)
class Text:
    """A text that was read.

    Attributes:
        sha256: of its UTF-8.
        tokens: how many it was read as.
    """

    sha256: str
    tokens: int


@dataclass(frozen=True)
class State:
    """What a model remembers.

    Attributes:
        cache: keys and recurrent states.
        texts: what was read, in order, as far as whoever saved it said.
        attention_mask: (B, S) over the tokens read, false at padding; None where there is none.
    """

    cache: PHACache
    texts: list[Text] = field(default_factory=list)
    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class _Record:
    """What a file says of itself; hashes are SHA-256."""

    format: int
    tokens: int
    texts: list[Text]
    dtype: str
    config: str
    weights: str
    tokenizer: str | None
    versions: dict[str, str]
    digest: str = ""  # of all other fields and the tensors


@torch.no_grad()
def read_text(
    loaded: LoadedModel,
    parts: Iterable[str],
    state: State | None = None,
    piece: int = 2048,
    each: Callable[[int], object] = lambda tokens: None,
) -> State:
    """The state after a text, read in pieces; memory is that of a piece and the state.

    Args:
        loaded: a PHA model, and the tokenizer.
        parts: the text, in any division.
        state: what to go on from, which is used up; None for the beginning.
        piece: tokens per forward pass.
        each: called with the number of tokens of each piece.

    Raises:
        PHAError: another kind of model, a text without tokens, a piece below 1.
    """
    model = loaded.pha
    state = State(PHACache(config=model.config)) if state is None else state
    digest, tokens = hashlib.sha256(), 0

    def hashed() -> Iterator[str]:
        for part in parts:
            digest.update(part.encode())
            yield part

    for ids in TextEncoder(loaded.tokenizer).in_pieces(hashed(), piece):
        model.states(torch.from_numpy(ids).to(model.device)[None], cache=state.cache)
        tokens += len(ids)
        each(len(ids))
    if not tokens:
        raise PHAError("the text to read has no tokens; give one that has some")
    texts = [*state.texts, Text(digest.hexdigest(), tokens)]
    return dataclasses.replace(state, texts=texts)


def save_state(
    path: Path,
    state: State,
    model: PHAForCausalLM,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> None:
    """Write a state to a file, atomically.

    Args:
        path: the file; a state that is there is replaced.
        state: of a cache that has read something.
        model: whose state it is, as it was when it read.
        tokenizer: its tokenizer; only then is it checked when the state is loaded.

    Raises:
        PHAError: an empty cache, padding without a mask, or `path` cannot be written or holds
            something else.
    """
    require_state_file(path)
    adapter = CacheAdapter(state.cache, model.config)
    tokens = int(adapter.length())
    if not tokens:
        raise PHAError("the cache has read nothing; read a text before its state is saved")
    tensors = {name: x.detach().cpu().contiguous() for name, x in _tensors(state.cache).items()}
    mask, batch = state.attention_mask, len(next(iter(tensors.values())))
    check_rows("attention_mask", mask, batch, tokens)
    adapter.enter(batch, mask)
    adapter.leave(padded=mask is not None)
    if mask is not None:
        tensors["attention_mask"] = mask.bool().cpu().contiguous()
    versions = {name: version_of(name) or "" for name in ("torch", "transformers", "safetensors")}
    record = _Record(
        format=FORMAT,
        tokens=tokens,
        texts=state.texts,
        tokenizer=None if tokenizer is None else tokenizer_sha256(tokenizer),
        versions={"pha": __version__} | versions,
        **_identity(model),
    )
    record = dataclasses.replace(record, digest=_digest(record, tensors))
    with writing(path), atomic_file(path) as temporary:
        # Not by `save_file`, which gives a mode of its own and hides why a disk refuses.
        temporary.write_bytes(save(tensors, {_RECORD: json.dumps(asdict(record))}))


def load_state(
    path: Path, model: PHAForCausalLM, tokenizer: PreTrainedTokenizerFast | None = None
) -> State:
    """The state in a file of `save_state`, bit for bit, where the model is.

    Raises:
        PHAError: no such file, a damaged one, or one of another format, type, model or tokenizer.
    """
    record, own = _read(path), _identity(model)
    again = "or read the text again (--prefix)"
    if record.dtype != own["dtype"]:
        raise PHAError(
            f"{path} is a state in {record.dtype}, and the model's weights are {own['dtype']}: "
            f"load them in that type (--dtype), {again}"
        )
    if record.weights != own["weights"]:
        raise PHAError(f"{path} is the state of another model: give the one that made it, {again}")
    if record.config != own["config"]:
        raise PHAError(
            f"{path} is the state of the model in another configuration, such as another attention "
            f"window, or of another version of pha: set it as it was, {again}"
        )
    if tokenizer is not None and record.tokenizer not in (None, tokenizer_sha256(tokenizer)):
        raise PHAError(f"{path} was read with another tokenizer: give the one it had, {again}")
    tensors = load_file(path)
    if record.digest != _digest(dataclasses.replace(record, digest=""), tensors):
        raise _damaged(path)
    mask = tensors.pop("attention_mask", None)
    cache = _filled(path, model, tensors, record.tokens)
    if mask is not None:
        mask = mask.to(model.device)
    CacheAdapter(cache, model.config).leave(padded=mask is not None)
    return State(cache, record.texts, mask)


def require_state_file(path: Path) -> None:
    """Refuse a path that cannot be written, or where something lies that is no state.

    Raises:
        PHAError: it is so.
    """
    require_file(path)
    if path.exists():
        try:
            _read(path)
        except PHAError as error:
            raise PHAError(f"{path} is no state and would be lost: choose another name") from error


def _tensors(cache: PHACache) -> dict[str, Tensor]:
    """Keys, values and states of every layer that has some, by layer and name."""
    found: dict[str, Tensor | None] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CacheLayerMixin):
            found |= {f"{index}.keys": layer.keys, f"{index}.values": layer.values}
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            states = layer.recurrent_states.items()
            found |= {f"{index}.state.{place}": state for place, state in states}
    return {name: x for name, x in found.items() if x is not None}


@torch.no_grad()
def _filled(path: Path, model: PHAForCausalLM, tensors: Mapping[str, Tensor], S: int) -> PHACache:
    """A cache of S tokens with these tensors, of the shapes that the model itself leaves behind."""
    cache = PHACache(config=model.config)
    model.states(torch.zeros(1, 1, dtype=torch.long, device=model.device), cache=cache)
    expected = _tensors(cache)
    if tensors.keys() != expected.keys() or len({x.shape[:1] for x in tensors.values()}) != 1:
        raise _damaged(path)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CacheLayerMixin) and layer.keys is not None:
            window = getattr(layer, "sliding_window", S + 1)
            kept = min(S, window - 1)
            for name in ("keys", "values"):
                x, like = tensors[f"{index}.{name}"], expected[f"{index}.{name}"]
                _require_like(path, x, like.expand(*like.shape[:2], kept, -1))
                setattr(layer, name, x.to(like.device))
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = S
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for place in layer.recurrent_states:
                if (name := f"{index}.state.{place}") in tensors:
                    x, like = tensors[name], expected[name]
                    _require_like(path, x, like)
                    layer.recurrent_states[place] = x.to(like.device)
    return cache


def _require_like(path: Path, x: Tensor, like: Tensor) -> None:
    """Refuse a tensor that differs from `like` in its type or in more than its first size."""
    if x.dtype != like.dtype or x.shape[1:] != like.shape[1:]:
        raise _damaged(path)


def _read(path: Path) -> _Record:
    """What a file says of itself.

    Raises:
        PHAError: there is none, or it is damaged or of a format that is not read.
    """
    if not path.is_file():
        raise PHAError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:  # which looks whether the file is as long as it says
            said = parse_json((file.metadata() or {})[_RECORD])
        number = said["format"]
    except Exception as error:  # whatever safetensors makes of such files
        raise _damaged(path) from error
    check_format(path, number, FORMAT, 1)
    return record_from(_Record, said, str(path))


def _damaged(path: Path) -> PHAError:
    return PHAError(f"{path} is damaged or no state: read the text again (--prefix)")


def _identity(model: PHAForCausalLM) -> dict[str, Any]:
    """What a state depends on besides the text, as `_Record` has it."""
    config = json.dumps(vars_of(model.config), sort_keys=True)
    weights = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        _feed(weights, name, parameter)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }


def _digest(record: _Record, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(asdict(record), sort_keys=True).encode())
    for name in sorted(tensors):
        _feed(digest, name, tensors[name])
    return digest.hexdigest()


def _feed(digest: Any, name: str, x: Tensor) -> None:
    """Add a tensor, its name, type and shape to a digest."""
    digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
    digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
