"""The linear recurrence of Eq. 2: h_t = a * h_{t-1} + u_t, with a diagonal and constant in time.

Backward in closed form, with dh the gradient of the outputs and g that of the states:
g_t = dh_t + a * g_{t+1},   du = g,   da = sum_t g_t * h_{t-1},   dh_0 = a * g_1.
Only h is saved. A document start at t replaces a by 0 for that step.

On the CPU the scan is compiled by numba and, as an operator of torch (`torch.ops.pha.scan`), goes
into a graph of torch.compile whole.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pha.ops import numba_runtime, triton_runtime, triton_scan
from pha.ops.backends import Op
from pha.ops.precision import accumulation_type
from pha.ops.testing import relative_error


def scan(
    u: Tensor, a: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run h_t = a * h_{t-1} + u_t over time.

    Args:
        u: (B, T, n) inputs, any floating type.
        a: (n,) decays in (0, 1).
        h0: (B, n) state before the first step; zeros when absent.
        starts: (B, T) bool, true where a document begins: the state is reset before that step.

    Returns:
        h (B, T, n) in the type of `u`, and the last state (B, n). States are accumulated in
        float32 (float64 for float64 inputs), the type of the last state.
    """
    return _OP(u.device.type)(u, a, h0, starts)


def scan_naive(
    u: Tensor, a: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle: Eq. 2 as written, differentiated by autograd."""
    dtype = accumulation_type(u)
    h = u.new_zeros(u.shape[0], u.shape[2], dtype=dtype) if h0 is None else h0.to(dtype)
    states = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None], 0.0, h)
        h = a.to(dtype) * h + u[:, t].to(dtype)
        states.append(h)
    return torch.stack(states, dim=1).to(u.dtype), h


def _kept(starts: Tensor | None, dtype: torch.dtype) -> dict[int, Tensor]:
    """For each step at which some sequence is reset: (B, 1), 0 where it is and 1 elsewhere."""
    if starts is None:
        return {}
    steps = starts.any(0).nonzero().flatten().tolist()
    return {t: (~starts[:, t, None]).to(dtype) for t in steps}


def _loop_forward(
    u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_type(u)
    decay = a.to(dtype)
    h = torch.empty_like(u, memory_format=torch.contiguous_format)
    state = u.new_zeros(u.shape[0], u.shape[2], dtype=dtype) if h0 is None else h0.to(dtype)
    keep = _kept(starts, dtype)
    # Unbinding once gives the T slices as views without T indexing calls.
    in_place = u.dtype == dtype
    for t, (u_t, h_t) in enumerate(zip(u.unbind(1), h.unbind(1), strict=True)):
        if t in keep:
            state = state * keep[t]
        if in_place:
            state = torch.addcmul(u_t, decay, state, out=h_t)
        else:
            state = torch.addcmul(u_t.to(dtype), decay, state)
            h_t.copy_(state)
    return h, state.clone()


def loop_backward(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    a: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """du, da and dh0 (of zeros when h0 is absent), by a loop over time."""
    dtype = accumulation_type(h)
    decay = a.to(dtype)
    du = torch.empty_like(h)
    keep = _kept(starts, dtype)
    h_steps, dh_steps, du_steps = h.unbind(1), dh.unbind(1), du.unbind(1)
    da = torch.zeros_like(dh_last, dtype=dtype)
    carry = dh_last.to(dtype)
    in_place = h.dtype == dtype
    for t in range(h.shape[1] - 1, -1, -1):
        if in_place:
            g = torch.add(dh_steps[t], carry, out=du_steps[t])
        else:
            g = dh_steps[t].to(dtype) + carry
            du_steps[t].copy_(g)
        kept = g * keep[t] if t in keep else g
        if t > 0:
            da.addcmul_(kept, h_steps[t - 1])
        elif h0 is not None:
            da.addcmul_(kept, h0.to(dtype))
        carry = kept * decay
    return du, da.sum(0).to(a.dtype), carry.to(dtype if h0 is None else h0.dtype)


class _LoopScan(torch.autograd.Function):
    """A loop over time of fused multiply-adds on (B, n) slices, in both directions."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, h_last = _loop_forward(u, a, h0, starts)
        ctx.save_for_backward(h, a, h0, starts)
        return h, h_last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor | None, ...]:
        du, da, dh0 = loop_backward(dh, dh_last, *ctx.saved_tensors)
        return du, da, dh0 if ctx.needs_input_grad[2] else None, None


