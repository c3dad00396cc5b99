"""The contract of a branch, and the table that turns a name in the configuration into a class.

A branch of one's own is a class and a line:

    @register_branch("average")
    class CausalAverage(Branch):
        ...

after which `branches: [gss, attention, average]` works in every block, recipe and preset.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pha.ops.attention.naive import BlockMask, Mask
from pha.ops.pieces import Pieces
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from pha.model.config import ArchitectureConfig


class LayerCache(Protocol):
    """What a branch needs of the model's cache to carry its past from call to call."""

    @property
    def pieces(self) -> Pieces | None:
        """Where the rest of the sequence is, if the tokens are a piece of it; no state is kept."""
        ...

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, G, T, K); return those to attend to, (B, G, S, K)."""
        ...

    def state(self, place: int) -> Tensor | None:
        """What the layer left behind in that place, (B, ...), or None at the beginning."""
        ...

    def set_state(self, place: int, state: Tensor) -> None:
        """Keep a state of the layer: a real tensor (B, ...), of the same shape at every call."""
        ...


class StateCache(Protocol):
    """What the backbone needs of the model's cache."""

    is_static: bool
    """Whether keys have fixed places, so that their number says nothing of how many are filled."""

    def length(self) -> int | Tensor:
        """Tokens seen so far."""
        ...

    def key_range(self, queries: int) -> tuple[int, int]:
        """How many keys `update` will return for T new tokens, and the position of the first."""
        ...

    def layer(self, layer_idx: int) -> LayerCache:
        """What one layer needs of it, which does not say which layer that is.

        So layers compiled by themselves share a graph.
        """
        ...


@dataclass
class Context:
    """What every layer knows of the tokens it is given; made once per forward pass.

    Attributes:
        rotary: cosine and sine (B or 1, T, K / 2) of the rotary angles, float32.
        positions: (B or 1, T), counted from the beginning of each document.
        attention_mask: (B or 1, 1, T, S) bool; None for plain causal attention, and with blocks.
            What a branch passes to `attention` is `seen`.
        attention_window: keys that a query may see besides, or None.
        query_places: (T,) of the tokens among the keys, where those have fixed places; else None.
        blocks: by window, the keys that queries see as FlexAttention wants to know of them (None:
            all before); None where something else attends.
        attention_backend: name in the op table; None for the one of the device.
        document_starts: (B, T) bool, true where a document begins, or None.
        token_mask: (B, T) bool, false where there is no token, or None. What is returned there is
            not looked at; every other token must be as if they were left out.
        cache: where the layer's past is, or None when the tokens are the whole sequence.
        attention_weights: receives the weights (B, H, T, S) of each layer, where they are wanted.
        own_losses: receives losses that a branch has besides the model's, summed over tokens, where
            they are wanted; training follows their gradients too.
    """

    rotary: tuple[Tensor, Tensor]
    positions: Tensor
    attention_mask: Tensor | None = None
    attention_window: int | None = None
    query_places: Tensor | None = None
    blocks: Mapping[int | None, BlockMask | None] | None = None
    attention_backend: str | None = None
    document_starts: Tensor | None = None
    token_mask: Tensor | None = None
    cache: LayerCache | None = None
    attention_weights: list[Tensor] | None = None
    own_losses: list[Tensor] | None = None

    @property
    def pieces(self) -> Pieces | None:
        """Where the rest of the sequence is, if the tokens are a piece of it."""
        return None if self.cache is None else self.cache.pieces

    def seen(self, keys: int, window: int | None = None) -> tuple[Mask | None, int | None]:
        """The mask and the window of attention to S keys, of which a branch sees the last `window`.

        With blocks that is a window of the model or of one of its branches that keep keys.
        """
        bounds = [w for w in (window, self.attention_window) if w is not None]
        bound = min(bounds) if bounds else None
        if self.blocks is not None:
            return self.blocks[bound if bound is None or bound < keys else None], None
        if window is None or self.query_places is None:
            return self.attention_mask, bound
        within = torch.arange(keys, device=self.query_places.device) > (
            self.query_places[:, None] - window
        )
        mask = self.attention_mask
        return within if mask is None else mask & within, None


@dataclass
class Diagnostics:
    """What a branch shows of itself while it trains; None is what it does not have.

    Attributes:
        decays: what every state is multiplied by from token to token, its size, any shape.
        gates: values of its sigmoid gates, any shape.
        temperatures: what its attention logits are multiplied by, of any shape.
        temperature_limit: where they are clamped.
    """

    decays: Tensor | None = None
    gates: Tensor | None = None
    temperatures: Tensor | None = None
    temperature_limit: float = math.inf


