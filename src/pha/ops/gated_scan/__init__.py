"""Eq. 2 of the paper with its gated input: h_t = a * h_{t-1} + b * sigmoid(gate_t) * value_t.

Backward in closed form, with s = sigmoid(gate), dh the gradient of the outputs and g that of the
states:

    g_t = dh_t + a * g_{t+1},   da = sum_t g_t * h_{t-1},   dh_0 = a * g_1,
    dvalue = g b s,   dgate = g b value s (1 - s),   db = sum_t g_t s_t value_t.

Saved are gate, value and h; the input of the recurrence is not. A document start at t replaces a by
0 for that step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pha.ops.backends import Op
from pha.ops.gated_scan.naive import gated_scan_naive
from pha.ops.gated_scan.operator import gated_scan_operator
from pha.ops.pieces import Pieces
from pha.ops.precision import accumulation_type
from pha.ops.shapes import require_shapes
from pha.ops.testing import random_numbers, relative_error
from pha.ops.visible import VisibleFirst


def gated_scan(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    last_state: bool = True,
    pieces: Pieces | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run h_t = a * h_{t-1} + b * sigmoid(gate_t) * value_t over time.

    Args:
        gate: (B, T, n) before the sigmoid, any floating type.
        value: (B, T, n), of the same type.
        a: (n,) decays in (0, 1).
        b: (n,) scales of the input.
        h0: (B, n) state before the first step; zeros when absent.
        starts: (B, T) bool, true where a document begins: the state is reset before that step.
        mask: (B, T) bool, false where there is no step (padding): the state stays, and h is 0.
        last_state: whether the last state is wanted. With a mask it costs copies in its type.
        pieces: where the rest of the sequence is, if these are the steps of one piece of it; then
            there is no h0, no mask and no last state.

    Returns:
        h (B, T, n) in the type of `value`, and the last state (B, n), or None if not wanted.
        States are accumulated in float32 (float64 for float64 inputs), the type of the last state.

    Raises:
        PHAError: shapes that do not fit each other.
    """
    B, T, n = value.shape
    shapes = {"gate": (gate, (B, T, n)), "a": (a, (n,)), "b": (b, (n,)), "h0": (h0, (B, n))}
    flags = {"starts": (starts, (B, T)), "mask": (mask, (B, T))}
    require_shapes("gated_scan", "value", shapes | flags)
    # Calling an operator costs more than one step of the equation.
    scan = gated_scan_naive if T == 1 else _OP(value.device.type)
    if pieces is not None:
        h, last = scan(gate, value, a, b, None, starts)
        return h + _from_before(a, last, starts, T, pieces).to(h.dtype), None
    if mask is None or T == 0:
        h, last = scan(gate, value, a, b, h0, starts)
        return h, last if last_state else None
    visible = VisibleFirst(mask)
    dtype = accumulation_type(value) if last_state else value.dtype
    front = visible.front(gate.to(dtype)), visible.front(value.to(dtype))
    h, _ = scan(*front, a, b, h0, None if starts is None else visible.front_starts(starts))
    last = _state_after(visible, h, h0, starts) if last_state else None
    return visible.back(h).to(value.dtype), last


def _from_before(a: Tensor, last: Tensor, starts: Tensor | None, T: int, pieces: Pieces) -> Tensor:
    """What the pieces before add to h (B, T, n): a^t times the state that enters this one."""
    log_a = torch.log1p(a.to(last.dtype) - 1)  # of a as it is rounded, which the scan multiplies by
    kept = (T * log_a).exp().expand_as(last)
    if starts is not None:
        kept = kept * ~starts.any(1, keepdim=True)
    state = pieces.entering(last, kept)

    def decayed(log_a: Tensor, state: Tensor) -> Tensor:
        powers = (torch.arange(1, T + 1, device=a.device)[:, None] * log_a).exp()  # (T, n)
        added = powers * state.unsqueeze(1)
        return added if starts is None else added * (starts.cumsum(1) == 0).unsqueeze(-1)

    return pieces.computed_again(decayed, log_a, state)


def _state_after(
    visible: VisibleFirst, h: Tensor, h0: Tensor | None, starts: Tensor | None
) -> Tensor:
    """The state after the visible steps, which are the first of h (B, T, n)."""
    place = (visible.count - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, h.shape[2])
    before = h.new_zeros(()) if h0 is None else h0.to(h.dtype)
    last = torch.where(visible.count[:, None] > 0, h.gather(1, place).squeeze(1), before)
    return last if starts is None else torch.where(visible.ends_empty(starts)[:, None], 0, last)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, uniform = random_numbers(device_type)
    a = uniform(19)
    inputs = normal(2, 37, 19), normal(2, 37, 19), a, normal(19), normal(2, 19)
    starts = uniform(2, 37) < 0.1
    return relative_error(lambda *x: backend(*x, starts), lambda *x: oracle(*x, starts), *inputs)


_OP = Op(
    "gated_scan",
    {
        "naive": gated_scan_naive,
        "torch": gated_scan_operator,
    },
    {"default": "torch"},
    _check,
    limits={"torch": "naive for one step"},
)
