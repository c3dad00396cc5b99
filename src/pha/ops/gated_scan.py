"""Eq. 2 with its gated input in one pass: h_t = a * h_{t-1} + b * sigmoid(gate_t) * value_t.

With s = sigmoid(gate) and g the gradient of the states (see `scan`), the rest of the backward is
dvalue = g b s,   dgate = g b value s (1 - s),   db = sum_t g_t s_t value_t.
Saved are gate, value and h; the input of the recurrence is never stored, in either direction.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pha.ops import numba_runtime, triton_runtime, triton_scan
from pha.ops.backends import Op
from pha.ops.precision import accumulation_type
from pha.ops.scan import loop_backward, scan, scan_naive
from pha.ops.testing import relative_error


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
    """
    return _OP(value.device.type)(gate, value, a, b, h0, starts, mask)


def gated_scan_naive(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle: the equation as written, differentiated by autograd."""
    dtype = accumulation_type(value)
    u = b.to(dtype) * gate.to(dtype).sigmoid() * value.to(dtype)
    if mask is not None:
        u = torch.where(mask.unsqueeze(-1), u, 0.0)
    h, h_last = scan_naive(u, a, h0, starts)
    return h.to(value.dtype), h_last


def gated_scan_torch(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Torch's own operations in the type of the inputs, then the `scan` of the device."""
    u = gate.sigmoid() * value * b.to(value.dtype)
    if mask is not None:
        u = u * mask.unsqueeze(-1)
    return scan(u, a, h0, starts)


@torch.library.custom_op(
    "pha::gated_scan",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor gate, Tensor value, Tensor a, Tensor b, Tensor? h0, Tensor? starts, "
    "Tensor? mask) -> (Tensor, Tensor)",
)
def _compiled_forward(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kernel = numba_runtime.kernel("gated_scan_forward", value.dtype)
    if kernel is None:
        return gated_scan_torch(gate, value, a, b, h0, starts, mask)
    h, h_last = _outputs(gate, value, a, b, h0, starts, mask)
    flat, dtype = numba_runtime.flat, h_last.dtype
    numba_runtime.run(
        kernel,
        value.shape,
        *numba_runtime.strided(gate),
        *numba_runtime.strided(value),
        *(flat(x, dtype) for x in (a, b, h0)),
        *(numba_runtime.flags(x) for x in (starts, mask)),
        flat(h, h.dtype),
        flat(h_last, dtype),
    )
    return h, h_last


@_compiled_forward.register_fake
def _outputs(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, _, n = value.shape
    return value.new_empty(value.shape), value.new_empty(B, n, dtype=accumulation_type(value))


@torch.library.custom_op(
    "pha::gated_scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dh, Tensor dh_last, Tensor h, Tensor gate, Tensor value, Tensor a, Tensor b, "
    "Tensor? h0, Tensor? starts, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _compiled_backward(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    kernel = numba_runtime.kernel("gated_scan_backward", h.dtype)
    if kernel is None:
        return torch_backward(dh, dh_last, h, gate, value, a, b, h0, starts, mask)
    dtype = accumulation_type(h)
    dgate, dvalue = torch.empty_like(h), torch.empty_like(h)
    da, db, dh0 = (h.new_empty(dh_last.shape, dtype=dtype) for _ in range(3))
    flat = numba_runtime.flat
    numba_runtime.run(
        kernel,
        h.shape,
        *numba_runtime.strided(dh),
        flat(dh_last, dtype),
        flat(h, h.dtype),
        *numba_runtime.strided(gate),
        *numba_runtime.strided(value),
        *(flat(x, dtype) for x in (a, b, h0)),
        *(numba_runtime.flags(x) for x in (starts, mask)),
        *(flat(x, x.dtype) for x in (dgate, dvalue, da, db, dh0)),
    )
    dh0 = dh0 if h0 is None else dh0.to(h0.dtype)
    return dgate, dvalue, da.sum(0).to(a.dtype), db.sum(0).to(b.dtype), dh0


@_compiled_backward.register_fake
def _gradients(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    dtype = accumulation_type(h) if h0 is None else h0.dtype
    dh0 = h.new_empty(dh_last.shape, dtype=dtype)
    return torch.empty_like(h), torch.empty_like(h), a.new_empty(a.shape), b.new_empty(b.shape), dh0


def torch_backward(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients in torch's own operations, for where a compiled kernel is missing."""
    dtype = accumulation_type(h)
    g, da, dh0 = loop_backward(dh, dh_last, h, a, h0, starts)
    g = g.to(dtype) if mask is None else torch.where(mask.unsqueeze(-1), g.to(dtype), 0.0)
    s, scale = gate.to(dtype).sigmoid(), b.to(dtype)
    gs = g * s
    dgate = gs * scale * value.to(dtype) * (1 - s)
    db = (gs * value.to(dtype)).sum((0, 1))
    return dgate.to(gate.dtype), (gs * scale).to(value.dtype), da, db.to(b.dtype), dh0


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], *inputs)


def _differentiate(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, dh0 = _compiled_backward(dh, dh_last, *ctx.saved_tensors)
    return *gradients, dh0 if ctx.needs_input_grad[4] else None, None, None


_compiled_forward.register_autograd(_differentiate, setup_context=_save)


def gated_scan_numba(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of states in compiled loops, on several threads, on the CPU. See `gated_scan`.

    Everything between what is read and what is written is float32 (float64 for float64 inputs).
    float16 is computed in float32. Where numba fails torch takes over, with a warning. One token
    alone takes a step of the equation: calling an operator costs more.
    """
    if value.shape[1] == 1:
        return gated_scan_naive(gate, value, a, b, h0, starts, mask)
    if value.dtype == torch.float16:
        h, h_last = gated_scan_numba(gate.float(), value.float(), a, b, h0, starts, mask)
        return h.half(), h_last
    return _compiled_forward(gate.to(value.dtype), value, a, b, h0, starts, mask)


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
    if backend == "numba":
        return numba_runtime.fault("numba_scan")
    return triton_runtime.fault(backend, device_type)


_OP = Op(
    "gated_scan",
    {
        "naive": gated_scan_naive,
        "torch": gated_scan_torch,
        "numba": gated_scan_numba,
        "triton": gated_scan_triton,
        "triton-sequential": functools.partial(gated_scan_triton, form="sequential"),
        "triton-chunked": functools.partial(gated_scan_triton, form="chunked"),
    },
    {"cpu": "numba", "cuda": "triton", "default": "torch"},
    _check,
    only_on={
        "numba": "cpu",
        "triton": "cuda",
        "triton-sequential": "cuda",
        "triton-chunked": "cuda",
    },
    fault=_fault,
)
