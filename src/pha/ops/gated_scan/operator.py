"""The gated scan as one operator of torch: a graph of torch.compile holds it as one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pha.ops.backends import OPS
from pha.ops.gated_scan.closed_form import torch_backward, torch_forward
from pha.ops.precision import accumulation_type


@torch.library.custom_op("pha::gated_scan", mutates_args=())
def gated_scan_operator(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    form: str = "torch",
) -> tuple[Tensor, Tensor]:
    """See `gated_scan`. `form` is "torch" or, for Triton, one that `chunk_length` knows."""
    if OPS["gated_scan"].by_triton(form, value):
        return OPS["gated_scan"].kernels["forward"](gate, value, a, b, h0, starts, form)
    return torch_forward(gate, value, a, b, h0, starts)


@gated_scan_operator.register_fake
def _outputs(gate: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, _, n = value.shape
    return value.new_empty(value.shape), value.new_empty(B, n, dtype=accumulation_type(value))


@torch.library.custom_op(
    "pha::gated_scan_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor dh_last, Tensor h, Tensor gate, Tensor value, Tensor a, Tensor b, "
    "Tensor? h0, Tensor? starts, str form) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    if OPS["gated_scan"].by_triton(arguments[-1], arguments[2]):
        return OPS["gated_scan"].kernels["backward"](*arguments)
    return torch_backward(*arguments[:-1])


@_backward.register_fake
def _gradients(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    dh0 = dh_last.new_empty(dh_last.shape, dtype=accumulation_type(h) if h0 is None else h0.dtype)
    return *(x.new_empty(x.shape) for x in (gate, value, a, b)), dh0


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.form = inputs
    ctx.save_for_backward(output[0], *tensors)


def _differentiate(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor | None, ...]:
    h, *inputs, h0, starts = ctx.saved_tensors
    *gradients, dh0 = _backward(dh, dh_last, h, *inputs, h0, starts, ctx.form)
    return *gradients, None if h0 is None else dh0, None, None


gated_scan_operator.register_autograd(_differentiate, setup_context=_save)
