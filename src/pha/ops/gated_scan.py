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
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from pha.ops import triton_runtime, triton_scan
from pha.ops.backends import Op
from pha.ops.precision import accumulation_type
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
    h = u.new_zeros(u.shape[0], u.shape[2]) if h0 is None else h0.to(dtype)
    states = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None], 0.0, h)
        h = a.to(dtype) * h + u[:, t]
        states.append(h)
    return torch.stack(states, dim=1).to(value.dtype), h


# An operator, so that a graph of torch.compile holds one node and not one for each block of time.
@torch.library.custom_op(
    "pha::gated_scan",
    mutates_args=(),
    schema="(Tensor gate, Tensor value, Tensor a, Tensor b, Tensor? h0, Tensor? starts, "
    "Tensor? mask) -> (Tensor, Tensor)",
)
def _forward(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_type(value)
    if not value.numel():
        last = value.new_zeros(value.shape[0], value.shape[2], dtype=dtype)
        return torch.empty_like(value), last if h0 is None else last.copy_(h0)
    h = gate.to(dtype).sigmoid().mul_(value).mul_(b.to(dtype))
    if mask is not None:
        h.mul_(mask.unsqueeze(-1))
    decay, kept = a.to(dtype), None if starts is None else (~starts).to(dtype)
    if h0 is not None:
        first = decay * h0
        h[:, 0] += first if kept is None else first * kept[:, :1]
    _recur_(h, decay, kept)
    last = h[:, -1].clone()
    return h.to(value.dtype), last


@_forward.register_fake
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


def _recur_(x: Tensor, a: Tensor, kept: Tensor | None, back: bool = False) -> None:
    """x_t += a kept_t x_{t-1} in place; or, back from the end, x_t += a kept_{t+1} x_{t+1}.

    Blocks of time are computed side by side, each as if nothing came before it; then what does is
    added, block after block. That takes about 2 sqrt(T) operations on large tensors, not T on small
    ones.

    Args:
        x: (B, T, n).
        a: (n,).
        kept: (B, T), 0 where nothing comes in from the step before, else 1; None for ones.
        back: the direction.
    """
    T = x.shape[1]
    size = math.isqrt(T)
    rest = T % size
    direction = slice(None, None, -1 if back else 1)
    if kept is not None and back:
        kept = kept.roll(-1, 1)  # the first is not looked at

    def cut(whole: Tensor) -> Tensor:
        return (whole[:, rest:] if back else whole[:, : T - rest]).unflatten(1, (-1, size))

    def add(to: Tensor, carried: Tensor, links: Tensor | None, decay: Tensor) -> None:
        to.addcmul_(carried if links is None else carried * links.unsqueeze(-1), decay)

    blocks, links = cut(x), None if kept is None else cut(kept)
    order = range(size)[direction]
    for before, now in itertools.pairwise(order):
        add(blocks[:, :, now], blocks[:, :, before], None if links is None else links[:, :, now], a)
    exponents = torch.arange(1, size + 1, device=a.device, dtype=a.dtype)
    powers = a ** (exponents.flip(0) if back else exponents)[:, None]
    if links is not None:
        links = links.flip(2).cumprod(2).flip(2) if back else links.cumprod(2)
    for before, now in itertools.pairwise(range(blocks.shape[1])[direction]):
        last = blocks[:, before, order[-1], None]
        add(blocks[:, now], last, None if links is None else links[:, now], powers)
    for now in range(rest)[direction] if back else range(T - rest, T):
        before = now + 1 if back else now - 1
        add(x[:, now], x[:, before], None if kept is None else kept[:, now], a)


@torch.library.custom_op(
    "pha::gated_scan_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor dh_last, Tensor h, Tensor gate, Tensor value, Tensor a, Tensor b, "
    "Tensor? h0, Tensor? starts, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dgate, dvalue, da, db and dh0 (that of zeros without h0), in torch's own operations."""
    dtype = accumulation_type(h)
    outputs = _gradients(dh, dh_last, h, gate, value, a, b, h0, starts, mask)
    if not h.numel():
        for x in outputs[:-1]:
            x.zero_()
        outputs[-1].copy_(dh_last)
        return outputs
    decay, scale = a.to(dtype), b.to(dtype)
    g = dh.to(dtype, copy=True, memory_format=torch.contiguous_format)
    g[:, -1] += dh_last
    kept = None if starts is None else (~starts).to(dtype)
    _recur_(g, decay, kept, back=True)
    into = g if kept is None else g * kept.unsqueeze(-1)  # what reaches the state before
    da = (into[:, 1:] * h[:, :-1]).sum((0, 1))
    if h0 is not None:
        da += (into[:, 0] * h0).sum(0)
    dh0 = (into[:, 0] * decay).to(outputs[-1].dtype)
    if mask is not None:
        g.mul_(mask.unsqueeze(-1))
    s = gate.to(dtype).sigmoid()
    g.mul_(s)
    dvalue = g * scale
    dgate = (dvalue * value).mul_(1 - s)
    db = g.mul_(value).sum((0, 1))
    return dgate.to(gate.dtype), dvalue.to(value.dtype), da.to(a.dtype), db.to(b.dtype), dh0


@torch_backward.register_fake
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dh0 = h.new_empty(dh_last.shape, dtype=accumulation_type(h) if h0 is None else h0.dtype)
    dgate, dvalue = gate.new_empty(gate.shape), value.new_empty(value.shape)
    return dgate, dvalue, a.new_empty(a.shape), b.new_empty(b.shape), dh0


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], *inputs)


def _differentiate(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, dh0 = torch_backward(dh, dh_last, *ctx.saved_tensors)
    return *gradients, dh0 if ctx.needs_input_grad[4] else None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def gated_scan_torch(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Torch's own operations, blocks of time side by side. See `gated_scan`."""
    return _forward(gate, value, a, b, h0, starts, mask)


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


_OP = Op(
    "gated_scan",
    {
        "naive": gated_scan_naive,
        "torch": gated_scan_torch,
        "triton": gated_scan_triton,
        "triton-sequential": functools.partial(gated_scan_triton, form="sequential"),
        "triton-chunked": functools.partial(gated_scan_triton, form="chunked"),
    },
    {"cuda": "triton", "default": "torch"},
    _check,
    only_on=dict.fromkeys(("triton", "triton-sequential", "triton-chunked"), "cuda"),
    fault=triton_runtime.fault,
)
