"""Small shapes for the tests of the paper's parts and of the other mixers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pha.model import ArchitectureConfig
from pha.model.attention import rotary_angles
from pha.model.branches import Context


def small(**overrides: Any) -> ArchitectureConfig:
    """A configuration of odd, unequal sizes, so that a transposed weight cannot pass."""
    fields: dict[str, Any] = {
        "vocab_size": 37,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "state_size": 48,
    }
    config = ArchitectureConfig(**(fields | overrides))
    config.check()
    return config


def plain_context(
    config: ArchitectureConfig, T: int, positions: Tensor | None = None, **fields: Any
) -> Context:
    """What a block is told of T tokens at `positions` (0, 1, ... when absent)."""
    if positions is None:
        positions = torch.arange(T)[None]
    return Context(
        rotary_angles(positions, config.head_dim, config.rope_theta), positions, **fields
    )


def scramble(module: nn.Module, seed: int = 0, by: float = 0.3) -> Any:
    """Move every parameter off its starting value, so that no gain of one can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(by * noise.to(parameter.dtype))
    return module


class States:
    """The smallest cache there is: the states of one layer."""

    pieces = None

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def state(self, place: int) -> Tensor | None:
        return self.kept.get(place)

    def set_state(self, place: int, state: Tensor) -> None:
        self.kept[place] = state
