"""The gated scan by Triton as an operator of torch; where Triton cannot run, torch does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pha.ops.gated_scan import triton as triton_scan
from pha.ops.gated_scan import triton_runtime
from pha.ops.gated_scan.closed_form import gated_scan_torch, torch_backward


@torch.library.custom_op(
    "pha::gated_scan_triton",
    mutates_args=(),
    schema="(Tensor gate, Tensor value, Tensor a, Tensor b, Tensor? h0, Tensor? starts, "
    "Tensor? mask, str form) -> (Tensor, Tensor)",
)
def _triton_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    if triton_runtime.usable(arguments[1].device):
        return triton_scan.scan_forward(*arguments)
    return gated_scan_torch(*arguments[:-1])


_triton_forward.register_fake(triton_scan.forward_outputs)


@torch.library.custom_op(
    "pha::gated_scan_triton_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor dh_last, Tensor h, Tensor gate, Tensor value, Tensor a, Tensor b, "
    "Tensor? h0, Tensor? starts, Tensor? mask, str form) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    if triton_runtime.usable(arguments[2].device):
        return triton_scan.scan_backward(*arguments)
    return torch_backward(*arguments[:-1])


_triton_backward.register_fake(triton_scan.backward_outputs)


def _save_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.form = inputs
    ctx.save_for_backward(output[0], *tensors)


def _differentiate_triton(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, dh0 = _triton_backward(dh, dh_last, *ctx.saved_tensors, ctx.form)
    return *gradients, dh0 if ctx.needs_input_grad[4] else None, None, None, None


_triton_forward.register_autograd(_differentiate_triton, setup_context=_save_triton)


def gated_scan_triton(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Triton's kernels, on a GPU. See `gated_scan` and, for `form`, `triton_scan.chunk_length`.

    Where Triton fails, or its first use finds it wrong, torch takes over, with a warning.
    """
    return _triton_forward(gate.to(value.dtype), value, a, b, h0, starts, mask, form)
