"""Writing tokens on a CPU in one compiled call each: the layers' answers, several times as fast.

Optional: it needs numba, and without this folder `PHAForCausalLM` runs its layers for every token.
"""

from __future__ import annotations

import math
import weakref
from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionAndFullAttentionLayer

from pha.caching import CacheAdapter
from pha.decoder.program import FORWARDS, Decoder, make_decoder
from pha.model import Backbone
from pha.model.attention import rotary_angles
from pha.utils.plain import nothing_intercepts

if find_spec("numba") is None:
    raise ImportError("the compiled decoder needs numba: pip install 'pha-lm[cpu]'")

enabled = True
"""False leaves every token to the layers, to measure what this is worth."""

_GROWING = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
_SPARE = 256  # places for keys at least


def stand_for(body: type[Backbone]) -> None:
    """Know a class that does what `Backbone` does, as the body of a model of transformers."""
    FORWARDS[body] = body.forward


def decode(
    backbone: Backbone,
    head: nn.Module,
    ids: Tensor,
    adapter: CacheAdapter,
    attention_mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor | None:
    """Logits (B, 1, V) of one more token for each sequence, by the compiled instructions.

    Args:
        backbone: in evaluation mode.
        head: the output head.
        ids: (B, 1) tokens.
        adapter: of the past, not entered; updated.
        attention_mask: (B, S + 1), 0 at padding.
        positions: (B, 1); counts on from the cache when absent.

    Returns:
        Logits in the type of the weights, or None, with nothing changed, where the layers have to
        do it: see `pha.decoder.program`. So do gradients, tracing, static and sliding caches.
    """
    if not enabled or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if not nothing_intercepts() or type(ids) is not Tensor or ids.device.type != "cpu":
        return None
    cache, (batch, _) = adapter.cache, ids.shape
    length, config = adapter.length(), backbone.config
    if not isinstance(length, int) or length == 0 or config.attention_window is not None:
        return None
    writer = _WRITERS.get(cache)
    if cache not in _WRITERS or (writer is not None and not writer.serves(backbone, head, batch)):
        decoder = make_decoder(backbone, head, batch)
        writer = _WRITERS[cache] = None if decoder is None else _Writer(decoder, backbone, head)
    starts = _starts(attention_mask, batch, length + 1)
    if writer is None or starts is None or not writer.make_room(cache, length):
        return None
    states = writer.states(cache)
    if positions is None:
        positions = length - starts[:, None]
    if states is None or positions.shape not in ((1, 1), (batch, 1)):
        return None
    adapter.enter(batch, attention_mask)
    x = backbone.embed_tokens(ids)[:, 0].float() * math.sqrt(config.hidden_size)
    rotary = rotary_angles(positions, config.head_dim, config.rope_theta)
    logits = writer.decoder.step(x, rotary, writer.room, states, length, starts)
    for index, (keys, values) in writer.room.items():
        layer = cache.layers[index]
        layer.keys, layer.values = keys[:, :, : length + 1], values[:, :, : length + 1]
    if not writer.room:
        adapter.count(x[:, None])
    adapter.leave(padded=bool(starts.any()))
    return logits[:, None]


class _Writer:
    """Writes tokens with compiled instructions, into room that a growing cache is given.

    The cache's keys become views of buffers with places to spare, so that a token costs no copy of
    those before it. Whoever replaces them (beam search, cropping) loses nothing: they are copied
    again, and places that were written once stay as they are for whoever else has them.
    """

    def __init__(self, decoder: Decoder, body: nn.Module, head: nn.Module) -> None:
        self.decoder, self.body, self.head = decoder, weakref.ref(body), weakref.ref(head)
        self.room: dict[int, tuple[Tensor, Tensor]] = {}
        self.written = 0  # places of the room

    def serves(self, body: nn.Module, head: nn.Module, batch: int) -> bool:
        """Whether the instructions are for this model, as it is now, and so many sequences."""
        if self.body() is not body or self.head() is not head or self.decoder.batch != batch:
            return False
        return self.decoder.is_valid()

    def make_room(self, cache: Cache, length: int) -> bool:
        """Have a place for one more key in every layer; false where that cannot be."""
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        for index, (groups, size) in self.decoder.key_layers.items():
            layer, shape = cache.layers[index], (self.decoder.batch, groups, length, size)
            if type(layer) not in _GROWING:
                return False
            kept[index] = layer.keys, layer.values
            if not all(_is(x, shape, self.decoder.dtype) for x in kept[index]):
                return False
        fits = (
            self.room
            and self.written == length
            and all(
                room[0].shape[2] > length and all(map(_is_begin, kept[index], room))
                for index, room in self.room.items()
            )
        )
        if not fits:  # of all layers, whose rooms are of one size
            self.room = {
                index: (_enlarged(keys, length), _enlarged(values, length))
                for index, (keys, values) in kept.items()
            }
        self.written = length + 1
        return True

    def states(self, cache: Cache) -> dict[int, Tensor] | None:
        """The recurrent states by layer, or None where one is missing or of another shape."""
        states = {}
        for index, size in self.decoder.state_layers.items():
            layer = cache.layers[index]
            state = layer.recurrent_states[0]  # with instructions there is no branch but Eq. 2's
            if not _is(state, (self.decoder.batch, size), torch.float32):
                return None
            if not (layer.has_previous_state[0] and state.is_contiguous()):
                return None
            states[index] = state
        return states


_WRITERS: WeakKeyDictionary[Cache, _Writer | None] = WeakKeyDictionary()


def _is(x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether this is an ordinary tensor of the shape and type, in memory."""
    return type(x) is Tensor and x.shape == shape and x.dtype == dtype and x.device.type == "cpu"


def _is_begin(kept: Tensor, room: Tensor) -> bool:
    """Whether `kept` is still the view of `room` that it was made."""
    same = kept.data_ptr() == room.data_ptr() and kept.stride() == room.stride()
    return same and kept.shape[:2] == room.shape[:2]


def _enlarged(kept: Tensor, length: int) -> Tensor:
    B, G, _, K = kept.shape
    room = kept.new_empty(B, G, length + max(_SPARE, length // 4), K)
    room[:, :, :length] = kept
    return room


def _starts(attention_mask: Tensor | None, batch: int, places: int) -> Tensor | None:
    """(B,) first place that counts, or None where padding is anywhere but on the left."""
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.int64)
    if attention_mask.shape != (batch, places):
        return None
    mask = attention_mask.bool()
    if bool((attention_mask != mask).any()):
        return None
    if not bool((mask[:, -1:] & (mask[:, 1:] >= mask[:, :-1]).all(-1, keepdim=True)).all()):
        return None
    return (~mask).sum(-1)
