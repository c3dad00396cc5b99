"""`pha.model.StateCache` on top of transformers' caches, which stay the only store."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from pha.model.branches import LayerCache
from pha.ops.pieces import Pieces
from pha.utils.errors import PHAError

_REMEDY = "make one with model.new_cache()"


class PHACache(DynamicCache):
    """A growing cache whose sequences can be copied, repeated and selected, states included."""

    def copy(self) -> PHACache:
        """Another cache of the same past: either may go on, and the other does not change.

        Keys are shared, since nothing writes over them.
        """
        made = copy.copy(self)
        made.layers = [copy.copy(layer) for layer in self.layers]
        for layer in made.layers:
            vars(layer).update({k: dict(v) for k, v in vars(layer).items() if isinstance(v, dict)})
        made._each_state(torch.clone)
        return made

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence `repeats` times, one after the other."""
        super().batch_repeat_interleave(repeats)
        self._each_state(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences only."""
        super().batch_select_indices(indices)
        self._each_state(lambda state: state[indices])

    def _each_state(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for place, state in layer.recurrent_states.items():
                    if state is not None:
                        layer.recurrent_states[place] = change(state)


class CacheAdapter:
    """What the layers need of a transformers cache.

    Raises:
        PHAError: the cache is not one of this model.
    """

    def __init__(self, cache: Cache, config: PreTrainedConfig) -> None:
        if not isinstance(cache, Cache):
            raise PHAError(f"past_key_values is a {type(cache).__name__}, not a cache; {_REMEDY}")
        self.cache, self._config = cache, config
        if not cache.layers:  # made without a configuration, as loops often do
            cache.layers.extend(DynamicCache(config=config).layers)
        self._left: _Left | None = getattr(cache, "_pha_left", None)
        if self._left is None or self._left.config is None or self._left.config() is not config:
            _check_layers(cache, config)
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

    def layer(self, layer_idx: int) -> LayerCache:
        """What the layer of that index needs."""
        return KeptLayer(self.cache, layer_idx)

    def enter(self, batch: int, attention_mask: Tensor | None) -> None:
        """Refuse a cache whose keys and states are not of the same B sequences.

        transformers' own caches repeat, select and crop keys without the states beside them.

        Raises:
            PHAError: a state is of other sequences than those given, keys were changed alone, or
                no mask says which of the tokens seen were padding.
        """
        if torch.compiler.is_compiling():  # whoever compiles keeps a static cache as it is
            return
        keys, states = self._contents()
        for what, x in [*(("states", x) for x in states), *(("keys", x) for x in keys)]:
            if x is not None and x.numel() and x.shape[0] != batch:
                raise PHAError(
                    f"the cache holds {what} of {x.shape[0]} sequences, and {batch} are given; "
                    f"{_REMEDY}, which repeats and selects keys and states"
                )
        left = self._left
        if left is not None:
            if left.padded and attention_mask is None and self.length():
                raise PHAError(
                    "the cache holds padding; give attention_mask over its tokens and the new ones"
                )
            has_states = any(state is not None for state in states)
            if has_states and _changed(left.keys, keys) and not _changed(left.states, states):
                raise PHAError(
                    "the cache's keys were repeated, selected or cropped, and its recurrent states "
                    f"were not; {_REMEDY}, which repeats and selects both (no state can be cropped)"
                )
        # Held on to, old keys would stay in memory.
        self._left = self.cache._pha_left = None

    def leave(self, padded: bool) -> None:
        """Remember what the cache holds, and whether some of it is padding, for `enter`."""
        if not torch.compiler.is_compiling():
            self.cache._pha_left = _Left(weakref.ref(self._config), *self._contents(), padded)

    def _contents(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Keys of every layer, and states of every layer that may have one."""
        layers = self.cache.layers
        return [getattr(layer, "keys", None) for layer in layers], [
            state if layer.has_previous_state[place] else None
            for layer in layers
            if _keeps_state(layer)
            for place, state in layer.recurrent_states.items()
        ]


class KeptLayer:
    """One layer of a transformers cache."""

    pieces = None

    def __init__(self, cache: Cache, layer_idx: int) -> None:
        self._cache, self._index = cache, layer_idx
        self._layer = cache.layers[layer_idx]
        self._fetched = cache.offloading  # by the cache, whenever it is asked

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all to attend to."""
        if self._fetched:
            return self._cache.update(key, value, self._index)
        return self._layer.update(key, value)

    def state(self, place: int) -> Tensor | None:
        """A state that the layer left behind, or None."""
        layer = self._layer
        return layer.recurrent_states[place] if layer.has_previous_state[place] else None

    def set_state(self, place: int, state: Tensor) -> None:
        """Keep a state of the layer, all of which are recurrent states to transformers."""
        self._layer.update_recurrent_state(state, place)
        # transformers marks a layer as started only with a convolution state; there is none here.
        self._layer.has_previous_state[place] = True


class _Elsewhere(CacheAdapter):
    """A past that no cache of transformers holds."""

    is_static = False

    def key_range(self, queries: int) -> tuple[int, int]:
        """As of `CacheAdapter`."""
        length = self.length()
        assert isinstance(length, int)
        return length + queries, 0

    def count(self, x_BTd: Tensor) -> None:
        """Nothing: whoever gives the past says how long it is."""

    def enter(self, batch: int, attention_mask: Tensor | None) -> None:
        """Nothing: the past is of these rows."""

    def leave(self, padded: bool) -> None:
        """Nothing: whoever gives the past takes what is left."""


class CarriedCache(_Elsewhere):
    """The past of rows as a forward pass of training reads it, without gradient.

    What is read stays as it is, and what the rows leave is put beside it. So a layer that is
    computed a second time, as by gradient checkpointing, finds the same past.

    Args:
        past: what an earlier pass left, by name: keys and values (B, G, S, K), states (B, ...);
            empty at the beginning.
        memory: how many keys to leave; 0 for states alone.

    Attributes:
        left: what this pass leaves, detached.
    """

    def __init__(self, past: Mapping[str, Tensor], memory: int) -> None:
        self.past, self.memory = past, memory
        self.left: dict[str, Tensor] = {}

    def length(self) -> int:
        """Keys of each row, which are as many in every layer that has any."""
        return next((x.shape[2] for name, x in self.past.items() if name.startswith("key")), 0)

    def layer(self, layer_idx: int) -> LayerCache:
        """What the layer of that index needs."""
        return _CarriedLayer(self, layer_idx)


class SequencePieces(_Elsewhere):
    """The past of a piece of a sequence: the pieces on the ranks before, of as many tokens each.

    It is given as `past_key_values`, anew for each forward pass; every rank of the group has to run
    the same, backward too. Keys and values are gathered from all ranks, of states only the last.

    Args:
        pieces: the ranks.
        tokens: of each piece.
    """

    def __init__(self, pieces: Pieces, tokens: int) -> None:
        self.pieces, self.tokens = pieces, tokens

    def length(self) -> int:
        """Tokens of the pieces before."""
        return self.pieces.rank * self.tokens

    def layer(self, layer_idx: int) -> LayerCache:
        """What the layer of that index needs, which is what all do."""
        return _LayerOfPieces(self.pieces)

    def enter(self, batch: int, attention_mask: Tensor | None) -> None:
        """Refuse padding.

        Raises:
            PHAError: there is a mask.
        """
        if attention_mask is not None:
            raise PHAError("a sequence in pieces takes no attention_mask; leave padding out")


class _LayerOfPieces:
    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all pieces up to this one."""
        both = self.pieces.up_to_here(torch.stack([key, value]), 3)
        return both[0], both[1]

    def state(self, place: int) -> None:
        """None: a piece begins with nothing, and its op adds what came before."""

    def set_state(self, place: int, state: Tensor) -> None:
        """Nothing."""


class _CarriedLayer:
    pieces = None

    def __init__(self, cache: CarriedCache, layer_idx: int) -> None:
        self._cache, self._index = cache, layer_idx

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the past with these behind them."""
        return self._extended("key", key), self._extended("value", value)

    def _extended(self, what: str, new: Tensor) -> Tensor:
        cache, name = self._cache, f"{what}.{self._index}"
        if name in cache.past:
            new = torch.cat([cache.past[name].to(new.dtype), new], 2)
        if cache.memory:
            self._leave(name, new[:, :, -cache.memory :])
        return new

    def state(self, place: int) -> Tensor | None:
        """A state of the past, or None."""
        return self._cache.past.get(f"state.{self._index}.{place}")

    def set_state(self, place: int, state: Tensor) -> None:
        """Leave a state."""
        self._leave(f"state.{self._index}.{place}", state)

    def _leave(self, name: str, x: Tensor) -> None:
        self._cache.left[name] = x.detach().clone(memory_format=torch.contiguous_format)


@dataclass
class _Left:
    """What a forward pass left in a cache, and of which model."""

    config: weakref.ref[PreTrainedConfig] | None
    keys: list[Tensor | None]
    states: list[Tensor | None]
    padded: bool

    def __reduce__(self) -> tuple[type[_Left], tuple[object, ...]]:
        return _Left, (
            None,
            self.keys,
            self.states,
            self.padded,
        )  # a cache may be copied and pickled


def _changed(before: list[Tensor | None], now: list[Tensor | None]) -> bool:
    return any(x is not y for x, y in zip(before, now, strict=True))


def _check_layers(cache: Cache, config: PreTrainedConfig) -> None:
    """Refuse a cache that was made for another model.

    Raises:
        PHAError: it has other layers.
    """
    kinds, places = config.layer_types, config.number_of_conv_states
    if len(cache.layers) != len(kinds):
        raise PHAError(
            f"the cache has {len(cache.layers)} layers and the model {len(kinds)}; {_REMEDY}"
        )
    for index, (layer, kind) in enumerate(zip(cache.layers, kinds, strict=True)):
        has = isinstance(layer, CacheLayerMixin), _keeps_state(layer)
        needs = kind != "linear_attention", kind.startswith(("hybrid", "linear"))
        few = has[1] and layer.number_of_states < places
        if few or any(need and not there for need, there in zip(needs, has, strict=True)):
            raise PHAError(
                f"layer {index} of the cache has no room for what the model keeps; {_REMEDY}, "
                "or one of transformers with config=model.config"
            )


def _keeps_state(layer: object) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)