class Branch(nn.Module):
    """One of the layers that run side by side on a block's normalised input.

    A subclass takes `(config, layer_idx)` and, as keyword arguments, whatever it wants to receive
    from `branch_options`. Its `forward(z, context)` returns (B, T, d), must not look ahead,
    and must respect `context`: documents, padding and, if it has one, the cache.

    Attributes:
        in_pieces: it can read a piece of a sequence whose rest other ranks have: it sees tokens one
            by one, keeps keys, or hands `context.pieces` to its op.
        keeps_keys: it passes keys and values to `LayerCache.update`, exactly once a call. The cache
            has room for those of one branch in a layer.
        states: names of the states that it keeps in the cache; see `past` and `keep`.
        float32: its parameters that stay float32 whatever the rest is in. Here and below, what an
            option leaves out may be named.
        no_decay: its matrices without weight decay. Vectors never have any.
        capped_rate: its parameters whose learning rate has a cap of its own.
        unit_gain: its linear layers that DeepNorm's initialisation leaves at gain 1.
    """

    in_pieces: ClassVar[bool] = False
    keeps_keys: ClassVar[bool] = False
    states: ClassVar[tuple[str, ...]] = ()
    float32: ClassVar[tuple[str, ...]] = ()
    no_decay: ClassVar[tuple[str, ...]] = ()
    capped_rate: ClassVar[tuple[str, ...]] = ()
    unit_gain: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ArchitectureConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.first_place = 0  # of its states among those of the layer

    def reset_parameters(self) -> None:
        """Set the starting values of all parameters but those of linear layers.

        Linear layers start as the whole model's do. What is set here comes later, so a branch may
        start its own otherwise.
        """

    def past(self, context: Context, name: str) -> Tensor | None:
        """The state of that name after the tokens in the cache; None at the beginning."""
        if context.cache is None:
            return None
        return context.cache.state(self.first_place + self.states.index(name))

    def keep(self, context: Context, **states: Tensor | None) -> None:
        """Leave states behind, by name, for the tokens to come; nothing where there is no cache."""
        for name, state in states.items():
            if context.cache is not None and state is not None:
                place = self.first_place + self.states.index(name)
                context.cache.set_state(place, state)

    def forward(self, z: Tensor, context: Context) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        raise NotImplementedError

    def flops(self, length: int) -> float:
        """FLOPs a token of reading `length` tokens, products with its parameters left out.

        A multiplication with an addition counts two, any other function of a number one.
        """
        return 0.0

    def diagnostics(self, z: Tensor) -> Diagnostics:
        """What there is to watch, at some of the tokens that entered, (B, T', d)."""
        return Diagnostics()


BRANCHES: dict[str, type[Branch]] = {}

_B = TypeVar("_B", bound=type[Branch])


def register_branch(name: str) -> Callable[[_B], _B]:
    """Class decorator: make a branch known under `name`.

    Raises:
        PHAError: another class has that name, or no module can have it.
    """

    def register(cls: _B) -> _B:
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise PHAError(f"a branch cannot be called {name!r}, a word of torch; choose another")
        if BRANCHES.setdefault(name, cls) is not cls:
            raise PHAError(f"there is a branch {name!r} already: {BRANCHES[name].__name__}")
        return cls

    return register


def make_branches(config: ArchitectureConfig, layer_idx: int) -> nn.ModuleDict:
    """Construct the branches of one layer, by name and in order.

    Raises:
        PHAError: no such branch, options that its constructor does not take, or two branches that
            keep keys.
    """
    branches = {
        name: _make_branch(name, options, config, layer_idx)
        for name, options in config.layer_branches(layer_idx).items()
    }
    keepers = [name for name, branch in branches.items() if branch.keeps_keys]
    if len(keepers) > 1:
        raise PHAError(
            f"model: branches {' and '.join(keepers)} both keep keys, and the cache has room for "
            "those of one in a layer; leave one of them out"
        )
    places = 0
    for branch in branches.values():
        branch.first_place, places = places, places + len(branch.states)
    return nn.ModuleDict(branches)


def _make_branch(
    name: str, options: dict[str, Any], config: ArchitectureConfig, layer_idx: int
) -> Branch:
    if name not in BRANCHES:
        known = ", ".join(sorted(BRANCHES))
        raise PHAError(f"model: branches names {name!r}; there is {known}")
    accepted = set(inspect.signature(BRANCHES[name]).parameters) - {"config", "layer_idx"}
    if unknown := set(options) - accepted:
        takes = ", ".join(sorted(accepted)) or "none"
        raise PHAError(
            f"model: branch {name} has no option {', '.join(sorted(unknown))}; it takes {takes}"
        )
    return BRANCHES[name](config, layer_idx, **options)
