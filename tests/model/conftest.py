"""Small shapes for the tests of the paper's parts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pha.model import BRANCHES, ArchitectureConfig
from pha.model.attention import rotary_angles
from pha.model.branches import Context


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers whichever tests run, in whatever order."""
    torch.manual_seed(0)


@pytest.fixture
def small() -> Callable[..., ArchitectureConfig]:
    """A configuration of odd, unequal sizes, so that a transposed weight cannot pass."""

    def make(**overrides: Any) -> ArchitectureConfig:
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

    return make


@pytest.fixture
def plain_context() -> Callable[..., Context]:
    """What a block is told of T tokens at `positions` (0, 1, ... when absent)."""

    def make(
        config: ArchitectureConfig, T: int, positions: Tensor | None = None, **fields: Any
    ) -> Context:
        if positions is None:
            positions = torch.arange(T)[None]
        return Context(rotary_angles(positions, config.head_dim, config.rope_theta), **fields)

    return make


@pytest.fixture
def scramble() -> Callable[..., Any]:
    """Move every parameter off its starting value, so that no gain of one can hide."""

    def move(module: nn.Module, seed: int = 0, by: float = 0.3) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(by * noise.to(parameter.dtype))
        return module

    return move


class OneState:
    """The smallest cache there is: one layer's recurrent state."""

    def __init__(self) -> None:
        self.state: Tensor | None = None

    def recurrent_state(self, layer_idx: int) -> Tensor | None:
        assert layer_idx == 0
        return self.state

    def set_recurrent_state(self, layer_idx: int, state: Tensor) -> None:
        assert layer_idx == 0
        self.state = state


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Replace a function by one that notes the `inputs` and `outputs` of its last call."""

    def watch(name: str) -> dict[str, Any]:
        module, _, attribute = name.rpartition(".")
        function, seen = getattr(importlib.import_module(module), attribute), {}

        def watched(*inputs: Any) -> Any:
            seen["inputs"], seen["outputs"] = inputs, function(*inputs)
            return seen["outputs"]

        monkeypatch.setattr(name, watched)
        return seen

    return watch


@pytest.fixture
def registry() -> Iterator[None]:
    """Branches registered by a test are forgotten after it; those of others were."""
    before = dict(BRANCHES)
    assert set(before) == {"gss", "mehta_gss", "attention", "aux_ffn"}
    yield
    BRANCHES.clear()
    BRANCHES.update(before)
