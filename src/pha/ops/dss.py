"""The diagonal state space of Mehta et al. (2022), "simplified DSS": N modes shared by H channels.

Every channel h of the input drives N complex modes, which all channels share:

    h_t = exp(Lambda) h_{t-1} + v_t                 (H, N) complex, one state per channel and mode
    y_t = Re(sum_n C~_n h_{t,n}) + D v_t            C~ = C (exp(Lambda) - 1) / Lambda

with Lambda = -exp(Lambda_re) + i exp(Lambda_im). Unrolled, y is a causal convolution with the
kernel K_h[l] = Re(sum_n C~_hn exp(Lambda_n l)), plus D at l = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
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
from pha.ops.testing import random_numbers, relative_error


def dss(
    v: Tensor,
    Lambda_re: Tensor,
    Lambda_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run the state space over time.

    Args:
        v: (B, T, H) inputs, any floating type.
        Lambda_re: (N,) logarithms of the modes' decay rates, per step.
        Lambda_im: (N,) logarithms of their angular frequencies, in radians per step.
        C_re: (H, N) real part of C.
        C_im: (H, N) imaginary part of C.
        D: (H,) weights of the direct path.
        h0: (B, H, N, 2) real and imaginary parts of the state before the first step; zeros when
            absent.
        starts: (B, T) bool, true where a document begins: the state is reset before that step.
        mask: (B, T) bool, false where there is no step (padding): the state stays, and y is 0.
        last_state: whether the last state is wanted. It costs as much as a matrix product.

    Returns:
        y (B, T, H) in the type of `v`, and the last state (B, H, N, 2), or None if not wanted.
        Computed in float32 (float64 for float64 inputs), the type of the last state.
    """
    op, parameters = _OP(v.device.type), (Lambda_re, Lambda_im, C_re, C_im, D)
    return run_visible(
        lambda v, starts, count: op(v, *parameters, h0, starts, last_state, count), v, starts, mask
    )


def dss_naive(
    v: Tensor,
    Lambda_re: Tensor,
    Lambda_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    last_state: bool = True,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The oracle: the recurrence as written, differentiated by autograd; also one decoding step.

    The state stays after the first `count` (B,) steps of each row.
    """
    Lambda, C = _modes(Lambda_re, Lambda_im, C_re, C_im, accumulation_type(v))
    decay = narrow(Lambda.exp(), C)
    return step_by_step(v, decay, C, D, h0, starts, last_state, count)


def _modes(
    Lambda_re: Tensor, Lambda_im: Tensor, C_re: Tensor, C_im: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Lambda (N,) complex128 and C~ (H, N) complex, in the complex type of `dtype`.

    What there is N of is computed in float64: a float32 angle would be wrong after long lags, and
    exp(Lambda) - 1 for slow modes. It is on the CPU where `C_re` is on MPS.
    """
    Lambda = torch.complex(-wide(Lambda_re).exp(), wide(Lambda_im).exp())
    input_scale = Lambda.expm1() / Lambda
    C = torch.complex(C_re.to(dtype), C_im.to(dtype))
    return Lambda, C * narrow(input_scale, C)


def _powers(Lambda: Tensor, T: int, C: Tensor) -> Tensor:
    """exp(Lambda l) for l = 0..T-1: (T, N) in the complex type of C, and where that is.

    Each is the product of a coarse and a fine power, so that there are 2 sqrt(T) N exponentials.
    """
    step = math.isqrt(T - 1) + 1
    count = torch.arange(step, device=Lambda.device).unsqueeze(-1)
    fine = narrow((Lambda * count).exp(), C)
    coarse = narrow((Lambda * step * count).exp(), C)
    return (coarse.unsqueeze(1) * fine).flatten(0, 1)[:T]


def _real(z: Tensor) -> Tensor:
    """(..., N) complex as (..., 2 N) real: parts in turn."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def _from_state(h0: Tensor, C: Tensor, Lambda: Tensor, modes: Tensor) -> Tensor:
    """What the state before the first step adds to y: Re(C~ exp(Lambda (t + 1)) h0), (B, T, H)."""
    weights = C * narrow(Lambda.exp(), C) * as_complex(h0, modes.dtype)
    return (_real(weights.conj()) @ modes.T).transpose(1, 2)


def _last_state(
    v_BTH: Tensor,
    h0: Tensor | None,
    Lambda: Tensor,
    modes: Tensor,
    starts: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    """exp(Lambda T) h0 + sum_t exp(Lambda (T - 1 - t)) v_t over the last document of each row.

    Of the first `count` (B,) steps only, where that is given.
    """
    B, T, H = v_BTH.shape
    v_BTH = last_document(v_BTH, starts, count)
    h = (v_BTH.transpose(1, 2) @ modes.flip(0)).view(B, H, -1, 2)
    if h0 is None:
        return h
    return h + carried_to_the_end(h0.to(modes.dtype), Lambda, T, starts, count)


def dss_fft(
    v: Tensor,
    Lambda_re: Tensor,
    Lambda_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    last_state: bool = True,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolution by FFT; one token alone takes a step of the recurrence. See `dss`.

    The state h0 and the last state enter by matrix products with exp(Lambda l); no state is formed
    for the steps between.
    """
    T = v.shape[1]
    one_length("dss", T)
    if T <= 1:
        return dss_naive(v, Lambda_re, Lambda_im, C_re, C_im, D, h0, starts, last_state, count)
    dtype = accumulation_type(v)
    Lambda, C = _modes(Lambda_re, Lambda_im, C_re, C_im, dtype)
    # Re(C~ p) is a product of real vectors, conj(C~) and p: half the work of complex ones.
    modes = _real(_powers(Lambda, T, C))
    kernel = modes @ _real(C.conj()).T
    kernel = torch.cat([kernel[:1] + D.to(dtype), kernel[1:]])
    x = v.to(dtype)
    y, _ = long_convolution(x, kernel, starts=starts, last_state=False)
    if h0 is not None:
        carried = _from_state(h0, C, Lambda, modes)
        if starts is not None:
            carried = carried.masked_fill(starts.cumsum(1).gt(0).unsqueeze(-1), 0.0)
        y = y + carried
    h_last = _last_state(x, h0, Lambda, modes, starts, count) if last_state else None
    return y.to(v.dtype), h_last


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, uniform = random_numbers(device_type)
    B, T, H, N = 2, 37, 5, 7
    inputs = normal(B, T, H), normal(N) - 1, normal(N), normal(H, N), normal(H, N), normal(H)
    starts = uniform(B, T) < 0.1
    return relative_error(
        lambda *x: backend(*x, starts), lambda *x: oracle(*x, starts), *inputs, normal(B, H, N, 2)
    )


_OP = Op("dss", {"naive": dss_naive, "fft": dss_fft}, {"default": "fft"}, _check, plain="fft")
