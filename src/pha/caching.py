"""`pha.nn.StateCache` on top of transformers' caches, which stay the only store."""

from __future__ import annotations

import math
import weakref
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    StaticLayer,
)

from pha.nn import Backbone
from pha.nn.attention import rotary_angles
from pha.nn.decoding import Decoder, Past, make_decoder
from pha.utils.errors import PHAError


class CacheAdapter:
    """What the layers need of a transformers cache."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.keyed = next(i for i, x in enumerate(cache.layers) if isinstance(x, CacheLayerMixin))
        self.is_static = isinstance(cache.layers[self.keyed], StaticLayer)

    def length(self) -> int | Tensor:
        """Tokens seen so far."""
        length: int | Tensor = self.cache.get_seq_length(self.keyed)
        return length

    def key_range(self, queries: int) -> tuple[int, int]:
        """How many keys `update` will return, and the position of the first."""
        keys, first = self.cache.get_mask_sizes(queries, self.keyed)
        return int(keys), int(first)

    def count(self, x_BTd: Tensor) -> None:
        """Note T more tokens where no keys do: transformers asks every cache for its length."""
        marks = x_BTd.new_zeros(x_BTd.shape[0], 1, x_BTd.shape[1], 1, dtype=torch.bool)
        self.cache.update(marks, marks, self.keyed)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all to attend to."""
        return self.cache.update(key, value, layer_idx)

    def recurrent_state(self, layer_idx: int) -> Tensor | None:
        """The state that the layer left behind, or None."""
        layer = self.cache.layers[layer_idx]
        return layer.recurrent_states[0] if layer.has_previous_state[0] else None

    def check_batch(self, batch: int) -> None:
        """Refuse a state of another batch size: transformers can repeat keys without the state.

        Raises:
            PHAError: the cache was repeated, selected or made for other sequences.
        """
        for index, layer in enumerate(self.cache.layers):
            state = getattr(layer, "recurrent_states", {}).get(0)
            if state is not None and layer.has_previous_state[0] and state.shape[0] != batch:
                raise PHAError(
                    f"the cache holds states of {state.shape[0]} sequences in layer {index}, but "
                    f"{batch} are given: begin with a new cache (transformers repeats keys, not "
                    "recurrent states)"
                )

    def set_recurrent_state(self, layer_idx: int, state: Tensor) -> None:
        """Keep the state of the layer."""
        self.cache.update_recurrent_state(state, layer_idx)
        # transformers marks a layer as started only with its convolution state; there is none here.
        self.cache.layers[layer_idx].has_previous_state[0] = True


class _Writer:
    """Writes tokens with compiled instructions, into room that a growing cache is given.

    The cache's keys become views of buffers with places to spare, so that a token costs no copy of
    those before it. Whoever replaces them (beam search, cropping) loses nothing: they are copied
    again.
    """

    def __init__(self, decoder: Decoder, model: nn.Module) -> None:
        self.decoder, self.model = decoder, weakref.ref(model)
        self.room: dict[int, tuple[Tensor, Tensor]] = {}

    def serves(self, model: nn.Module, batch: int) -> bool:
        """Whether the instructions are for this model, as it is now, and so many sequences."""
        return self.model() is model and self.decoder.batch == batch and self.decoder.is_valid()

    def make_room(self, cache: Cache, length: int) -> bool:
        """Have a place for one more key in every layer; false where that cannot be."""
        for index in self.decoder.key_layers:
            layer = cache.layers[index]
            if type(layer) not in _GROWING or layer.keys is None:
                return False
            kept = layer.keys, layer.values
            if kept[0].dtype != self.decoder.dtype or kept[0].shape[2] != length:
                return False
            room = self.room.get(index)
            if room is None or room[0].shape[2] <= length or not all(map(_is_begin, kept, room)):
                self.room[index] = tuple(_enlarged(x, length) for x in kept)  # type: ignore[assignment]
        return True

    def states(self, cache: Cache) -> dict[int, Tensor] | None:
        """The recurrent states by layer, or None where one is missing."""
        states = {}
        for index in self.decoder.state_layers:
            layer = cache.layers[index]
            state = layer.recurrent_states[0]
            if not layer.has_previous_state[0] or state.dtype != torch.float32:
                return None
            if not state.is_contiguous():
                return None
            states[index] = state
        return states


_GROWING = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
_SPARE = 256  # places for keys at least
_WRITERS: WeakKeyDictionary[Cache, _Writer | None] = WeakKeyDictionary()


def _is_begin(kept: Tensor, room: Tensor) -> bool:
    """Whether `kept` is still the view of `room` that it was made."""
    same = kept.data_ptr() == room.data_ptr() and kept.stride() == room.stride()
    return same and kept.shape[:2] == room.shape[:2]


def _enlarged(kept: Tensor, length: int) -> Tensor:
    B, G, _, K = kept.shape
    room = kept.new_empty(B, G, length + max(_SPARE, length // 4), K)
    room[:, :, :length] = kept
    return room


def decode(
    backbone: Backbone,
    head: nn.Linear,
    ids: Tensor,
    cache: Cache,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor | None:
    """Logits (B, 1, V) of one more token for each sequence, by the compiled instructions.

    Args:
        backbone: in evaluation mode.
        head: the output head.
        ids: (B, 1) tokens.
        cache: the past; updated.
        attention_mask: (B, S + 1), 0 at padding.
        positions: (B, 1); counts on from the cache when absent.

    Returns:
        Logits in the type of the weights, or None, with nothing changed, where the layers have to
        do it: see `pha.nn.decoding`. So do gradients, compilation, static and sliding caches.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or ids.device.type != "cpu":
        return None
    if not hasattr(cache, "layers") or type(backbone.embed_tokens) is not nn.Embedding:
        return None
    adapter, batch = CacheAdapter(cache), ids.shape[0]
    length = adapter.length()
    if not isinstance(length, int) or length == 0 or torch.is_autocast_enabled("cpu"):
        return None
    writer = _WRITERS.get(cache)
    if cache not in _WRITERS or (writer is not None and not writer.serves(backbone, batch)):
        decoder = make_decoder(backbone, head, batch)
        writer = _WRITERS[cache] = None if decoder is None else _Writer(decoder, backbone)
    starts = _starts(attention_mask, batch, length + 1)
    if writer is None or starts is None or not writer.make_room(cache, length):
        return None
    states = writer.states(cache)
    if states is None:
        return None
    config = backbone.config
    if positions is None:
        positions = torch.full((1, 1), length)
    x = backbone.embed_tokens(ids)[:, 0].float() * math.sqrt(config.hidden_size)
    rotary = rotary_angles(positions, config.head_dim, config.rope_theta)
    decoder = writer.decoder
    logits = decoder.step(x, rotary, Past(writer.room, states, length, starts))
    for index, (keys, values) in writer.room.items():
        layer = cache.layers[index]
        layer.keys, layer.values = keys[:, :, : length + 1], values[:, :, : length + 1]
    if not decoder.key_layers:
        adapter.count(x[:, None])
    return logits[:, None]


def _starts(attention_mask: Tensor | None, batch: int, places: int) -> Tensor | None:
    """(B,) first place that counts, or None where padding is anywhere but on the left."""
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    if attention_mask.shape != (batch, places):
        return None
    mask = attention_mask.bool()
    if not bool((mask[:, -1:] & (mask[:, 1:] >= mask[:, :-1]).all(-1, keepdim=True)).all()):
        return None
    return (~mask).sum(-1)
