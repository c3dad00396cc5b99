"""The diagonal state space of S4D (Gu et al. 2022, arXiv 2206.11893): N modes for each channel.

    h_t = exp(Lambda) h_{t-1} + u_t                  (C, N) complex, Lambda too
    y_t = 2 Re(sum_n w_n h_{t,n}) + D u_t

How Lambda and w come of A, B, C and a time step is the layer's affair. Unrolled, y is a causal
convolution with the kernel K_c[l] = 2 Re(sum_n w_cn exp(Lambda_cn l)), plus D at l = 0. With
l = q S + s a power is one of the coarse exp(Lambda q S) times one of the fine exp(Lambda s): some
sqrt(T) of either make all T lags as products of matrices, and no (C, N, T) is ever formed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops.backends import Op
from pha.ops.long_convolution import long_convolution
from pha.ops.modes import (
    as_complex,
    carried_to_the_end,
    last_document,
    one_length,
    run_visible,
    step_by_step,
)
from pha.ops.precision import accumulation_type, narrow, wide
from pha.ops.shapes import require_shapes
from pha.ops.testing import random_numbers, relative_error


def diagonal_ssm(
    u: Tensor,
    Lambda_re: Tensor,
    Lambda_im: Tensor,
    w_re: Tensor,
    w_im: Tensor,
    D: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run the state space over time.

    Args:
        u: (B, T, C) inputs, any floating type.
        Lambda_re: (C, N) logarithms of what is left of each mode after a step, below 0.
        Lambda_im: (C, N) its angular frequency, radians per step. In float32 an angle is wrong
            after long lags: give float64, on the CPU where u is on MPS.
        w_re: (C, N) real part of w.
        w_im: (C, N) imaginary part of w.
        D: (C,) weights of the direct path.
        h0: (B, C, N, 2) real and imaginary parts of the state before the first step; zeros when
            absent.
        starts: (B, T) bool, true where a document begins: the state is reset before that step.
        mask: (B, T) bool, false where there is no step (padding): the state stays, and y is 0.
        last_state: whether the last state is wanted.

    Returns:
        y (B, T, C) in the type of `u`, and the last state (B, C, N, 2), or None if not wanted.
        Computed in float32 (float64 for float64 inputs), the type of the last state.

    Raises:
        PHAError: shapes that do not fit each other.
    """
    (B, T, C), N = u.shape, Lambda_re.shape[-1]
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "Lambda_re": (Lambda_re, (C, N)),
        "Lambda_im": (Lambda_im, (C, N)),
        "w_re": (w_re, (C, N)),
        "w_im": (w_im, (C, N)),
        "D": (D, (C,)),
        "h0": (h0, (B, C, N, 2)),
        "starts": (starts, (B, T)),
        "mask": (mask, (B, T)),
    }
    require_shapes("diagonal_ssm", "u", shapes)
    op, parameters = _OP(u.device.type), (Lambda_re, Lambda_im, w_re, w_im, D)
    return run_visible(
        lambda u, starts, count: op(u, *parameters, h0, starts, last_state, count), u, starts, mask
    )


def diagonal_ssm_naive(
    u: Tensor,
    Lambda_re: Tensor,
    Lambda_im: Tensor,
    w_re: Tensor,
    w_im: Tensor,
    D: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    last_state: bool = True,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The oracle: the recurrence as written, differentiated by autograd; also one decoding step.

    The state stays after the first `count` (B,) steps of each row.
    """
    dtype = accumulation_type(u)
    w = torch.complex(*(x.to(dtype).to(u.device) for x in (w_re, w_im)))
    decay = narrow(torch.complex(wide(Lambda_re), wide(Lambda_im)).exp(), w)
    return step_by_step(u, decay, 2 * w, D, h0, starts, last_state, count)


def diagonal_ssm_fft(
    u: Tensor,
    Lambda_re: Tensor,
    Lambda_im: Tensor,
    w_re: Tensor,
    w_im: Tensor,
    D: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    last_state: bool = True,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A long convolution; one token alone takes a step of the recurrence. See `diagonal_ssm`."""
    T = u.shape[1]
    one_length("diagonal_ssm", T)
    if T <= 1:
        return diagonal_ssm_naive(
            u, Lambda_re, Lambda_im, w_re, w_im, D, h0, starts, last_state, count
        )
    dtype = accumulation_type(u)
    Lambda = torch.complex(wide(Lambda_re), wide(Lambda_im))
    w = 2 * torch.complex(*(x.to(dtype).to(u.device) for x in (w_re, w_im)))
    S = math.isqrt(T - 1) + 1
    lags = torch.arange(S, device=Lambda.device)
    fine = narrow((Lambda.unsqueeze(-1) * lags).exp(), w)
    coarse = narrow((Lambda.unsqueeze(-1) * (S * lags[: -(-T // S)])).exp(), w)
    kernel = _real_products(w.unsqueeze(-1) * coarse, fine)[:, :T].T
    kernel = torch.cat([kernel[:1] + D.to(dtype), kernel[1:]])
    x = u.to(dtype)
    y, _ = long_convolution(x, kernel, starts=starts, last_state=False)
    if h0 is not None:
        weights = w * narrow(Lambda.exp(), w) * as_complex(h0, dtype)
        carried = _real_products(weights.unsqueeze(-1) * coarse, fine)[..., :T].mT
        if starts is not None:
            carried = carried.masked_fill(starts.cumsum(1).gt(0).unsqueeze(-1), 0.0)
        y = y + carried
    if not last_state:
        return y.to(u.dtype), None
    h = torch.view_as_real(_weighted_sums(last_document(x, starts, count), coarse, fine))
    if h0 is not None:
        h = h + carried_to_the_end(h0.to(dtype), Lambda, T, starts, count)
    return y.to(u.dtype), h


def _real_products(coarse: Tensor, fine: Tensor) -> Tensor:
    """Re(sum_n coarse_nq fine_ns) at q S + s: (..., C, Q S) of (..., C, N, Q) and (C, N, S)."""
    left = torch.cat([coarse.real, -coarse.imag], -2)
    return (left.mT @ torch.cat([fine.real, fine.imag], -2)).flatten(-2)


def _weighted_sums(x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    """sum_t exp(Lambda (T - 1 - t)) x_t, (B, C, N) complex, of x (B, T, C)."""
    (_, T, _), Q, S = x.shape, coarse.shape[-1], fine.shape[-1]
    back = F.pad(x.flip(1).mT, (0, Q * S - T)).unflatten(-1, (Q, S))
    within = back @ torch.cat([fine.real, fine.imag], -2).mT
    return (torch.complex(*within.chunk(2, -1)) * coarse.mT).sum(-2)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, uniform = random_numbers(device_type)
    B, T, C, N = 2, 37, 5, 3
    inputs = normal(B, T, C), -normal(C, N).exp(), *(normal(C, N) for _ in range(3)), normal(C)
    starts = uniform(B, T) < 0.1
    return relative_error(
        lambda *x: backend(*x, starts), lambda *x: oracle(*x, starts), *inputs, normal(B, C, N, 2)
    )


_OP = Op(
    "diagonal_ssm",
    {"naive": diagonal_ssm_naive, "fft": diagonal_ssm_fft},
    {"default": "fft"},
    _check,
    plain="fft",
)
