"""A linear recurrence whose decay comes from the input: h_t = a_t * h_{t-1} + u_t, elementwise.

Backward in closed form, with dh the gradient of the outputs and g that of the states:

    g_t = dh_t + a_{t+1} * g_{t+1},   du = g,   da_t = g_t * h_{t-1},   dh_0 = a_1 * g_1.

Saved are a and h. A document start at t replaces a_t by 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pha.ops.backends import OPS, Op
from pha.ops.pieces import Pieces
from pha.ops.precision import accumulation_type
from pha.ops.recurrence import recur_
from pha.ops.shapes import require_shapes
from pha.ops.testing import random_numbers, relative_error


def linear_scan(
    u: Tensor,
    a: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    last_state: bool = True,
    pieces: Pieces | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run h_t = a_t * h_{t-1} + u_t over time.

    Args:
        u: (B, T, n) inputs, any floating type.
        a: (B, T, n) decays, at most 1 in magnitude, any floating type; near 1 half precision is
            too coarse for them.
        h0: (B, n) state before the first step; zeros when absent.
        starts: (B, T) bool, true where a document begins: the state is reset before that step.
        mask: (B, T) bool, false where there is no step (padding): the state stays, and h is 0.
        last_state: whether the last state is wanted.
        pieces: where the rest of the sequence is, if these are the steps of one piece of it; then
            there is no h0, no mask and no last state.

    Returns:
        h (B, T, n) in the type of `u`, and the last state (B, n), or None if not wanted.
        States are accumulated in float32 (float64 for float64 inputs), the type of the last state.

    Raises:
        PHAError: shapes that do not fit each other.
    """
    B, T, n = u.shape
    shapes = {"a": (a, (B, T, n)), "h0": (h0, (B, n))}
    flags = {"starts": (starts, (B, T)), "mask": (mask, (B, T))}
    require_shapes("linear_scan", "u", shapes | flags)
    if T == 0:
        none = u.new_zeros(B, n, dtype=accumulation_type(u)) if h0 is None else h0.clone()
        return u, none if last_state else None
    there = None if mask is None else mask.unsqueeze(-1)
    if there is not None:  # a step that changes nothing is no step
        u, a = torch.where(there, u, 0), torch.where(there, a, 1)
    scan = linear_scan_naive if T == 1 else _OP(u.device.type)
    h, last = scan(u, a, h0, starts)
    if pieces is not None:
        kept = a.to(last.dtype).prod(1)
        if starts is not None:
            kept = kept * ~starts.any(1, keepdim=True)

        def decayed(a: Tensor, state: Tensor) -> Tensor:
            added = a.to(state.dtype).cumprod(1) * state.unsqueeze(1)
            return added if starts is None else added * (starts.cumsum(1) == 0).unsqueeze(-1)

        state = pieces.entering(last, kept)
        return h + pieces.computed_again(decayed, a, state).to(h.dtype), None
    return h if there is None else torch.where(there, h, 0), last if last_state else None


def linear_scan_naive(
    u: Tensor, a: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle: one step after the other, differentiated by autograd."""
    dtype = accumulation_type(u)
    h = u.new_zeros(u.shape[0], u.shape[2], dtype=dtype) if h0 is None else h0.to(dtype)
    states = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None], 0.0, h)
        h = a[:, t].to(dtype) * h + u[:, t].to(dtype)
        states.append(h)
    return torch.stack(states, dim=1).to(u.dtype), h.clone()


def torch_forward(
    u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in torch's own operations."""
    dtype = accumulation_type(u)
    h, decay = u.to(dtype, copy=True, memory_format=torch.contiguous_format), a.to(dtype)
    kept = None if starts is None else (~starts).to(dtype)
    if h0 is not None:
        first = decay[:, 0] * h0
        h[:, 0] += first if kept is None else first * kept[:, :1]
    recur_(h, decay, kept)
    last = h[:, -1].clone()
    return h.to(u.dtype), last


def torch_backward(
    dh: Tensor, dh_last: Tensor, h: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """du, da and dh0 (that of zeros without h0)."""
    dtype = accumulation_type(h)
    g, decay = dh.to(dtype, copy=True, memory_format=torch.contiguous_format), a.to(dtype)
    g[:, -1] += dh_last
    kept = None if starts is None else (~starts).to(dtype)
    recur_(g, decay, kept, back=True)
    into = g if kept is None else g * kept.unsqueeze(-1)  # what reaches the state before
    before = torch.zeros_like(g[:, :1]) if h0 is None else h0.to(dtype).unsqueeze(1)
    da = into * torch.cat([before, h[:, :-1].to(dtype)], 1)
    dh0 = (into[:, 0] * decay[:, 0]).to(dtype if h0 is None else h0.dtype)
    return g.to(h.dtype), da.to(a.dtype), dh0


# An operator, since a graph of torch.compile would hold every block of time.
@torch.library.custom_op("pha::linear_scan", mutates_args=())
def linear_scan_operator(
    u: Tensor,
    a: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    form: str = "torch",
) -> tuple[Tensor, Tensor]:
    """See `linear_scan`. `form` is "torch" or, for Triton, one that `chunk_length` knows."""
    if OPS["linear_scan"].by_triton(form, u):
        return OPS["linear_scan"].kernels["forward"](u, a, h0, starts, form)
    return torch_forward(u, a, h0, starts)


@torch.library.custom_op("pha::linear_scan_backward", mutates_args=())
def _backward(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    a: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if OPS["linear_scan"].by_triton(form, h):
        return OPS["linear_scan"].kernels["backward"](dh, dh_last, h, a, h0, starts, form)
    return torch_backward(dh, dh_last, h, a, h0, starts)


@linear_scan_operator.register_fake
def _outputs(u: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    last = u.new_empty(u.shape[0], u.shape[2], dtype=accumulation_type(u))
    return u.new_empty(u.shape), last


@_backward.register_fake
def _inputs(
    dh: Tensor, dh_last: Tensor, h: Tensor, a: Tensor, h0: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dh0 = dh_last.new_empty(dh_last.shape, dtype=dh_last.dtype if h0 is None else h0.dtype)
    return h.new_empty(h.shape), a.new_empty(a.shape), dh0


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, *tensors, ctx.form = inputs
    ctx.save_for_backward(output[0], *tensors)


def _differentiate(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor | None, ...]:
    h, a, h0, starts = ctx.saved_tensors
    du, da, dh0 = _backward(dh, dh_last, h, a, h0, starts, ctx.form)
    return du, da, None if h0 is None else dh0, None, None


linear_scan_operator.register_autograd(_differentiate, setup_context=_save)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, uniform = random_numbers(device_type)
    inputs = normal(2, 37, 19), normal(2, 37, 19).sigmoid(), normal(2, 19)
    starts = uniform(2, 37) < 0.1
    return relative_error(lambda *x: backend(*x, starts), lambda *x: oracle(*x, starts), *inputs)


_OP = Op(
    "linear_scan",
    {"naive": linear_scan_naive, "torch": linear_scan_operator},
    {"default": "torch"},
    _check,
    limits={"torch": "naive for one step"},
)
