"""Residual connections and the two kinds of block, written out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from pha.model import Branch, ParallelBlock, SequentialBlock, register_branch
from pha.model.block import Residual
from pha.model.branches import Context
from tests.model.common import plain_context, scramble, small

SUBSETS = [
    list(subset)
    for size in (1, 2, 3)
    for subset in itertools.combinations(["gss", "attention", "aux_ffn"], size)
]
each_residual = pytest.mark.parametrize("residual", ["pre", "post"])


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def connect(residual: Residual, kind: str, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """The paper's two sound readings, for three layers: alpha = 6^(1/4)."""
    alpha = 6**0.25
    if kind == "pre":
        return x + f(rms(x, residual.norm.weight)) / alpha
    return rms(alpha * x + f(x), residual.norm.weight)


@each_residual
def test_residual_by_definition(residual: str) -> None:
    module = scramble(Residual(small(residual=residual))).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    actual = module(x, module.enter(x).square() - 1)
    expected = connect(module, residual, x, lambda z: z.square() - 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@each_residual
def test_dropout_acts_on_what_enters_the_stream(residual: str) -> None:
    module = Residual(small(residual=residual, dropout=0.5))
    x = torch.randn(2, 5, 24)
    everything = module.eval()(x, torch.ones_like(x))
    torch.manual_seed(0)
    dropped = module.train()(x, torch.ones_like(x))
    assert not torch.equal(dropped, everything)
    if residual == "pre":
        # Each entry of f = 1 is either gone or doubled; x itself is always there.
        added = ((dropped - x) * 6**0.25).round(decimals=4)
        assert set(added.unique().tolist()) == {0.0, 2.0}


@each_residual
@pytest.mark.parametrize("branches", SUBSETS, ids="+".join)
def test_parallel_block_of_any_subset(residual: str, branches: list[str]) -> None:
    config = small(branches=branches, residual=residual)
    block = scramble(ParallelBlock(config, 0)).double()
    context = plain_context(config, 7)
    x = torch.randn(2, 7, 24, dtype=torch.float64)

    def mix(z: Tensor) -> Tensor:
        p = torch.log1p(block.mixing.theta.float().exp())
        w = (p / p.sum()).double()
        gains = {name: block.mixing.get_parameter(f"norms.{name}.weight") for name in branches}
        outputs = [rms(block.branches[name](z, context), gains[name]) for name in branches]
        return (w[:, None, None, None] * torch.stack(outputs)).sum(0)

    expected = connect(block.mix_residual, residual, x, mix)
    expected = connect(block.ffn_residual, residual, expected, block.primary_ffn)
    # The mixing weights are float32; written out here they are rounded a little differently.
    atol = 4e-7 * expected.abs().max().item()
    torch.testing.assert_close(block(x, context), expected, rtol=0, atol=atol)


@each_residual
@pytest.mark.parametrize("order", list(itertools.permutations(["gss", "attention", "aux_ffn"])))
def test_sequential_block_goes_in_the_order_of_branches(
    residual: str, order: tuple[str, ...]
) -> None:
    config = small(block="sequential", branches=list(order), residual=residual)
    block = scramble(SequentialBlock(config, 0)).double()
    assert not any("mixing" in name for name, _ in block.named_parameters())
    context = plain_context(config, 7)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    expected = x
    for name in order:
        branch = partial(block.branches[name], context=context)
        expected = connect(block.residuals[name], residual, expected, branch)
    expected = connect(block.ffn_residual, residual, expected, block.primary_ffn)
    atol = 1e-13 * expected.abs().max().item()
    torch.testing.assert_close(block(x, context), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("block", [ParallelBlock, SequentialBlock])
@pytest.mark.parametrize("attention_layer", [False, True])
def test_a_layer_without_a_primary_ffn(
    block: type[ParallelBlock] | type[SequentialBlock], attention_layer: bool
) -> None:
    config = small(
        branches=["gss"],
        attention_layers=[1] if attention_layer else [],
        primary_ffn_expansion=0,
    )
    module = scramble(block(config, 1)).double()
    name = "attention" if attention_layer else "gss"
    assert list(module.branches) == [name]
    assert not any("aux_ffn" in parameter for parameter, _ in module.named_parameters())
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    z = rms(x, next(p for n, p in module.named_parameters() if n.endswith("norm.weight")))
    y = module.branches[name](z, plain_context(config, 7))
    if block is ParallelBlock:
        y = rms(y, module.mixing.norms[name].weight)
    expected = x + y / 6**0.25
    torch.testing.assert_close(
        module(x, plain_context(config, 7)),
        expected,
        rtol=0,
        atol=1e-13 * float(expected.abs().max()),
    )


@pytest.fixture
def recorders(registry: None) -> list[tuple[str, Tensor, Context]]:
    """Two branches, `first` and `second`, that record what they are given."""
    calls: list[tuple[str, Tensor, Context]] = []
    for label in ("first", "second"):

        class Recorder(Branch):
            label: str

            def forward(self, z: Tensor, context: Context) -> Tensor:
                calls.append((self.label, z, context))
                return z + 1

        Recorder.label = label
        register_branch(label)(Recorder)
    return calls


def test_parallel_branches_share_one_input(recorders: list[tuple[str, Tensor, Context]]) -> None:
    config = small(branches=["second", "first"])
    context = plain_context(config, 3)
    x = torch.randn(1, 3, 24)
    ParallelBlock(config, 0)(x, context)
    assert [label for label, *_ in recorders] == ["second", "first"]
    assert recorders[0][1] is recorders[1][1]
    assert all(seen is context for *_, seen in recorders)
    torch.testing.assert_close(recorders[0][1], rms(x, torch.ones(24)))


def test_sequential_branches_hand_on_their_output(
    recorders: list[tuple[str, Tensor, Context]],
) -> None:
    config = small(block="sequential", branches=["second", "first"])
    context = plain_context(config, 3)
    x = torch.randn(1, 3, 24)
    SequentialBlock(config, 0)(x, context)
    assert [label for label, *_ in recorders] == ["second", "first"]
    z = rms(x, torch.ones(24))
    torch.testing.assert_close(recorders[0][1], z)
    between = x + (z + 1) / 6**0.25
    torch.testing.assert_close(recorders[1][1], rms(between, torch.ones(24)))
