"""Eq. 2 of the paper with its gated input: h_t = a * h_{t-1} + b * sigmoid(gate_t) * value_t.

Backward in closed form, with s = sigmoid(gate), dh the gradient of the outputs and g that of the
states:

    g_t = dh_t + a * g_{t+1},   da = sum_t g_t * h_{t-1},   dh_0 = a * g_1,
    dvalue = g b s,   dgate = g b value s (1 - s),   db = sum_t g_t s_t value_t.

Saved are gate, value and h; the input of the recurrence is not. A document start at t replaces a by
0 for that step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pha.ops.backends import Op
from pha.ops.gated_scan import triton_runtime
from pha.ops.gated_scan.naive import gated_scan_naive
from pha.ops.gated_scan.operator import gated_scan_operator
from pha.ops.testing import relative_error
from pha.utils.errors import PHAError


def gated_scan(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run h_t = a * h_{t-1} + b * sigmoid(gate_t) * value_t over time.

    Args:
        gate: (B, T, n) before the sigmoid, any floating type.
        value: (B, T, n), of the same type.
        a: (n,) decays in (0, 1).
        b: (n,) scales of the input.
        h0: (B, n) state before the first step; zeros when absent.
        starts: (B, T) bool, true where a document begins: the state is reset before that step.
        mask: (B, T) bool, false where nothing enters the state (padding).

    Returns:
        h (B, T, n) in the type of `value`, and the last state (B, n). States are accumulated in
        float32 (float64 for float64 inputs), the type of the last state.

    Raises:
        PHAError: shapes that do not fit each other.
    """
    B, T, n = value.shape
    for name, x, shape in (
        ("gate", gate, (B, T, n)),
        *(("a", a, (n,)), ("b", b, (n,)), ("h0", h0, (B, n))),
        *(("starts", starts, (B, T)), ("mask", mask, (B, T))),
    ):
        if x is not None and x.shape != shape:
            raise PHAError(f"gated_scan: {name} is {tuple(x.shape)}; {shape} goes with value")
    if T == 1:  # calling an operator costs more than a step of the equation
        return gated_scan_naive(gate, value, a, b, h0, starts, mask)
    return _OP(value.device.type)(gate, value, a, b, h0, starts, mask)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device_type)

    a = torch.rand(19, generator=generator).to(device_type)
    inputs = normal(2, 37, 19), normal(2, 37, 19), a, normal(19), normal(2, 19)
    starts, mask = (
        (torch.rand(2, 37, generator=generator) < p).to(device_type) for p in (0.1, 0.9)
    )
    return relative_error(
        lambda *x: backend(*x, starts, mask), lambda *x: oracle(*x, starts, mask), *inputs
    )


def _fault(backend: str, device_type: str) -> str | None:
    if not backend.startswith("triton"):
        return None
    return triton_runtime.fault(torch.empty(0, device=device_type).device)


_OP = Op(
    "gated_scan",
    {
        "naive": gated_scan_naive,
        "torch": gated_scan_operator,
        "triton": functools.partial(gated_scan_operator, form="auto"),
        "triton-sequential": functools.partial(gated_scan_operator, form="sequential"),
        "triton-chunked": functools.partial(gated_scan_operator, form="chunked"),
    },
    {"cuda": "triton", "default": "torch"},
    _check,
    only_on=dict.fromkeys(("triton", "triton-sequential", "triton-chunked"), "cuda"),
    fault=_fault,
    limits=dict.fromkeys(("torch", "triton"), "naive for one step"),
)
