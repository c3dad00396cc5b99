"""The contract of a branch, and the table that turns a name in the configuration into a class.

A branch of one's own is a class and a line:

    @register_branch("average")
    class CausalAverage(Branch):
        ...

after which `branches: [gss, attention, average]` works in every block, recipe and preset.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from torch import Tensor, nn

from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from pha.nn.config import ArchitectureConfig


class StateCache(Protocol):
    """What a branch needs of the model's cache to carry its past from call to call."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, G, T, K); return all of them (B, G, S, K)."""
        ...

    def recurrent_state(self, layer_idx: int) -> Tensor | None:
        """The state (B, n) that the layer left behind, or None at the beginning."""
        ...

    def set_recurrent_state(self, layer_idx: int, state: Tensor) -> None:
        """Keep the layer's state (B, n)."""
        ...


@dataclass
class Sequence:
    """What every layer knows of the tokens it is given; made once per forward pass.

    Attributes:
        rotary: cosine and sine (B or 1, T, K / 2) of the rotary angles, float32.
        attention_mask: (B or 1, 1, T, S) bool, or None for plain causal attention.
        document_starts: (B, T) bool, true where a document begins, or None.
        token_mask: (B, T) bool, false at padding, or None.
        cache: where the past is, or None when the tokens are the whole sequence.
    """

    rotary: tuple[Tensor, Tensor]
    attention_mask: Tensor | None = None
    document_starts: Tensor | None = None
    token_mask: Tensor | None = None
    cache: StateCache | None = None


class Branch(nn.Module):
    """One of the layers that run side by side on a block's normalised input.

    A subclass takes `(config, layer_idx)` and, as keyword arguments, whatever it wants to receive
    from `branch_options`. Its `forward(z_BTd, sequence)` returns (B, T, d), must not look ahead,
    and must respect `sequence`: documents, padding and, if it has one, the cache.
    """

    def __init__(self, config: ArchitectureConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, z_BTd: Tensor, sequence: Sequence) -> Tensor:
        """Map (B, T, d) to (B, T, d)."""
        raise NotImplementedError


BRANCHES: dict[str, type[Branch]] = {}

_B = TypeVar("_B", bound=type[Branch])


def register_branch(name: str) -> Callable[[_B], _B]:
    """Class decorator: make a branch known under `name`.

    Raises:
        PHAError: another class has that name.
    """

    def register(cls: _B) -> _B:
        if BRANCHES.setdefault(name, cls) is not cls:
            raise PHAError(f"there is a branch {name!r} already: {BRANCHES[name].__name__}")
        return cls

    return register


def make_branch(name: str, config: ArchitectureConfig, layer_idx: int) -> Branch:
    """Construct the branch called `name`.

    Raises:
        PHAError: no such branch, or options that its constructor does not take.
    """
    if name not in BRANCHES:
        known = ", ".join(sorted(BRANCHES))
        raise PHAError(f"model: branches names {name!r}; there is {known}")
    options = config.branch_options.get(name, {})
    accepted = set(inspect.signature(BRANCHES[name]).parameters) - {"config", "layer_idx"}
    if unknown := set(options) - accepted:
        takes = ", ".join(sorted(accepted)) or "none"
        raise PHAError(
            f"model: branch {name} has no option {', '.join(sorted(unknown))}; it takes {takes}"
        )
    return BRANCHES[name](config, layer_idx, **options)
