"""The selective state space of Mamba: N states a channel, whose step and input are of the input.

    h_t = exp(dt_t A) * h_{t-1} + dt_t x_t B_t        (C, N): dt_t and x_t by channel, B_t by state
    y_t = h_t C_t                                     C_t by state

The states of all steps, N times the size of x, are never kept: those of every so many steps are,
and the others are computed again in the backward pass. That is in closed form, with w = dt x, dy
the gradient of the outputs and g that of the states:

    g_t = dy_t C_t + a_{t+1} g_{t+1},   dC_t = sum_c dy_t h_t,   dB_t = sum_c w_t g_t,
    dw_t = sum_n g_t B_t,   d(dt_t A) = g_t a_t h_{t-1}.

A document start at t replaces a_t = exp(dt_t A) by 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pha.ops.backends import Op
from pha.ops.precision import accumulation_type
from pha.ops.recurrence import recur_
from pha.ops.shapes import require_shapes
from pha.ops.testing import random_numbers, relative_error

SHORTEST = 16  # steps of a chunk at least: of so many the last state is kept
NUMBERS = 2**19  # states of a chunk: as many as a cache holds, where that are more steps


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run the state space over time.

    Args:
        x: (b, T, c) inputs, any floating type.
        dt: (b, T, c) time steps, positive.
        A: (c, N) rates, negative.
        B: (b, T, N) weights of the input.
        C: (b, T, N) weights of the output.
        h0: (b, c, N) state before the first step; zeros when absent.
        starts: (b, T) bool, true where a document begins: the state is reset before that step.
        mask: (b, T) bool, false where there is no step (padding): the state stays, and y is 0.
        last_state: whether the last state is wanted.

    Returns:
        y (b, T, c) in the type of `x`, and the last state (b, c, N), or None if not wanted.
        Computed in float32 (float64 for float64 inputs), the type of the last state.

    Raises:
        PHAError: shapes that do not fit each other.
    """
    (b, T, c), N = x.shape, A.shape[-1]
    shapes = {"dt": (dt, (b, T, c)), "A": (A, (c, N)), "B": (B, (b, T, N)), "C": (C, (b, T, N))}
    flags = {"h0": (h0, (b, c, N)), "starts": (starts, (b, T)), "mask": (mask, (b, T))}
    require_shapes("selective_scan", "x", shapes | flags)
    there = None if mask is None else mask.unsqueeze(-1)
    if there is not None:  # a step of no time changes nothing
        x, dt = torch.where(there, x, 0), torch.where(there, dt, 0)
    scan = selective_scan_naive if T <= 1 else _OP(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        y, last = scan(x, dt, A, B, C, h0, starts)
    return y if there is None else torch.where(there, y, 0), last if last_state else None


def selective_scan_naive(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle: one step after the other, differentiated by autograd."""
    wide = accumulation_type(x)
    outputs, (x_, dt_, A_, B_, C_) = [], (v.to(wide) for v in (x, dt, A, B, C))
    h = x_.new_zeros(len(x), *A.shape) if h0 is None else h0.to(wide)
    for t in range(x.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], 0.0, h)
        a = (dt_[:, t, :, None] * A_).exp()
        h = a * h + (dt_[:, t] * x_[:, t]).unsqueeze(-1) * B_[:, t, None]
        outputs.append((h * C_[:, t, None]).sum(-1))
    return (torch.stack(outputs, dim=1) if outputs else x).to(x.dtype), h


def _states(
    w: Tensor, dt: Tensor, A: Tensor, B: Tensor, starts: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays and states of some steps, (b, t, c, N) each, from the state h before them."""
    a = (dt.unsqueeze(-1) * A).exp_()
    if starts is not None:
        a.masked_fill_(starts[..., None, None], 0.0)
    states = w.unsqueeze(-1) * B.unsqueeze(2)
    states[:, 0].addcmul_(a[:, 0], h)
    recur_(states, a)
    return a, states


def _chunks(T: int, A: Tensor, batch: int) -> list[slice]:
    size = max(SHORTEST, NUMBERS // max(1, batch * A.numel()))
    return [slice(begin, begin + size) for begin in range(0, T, size)]


def _first(h0: Tensor | None, A: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    return A.new_zeros(batch, *A.shape, dtype=dtype) if h0 is None else h0.to(dtype)


# An operator, since a graph of torch.compile would hold every chunk.
@torch.library.custom_op("pha::selective_scan", mutates_args=())
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states before all chunks but the first, (b, chunks - 1, c, N)."""
    dtype, chunks = accumulation_type(x), _chunks(x.shape[1], A, len(x))
    h = _first(h0, A, len(x), dtype)
    A, y, kept = A.to(dtype), x.new_empty(x.shape), []
    for at in chunks:
        kept.append(h)
        dt_, flags = dt[:, at].to(dtype), None if starts is None else starts[:, at]
        _, states = _states(dt_ * x[:, at], dt_, A, B[:, at].to(dtype), flags, h)
        y[:, at] = (states @ C[:, at].to(dtype).unsqueeze(-1)).squeeze(-1)
        h = states[:, -1].clone()
    return y, h, torch.stack(kept, 1)[:, 1:].clone()


@torch.library.custom_op("pha::selective_scan_backward", mutates_args=())
def _gradients(
    dy: Tensor,
    dh: Tensor,
    kept: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, ddt, dA, dB, dC and dh0 (that of zeros without h0)."""
    dtype, chunks = accumulation_type(x), _chunks(x.shape[1], A, len(x))
    before = [_first(h0, A, len(x), dtype), *kept.unbind(1)]
    dx, ddt, dB, dC = (
        torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, B, C)
    )
    A_, dA = A.to(dtype), torch.zeros_like(A, dtype=dtype)
    for at, h in zip(reversed(chunks), reversed(before), strict=True):
        x_, dt_, B_, C_, dy_ = (v[:, at].to(dtype) for v in (x, dt, B, C, dy))
        w = dt_ * x_
        a, states = _states(w, dt_, A_, B_, None if starts is None else starts[:, at], h)
        g = dy_.unsqueeze(-1) * C_.unsqueeze(2)
        g[:, -1] += dh
        recur_(g, a, back=True)
        dh = a[:, 0] * g[:, 0]
        dC[:, at] = (dy_.unsqueeze(2) @ states).squeeze(2)
        dB[:, at] = (w.unsqueeze(2) @ g).squeeze(2)
        dw = (g @ B_.unsqueeze(-1)).squeeze(-1)
        exponent = a.mul_(g)  # its gradient, once the state before each step has come in
        exponent[:, 1:] *= states[:, :-1]
        exponent[:, 0] *= h
        dA += torch.einsum("btcn,btc->cn", exponent, dt_)
        dx[:, at] = dw * dt_
        ddt[:, at] = dw * x_ + torch.einsum("btcn,cn->btc", exponent, A_)
    return dx, ddt, dA.to(A.dtype), dB, dC, dh.to(dtype if h0 is None else h0.dtype, copy=True)


@_scan.register_fake
def _outputs(x: Tensor, dt: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    last = x.new_empty(x.shape[0], *A.shape, dtype=accumulation_type(x))
    chunks = len(_chunks(x.shape[1], A, x.shape[0]))
    return x.new_empty(x.shape), last, last.new_empty(x.shape[0], chunks - 1, *A.shape)


@_gradients.register_fake
def _inputs(
    dy: Tensor, dh: Tensor, kept: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, A, B, C = (v.new_empty(v.shape) for v in inputs[:5])
    h0 = inputs[5]
    return x, dt, A, B, C, dh.new_empty(dh.shape, dtype=dh.dtype if h0 is None else h0.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], *inputs)
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, dy: Tensor, dh: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, dh0 = _gradients(dy, dh, *ctx.saved_tensors)
    return *gradients, dh0 if ctx.needs_input_grad[5] else None, None


_scan.register_autograd(_differentiate, setup_context=_save)


def selective_scan_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunks of time, in each of which blocks are computed side by side. See `selective_scan`."""
    y, last, _ = _scan(x, dt, A, B, C, h0, starts)
    return y, last


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, uniform = random_numbers(device_type)
    sequences = normal(2, 37, 19), normal(2, 37, 19).sigmoid(), -normal(19, 5).exp()
    inputs = *sequences, normal(2, 37, 5), normal(2, 37, 5), normal(2, 19, 5)
    starts = uniform(2, 37) < 0.1
    return relative_error(lambda *x: backend(*x, starts), lambda *x: oracle(*x, starts), *inputs)


_OP = Op(
    "selective_scan",
    {"naive": selective_scan_naive, "torch": selective_scan_chunked},
    {"default": "torch"},
    _check,
    limits={"torch": "naive for one step"},
)
