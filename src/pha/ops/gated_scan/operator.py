"""The gated scan as one operator of torch: a graph of torch.compile holds it as one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pha.ops.backends import OPS
from pha.ops.gated_scan.closed_form import torch_backward, torch_forward
from pha.ops.precision import accumulation_type

_INPUTS = "Tensor gate, Tensor value, Tensor a, Tensor b, Tensor? h0, Tensor? starts, str form"


@torch.library.custom_op(
    "pha::gated_scan", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    if OPS["gated_scan"].by_triton(arguments[-1], arguments[1]):
        return OPS["gated_scan"].kernels["forward"](*arguments)
    return torch_forward(*arguments[:-1])


@_forward.register_fake
def _outputs(gate: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, _, n = value.shape
    return value.new_empty(value.shape), value.new_empty(B, n, dtype=accumulation_type(value))


@torch.library.custom_op(
    "pha::gated_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dh, Tensor dh_last, Tensor h, {_INPUTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    *gradients, dh0 = _backward(dh, dh_last, *ctx.saved_tensors, ctx.form)
    return *gradients, dh0 if ctx.needs_input_grad[4] else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


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
    return _forward(gate, value, a, b, h0, starts, form)
