"""Masked steps do not exist: every recurrence equals itself over the visible steps alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pha.ops import (
    OPS,
    diagonal_ssm,
    dss,
    gated_scan,
    linear_attention,
    linear_scan,
    long_convolution,
    selective_scan,
    short_convolution,
)
from pha.ops.visible import VisibleFirst
from tests.ops.common import Inputs, in_pieces, outcome, worst

B, T = 5, 9
MASKS = {
    "left": torch.arange(T) >= torch.tensor([0, 1, 4, 8, 9])[:, None],
    "right": torch.arange(T) < torch.tensor([9, 8, 4, 1, 0])[:, None],
    "holes": torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.5,
    "nothing": torch.zeros(B, T, dtype=torch.bool),
}
RECURRENCES = gated_scan, dss, diagonal_ssm, linear_attention, linear_scan, selective_scan
CONVOLUTIONS = short_convolution, long_convolution
STATES: dict[Any, str] = dict.fromkeys(RECURRENCES, "h0") | dict.fromkeys(CONVOLUTIONS, "past")

each_op = pytest.mark.parametrize("op", STATES)


def problem(op: Any, with_h0: bool = True, with_starts: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs: Inputs
    if op is gated_scan:
        inputs = {"gate": normal(B, T, 6), "value": normal(B, T, 6)}
        inputs |= {"a": normal(6).sigmoid(), "b": normal(6), "h0": normal(B, 6)}
    elif op is linear_attention:
        inputs = {name: normal(B, T, 2, 4) for name in ("q", "k")}
        inputs |= {"v": normal(B, T, 2, 3), "g": -normal(B, T, 2).abs()}
        inputs |= {"beta": normal(B, T, 2).sigmoid() / 4, "h0": normal(B, 2, 4, 3)}
    elif op is short_convolution:
        inputs = {"x": normal(B, T, 3), "weight": normal(3, 5), "past": normal(B, 4, 3)}
    elif op is long_convolution:
        inputs = {"x": normal(B, T, 3), "kernel": normal(6, 3), "past": normal(B, 5, 3)}
    elif op is diagonal_ssm:
        inputs = {name: normal(3, 4) for name in ("Lambda_re", "Lambda_im", "w_re", "w_im")}
        inputs["Lambda_re"] = -inputs["Lambda_re"].exp()
        inputs |= {"u": normal(B, T, 3), "D": normal(3), "h0": normal(B, 3, 4, 2)}
    elif op is linear_scan:
        inputs = {"u": normal(B, T, 6), "a": normal(B, T, 6).sigmoid(), "h0": normal(B, 6)}
    elif op is selective_scan:
        inputs = {"x": normal(B, T, 3), "dt": normal(B, T, 3).sigmoid(), "A": -normal(3, 4).exp()}
        inputs |= {"B": normal(B, T, 4), "C": normal(B, T, 4), "h0": normal(B, 3, 4)}
    else:
        shapes = {"Lambda_re": (4,), "Lambda_im": (4,), "C_re": (3, 4), "C_im": (3, 4), "D": (3,)}
        inputs = {name: normal(*shape) for name, shape in shapes.items()}
        inputs["Lambda_re"] -= 1
        inputs |= {"v": normal(B, T, 3), "h0": normal(B, 3, 4, 2)}
    if not with_h0:
        del inputs[STATES[op]]
    if with_starts:
        inputs["starts"] = torch.rand(B, T, generator=generator) < 0.3
    return inputs


def by_definition(op: Any, mask: Tensor, starts: Tensor | None = None, **inputs: Any) -> Any:
    """Each row's visible steps by the oracle, and zeros in the places of the others."""
    h0, rows, lasts = STATES[op], [], []
    over_time = {k for k, x in inputs.items() if x.shape[:2] == (B, T)}
    nothing = 0 * sum(x.sum() for x in inputs.values())  # of which everything has a gradient
    for b in range(B):
        row = {k: x[b : b + 1] if k in {h0, *over_time} else x for k, x in inputs.items()}
        fresh, begins, seen = False, [], mask[b].nonzero().flatten()
        for t in range(T):
            fresh |= starts is not None and bool(starts[b, t])
            if mask[b, t]:
                begins.append(fresh)
                fresh = False
        row |= {k: x[:, seen] for k, x in row.items() if k in over_time}
        values = next(row[k] for k in ("value", "v", "x", "u") if k in row)
        y = values.new_zeros(1, T, *values.shape[2:])
        last = row.get(h0, torch.zeros_like(problem(op)[h0][:1]))
        if len(seen):
            with OPS[op.__name__].force("naive"):
                found, last = op(**row, starts=torch.tensor([begins]))
            y = y.index_copy(1, seen, found)
        rows.append(y)
        lasts.append(torch.zeros_like(last) if fresh else last)
    return torch.cat(rows) + nothing, torch.cat(lasts) + nothing


@each_op
@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("with_h0", [False, True])
@pytest.mark.parametrize("with_starts", [False, True])
def test_equals_the_visible_steps_alone(
    op: Any, where: str, with_h0: bool, with_starts: bool
) -> None:
    inputs = problem(op, with_h0, with_starts) | {"mask": MASKS[where]}
    expected = outcome(lambda **x: by_definition(op, **x), inputs)
    assert worst(outcome(op, inputs), expected) <= 1e-13


@each_op
@pytest.mark.parametrize("lengths", [[4, 5], [1] * T, [8, 1]])
def test_pieces_with_carried_state_equal_the_whole(op: Any, lengths: list[int]) -> None:
    inputs = problem(op) | {"mask": MASKS["holes"]}
    over_time = tuple(k for k, x in inputs.items() if x.shape[:2] == (B, T))
    carried = in_pieces(op, lengths, over_time, STATES[op])
    assert worst(outcome(carried, inputs), outcome(op, inputs)) <= 1e-13


@each_op
def test_no_state_is_formed_that_is_not_wanted(op: Any) -> None:
    inputs = problem(op) | {"mask": MASKS["holes"]}
    y, last = op(**inputs, last_state=False)
    assert last is None
    torch.testing.assert_close(y, op(**inputs)[0])


def test_half_precision_keeps_its_state_in_float32() -> None:
    inputs = problem(gated_scan) | {"mask": MASKS["right"]}
    rounded = inputs | {name: inputs[name].bfloat16() for name in ("gate", "value")}
    rounded |= {name: inputs[name].float() for name in ("a", "b", "h0")}
    y, last = gated_scan(**rounded)
    assert (y.dtype, last is None or last.dtype) == (torch.bfloat16, torch.float32)
    exact = {k: x.double() if x.is_floating_point() else x for k, x in rounded.items()}
    wide = gated_scan(**exact)[1]
    torch.testing.assert_close(last, wide, rtol=1e-6, atol=1e-6, check_dtype=False)


def test_there_and_back() -> None:
    visible, x = VisibleFirst(MASKS["holes"]), torch.randn(B, T, 2, 3)
    kept = torch.where(MASKS["holes"][..., None, None], x, 0)
    assert torch.equal(visible.back(visible.front(x)), kept)
    assert visible.count.tolist() == MASKS["holes"].sum(1).tolist()