def scan_loop(
    u: Tensor, a: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Closed-form backward; saves only h. See `scan`."""
    return _LoopScan.apply(u, a, h0, starts)


@torch.library.custom_op(
    "pha::scan",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor u, Tensor a, Tensor? h0, Tensor? starts) -> (Tensor, Tensor)",
)
def _compiled_forward(
    u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    kernel = numba_runtime.kernel("scan_forward", u.dtype)
    if kernel is None:
        return _loop_forward(u, a, h0, starts)
    h, h_last = _outputs(u, a, h0, starts)
    flat, dtype = numba_runtime.flat, h_last.dtype
    numba_runtime.run(
        kernel,
        u.shape,
        *numba_runtime.strided(u),
        flat(a, dtype),
        flat(h0, dtype),
        numba_runtime.flags(starts),
        flat(h, h.dtype),
        flat(h_last, dtype),
    )
    return h, h_last


@_compiled_forward.register_fake
def _outputs(
    u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    h = torch.empty_like(u, memory_format=torch.contiguous_format)
    return h, u.new_empty(u.shape[0], u.shape[2], dtype=accumulation_type(u))


@torch.library.custom_op(
    "pha::scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dh, Tensor dh_last, Tensor h, Tensor a, Tensor? h0, Tensor? starts) "
    "-> (Tensor, Tensor, Tensor)",
)
def _compiled_backward(
    dh: Tensor, dh_last: Tensor, h: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = numba_runtime.kernel("scan_backward", h.dtype)
    if kernel is None:
        return loop_backward(dh, dh_last, h, a, h0, starts)
    dtype = accumulation_type(h)
    du = torch.empty_like(h)
    da, dh0 = (dh_last.new_empty(dh_last.shape, dtype=dtype) for _ in range(2))
    flat = numba_runtime.flat
    numba_runtime.run(
        kernel,
        h.shape,
        *numba_runtime.strided(dh),
        flat(dh_last, dtype),
        flat(h, h.dtype),
        flat(a, dtype),
        flat(h0, dtype),
        numba_runtime.flags(starts),
        *(flat(x, x.dtype) for x in (du, da, dh0)),
    )
    return du, da.sum(0).to(a.dtype), dh0 if h0 is None else dh0.to(h0.dtype)


@_compiled_backward.register_fake
def _gradients(
    dh: Tensor, dh_last: Tensor, h: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_type(h) if h0 is None else h0.dtype
    return torch.empty_like(h), a.new_empty(a.shape), dh_last.new_empty(dh_last.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, a, h0, starts = inputs
    ctx.save_for_backward(output[0], a, h0, starts)


def _differentiate(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor | None, ...]:
    du, da, dh0 = _compiled_backward(dh, dh_last, *ctx.saved_tensors)
    return du, da, dh0 if ctx.needs_input_grad[2] else None, None


_compiled_forward.register_autograd(_differentiate, setup_context=_save)


def scan_numba(
    u: Tensor, a: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of states in compiled loops, on several threads, on the CPU. See `scan`.

    float16 is computed in float32 and rounded at the end. Where numba fails the loop takes over,
    with a warning. One token alone takes a step of the equation: calling an operator costs more.
    """
    if u.shape[1] == 1:
        return scan_naive(u, a, h0, starts)
    if u.dtype == torch.float16:
        h, h_last = scan_numba(u.float(), a, h0, starts)
        return h.half(), h_last
    return _compiled_forward(u, a, h0, starts)


@torch.library.custom_op(
    "pha::scan_triton",
    mutates_args=(),
    schema="(Tensor u, Tensor a, Tensor? h0, Tensor? starts, str form) -> (Tensor, Tensor)",
)
def _triton_forward(
    u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None, form: str
) -> tuple[Tensor, Tensor]:
    if triton_runtime.usable(u.device):
        return triton_scan.scan_forward(None, u, a, None, h0, starts, None, form)
    return _loop_forward(u, a, h0, starts)


@_triton_forward.register_fake
def _triton_outputs(
    u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None, form: str
) -> tuple[Tensor, Tensor]:
    return triton_scan.forward_outputs(None, u, a, None, h0, starts, None, form)


@torch.library.custom_op(
    "pha::scan_triton_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor dh_last, Tensor h, Tensor a, Tensor? h0, Tensor? starts, "
    "str form) -> (Tensor, Tensor, Tensor)",
)
def _triton_backward(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    a: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if not triton_runtime.usable(h.device):
        return loop_backward(dh, dh_last, h, a, h0, starts)
    # Without a gate the kernel does not read its input.
    _, du, da, _, dh0 = triton_scan.scan_backward(
        dh, dh_last, h, None, h, a, None, h0, starts, None, form
    )
    return du, da, dh0


@_triton_backward.register_fake
def _triton_gradients(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    a: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(dh, dh_last, h, a, h0, starts)


def _save_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, a, h0, starts, ctx.form = inputs
    ctx.save_for_backward(output[0], a, h0, starts)


def _differentiate_triton(ctx: Any, dh: Tensor, dh_last: Tensor) -> tuple[Tensor | None, ...]:
    du, da, dh0 = _triton_backward(dh, dh_last, *ctx.saved_tensors, ctx.form)
    return du, da, dh0 if ctx.needs_input_grad[2] else None, None, None


_triton_forward.register_autograd(_differentiate_triton, setup_context=_save_triton)


def scan_triton(
    u: Tensor,
    a: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Triton's kernels, on a GPU. See `scan` and, for `form`, `triton_scan.chunk_length`.

    Where Triton fails, or its first use finds it wrong, torch takes over, with a warning.
    """
    return _triton_forward(u, a, h0, starts, form)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2, 37, 19, generator=generator).to(device_type)
    a = torch.rand(19, generator=generator).to(device_type)
    h0 = torch.randn(2, 19, generator=generator).to(device_type)
    starts = (torch.rand(2, 37, generator=generator) < 0.1).to(device_type)
    return relative_error(lambda *x: backend(*x, starts), lambda *x: oracle(*x, starts), u, a, h0)


def _fault(backend: str, device_type: str) -> str | None:
    if backend == "numba":
        return numba_runtime.fault("numba_scan")
    return triton_runtime.fault(backend, device_type)


_OP = Op(
    "scan",
    {
        "naive": scan_naive,
        "loop": scan_loop,
        "numba": scan_numba,
        "triton": scan_triton,
        "triton-sequential": functools.partial(scan_triton, form="sequential"),
        "triton-chunked": functools.partial(scan_triton, form="chunked"),
    },
    {"cpu": "numba", "cuda": "triton", "default": "loop"},
    _check,
    only_on={
        "numba": "cpu",
        "triton": "cuda",
        "triton-sequential": "cuda",
        "triton-chunked": "cuda",
    },
    fault=_fault,
    plain="loop",
)
