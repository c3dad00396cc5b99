"""The diagonal state space of Mehta et al. (2022), "simplified DSS": N modes shared by H channels.

Every channel h of the input drives N complex modes, which all channels share:

    h_t = exp(Lambda) h_{t-1} + v_t                 (H, N) complex, one state per channel and mode
    y_t = Re(sum_n C~_n h_{t,n}) + D v_t            C~ = C (exp(Lambda) - 1) / Lambda

with Lambda = -exp(Lambda_re) + i exp(Lambda_im). Unrolled, y is a causal convolution with the
kernel K_h[l] = Re(sum_n C~_hn exp(Lambda_n l)), plus D at l = 0.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pha.ops.backends import Op
from pha.ops.precision import accumulation_type
from pha.ops.testing import relative_error
from pha.ops.visible import VisibleFirst
from pha.utils.errors import PHAError


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
    run, parameters = _OP(v.device.type), (Lambda_re, Lambda_im, C_re, C_im, D)
    with torch.autocast(v.device.type, enabled=False):
        if mask is None:
            return run(v, *parameters, h0, starts, last_state)
        visible = VisibleFirst(mask)
        front = None if starts is None else visible.front_starts(starts)
        y, last = run(visible.front(v), *parameters, h0, front, last_state, visible.count)
        if last is not None and starts is not None:
            last = last.masked_fill(visible.ends_empty(starts).view(-1, 1, 1, 1), 0.0)
        return visible.back(y), last


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
    dtype = accumulation_type(v)
    Lambda, C = _modes(Lambda_re, Lambda_im, C_re, C_im, dtype)
    decay = Lambda.exp().to(C.dtype)
    if h0 is None:
        h = C.new_zeros(v.shape[0], *C.shape)
    else:
        h = torch.view_as_complex(h0.to(dtype).contiguous())
    outputs = []
    for t in range(v.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], 0.0, h)
        v_t = v[:, t].to(dtype)
        step = decay * h + v_t.unsqueeze(-1)
        h = step if count is None else torch.where((t < count).view(-1, 1, 1), step, h)
        outputs.append((C * h).sum(-1).real + D.to(dtype) * v_t)
    return torch.stack(outputs, dim=1).to(v.dtype), torch.view_as_real(h) if last_state else None


def _modes(
    Lambda_re: Tensor, Lambda_im: Tensor, C_re: Tensor, C_im: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Lambda (N,) complex128 and C~ (H, N) complex, in the complex type of `dtype`.

    What there is N of is computed in float64: a float32 angle would be wrong after long lags, and
    exp(Lambda) - 1 for slow modes.
    """
    Lambda = torch.complex(-Lambda_re.double().exp(), Lambda_im.double().exp())
    input_scale = Lambda.expm1() / Lambda
    C = torch.complex(C_re.to(dtype), C_im.to(dtype))
    return Lambda, C * input_scale.to(C.dtype)


def _powers(Lambda: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """exp(Lambda l) for l = 0..T-1: (T, N) in the complex type `dtype`.

    Each is the product of a coarse and a fine power, so that there are 2 sqrt(T) N exponentials.
    """
    step = math.isqrt(T - 1) + 1
    count = torch.arange(step, device=Lambda.device).unsqueeze(-1)
    fine = (Lambda * count).exp().to(dtype)
    coarse = (Lambda * step * count).exp().to(dtype)
    return (coarse.unsqueeze(1) * fine).flatten(0, 1)[:T]


def _real(z: Tensor) -> Tensor:
    """(..., N) complex as (..., 2 N) real: parts in turn."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def _fft_length(T: int) -> int:
    """A length of at least 2 T - 1 that splits into factors of 2 and at most one 3 or 5."""
    least = 2 * T - 1
    return min(odd << ((least - 1) // odd).bit_length() for odd in (1, 3, 5))


def _convolution(v_BTH: Tensor, K_TH: Tensor) -> Tensor:
    """y_t = sum_{l <= t} K[l] v_{t-l} by real FFTs."""
    T = v_BTH.shape[1]
    n = _fft_length(T)
    v_f, K_f = torch.fft.rfft(v_BTH, n, dim=1), torch.fft.rfft(K_TH, n, dim=0)
    return torch.fft.irfft(v_f * K_f, n, dim=1)[:, :T]


def _convolution_gradients(dy_BTH: Tensor, v_BTH: Tensor, K_TH: Tensor) -> tuple[Tensor, Tensor]:
    """dv is the correlation of dy with K, dK that of dy with v, summed over the batch."""
    T = v_BTH.shape[1]
    n = _fft_length(T)
    dy_f = torch.fft.rfft(dy_BTH, n, dim=1)
    v_f, K_f = torch.fft.rfft(v_BTH, n, dim=1), torch.fft.rfft(K_TH, n, dim=0)
    dv = torch.fft.irfft(dy_f * K_f.conj(), n, dim=1)[:, :T]
    return dv, torch.fft.irfft((dy_f * v_f.conj()).sum(0), n, dim=0)[:T]


def _documents(starts: Tensor) -> list[list[tuple[int, int]]]:
    """(place in the flattened batch, length) of every document, those of similar length together.

    A group has lengths between the same powers of two, so that no more than half of what is
    transformed is padding, whatever the lengths.
    """
    begins = starts.clone()
    begins[:, 0] = True
    first = begins.flatten().nonzero().flatten()
    lengths = first.diff(append=first.new_tensor([starts.numel()]))
    spans = sorted(torch.stack([first, lengths], dim=1).tolist(), key=lambda span: span[1])
    return [list(group) for _, group in groupby(spans, lambda span: (span[1] - 1).bit_length())]


def _padded(x_BTH: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    rows = x_BTH.flatten(0, 1)
    return pad_sequence([rows[begin : begin + size] for begin, size in spans], batch_first=True)


def _put(y_BTH: Tensor, spans: list[tuple[int, int]], padded: Tensor) -> None:
    rows = y_BTH.flatten(0, 1)
    for (begin, size), row in zip(spans, padded, strict=True):
        rows[begin : begin + size] = row[:size]


# Operators, for how documents lie is nothing that a graph of torch.compile could hold. Saved are v
# and K: transforming them again costs less than their transforms would hold.
@torch.library.custom_op("pha::convolve", mutates_args=())
def _convolve(v_BTH: Tensor, K_TH: Tensor, starts: Tensor | None) -> Tensor:
    """Causal convolution over time, of each document by itself."""
    if starts is None:
        return _convolution(v_BTH, K_TH).contiguous()
    y = torch.empty_like(v_BTH, memory_format=torch.contiguous_format)
    for spans in _documents(starts):
        v = _padded(v_BTH, spans)
        _put(y, spans, _convolution(v, K_TH[: v.shape[1]]))
    return y


@torch.library.custom_op("pha::convolve_backward", mutates_args=())
def _gradients(
    dy_BTH: Tensor, v_BTH: Tensor, K_TH: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    if starts is None:
        dv, dK = _convolution_gradients(dy_BTH, v_BTH, K_TH)
        return dv.contiguous(), dK.contiguous()
    dv = torch.empty_like(v_BTH, memory_format=torch.contiguous_format)
    dK = torch.zeros_like(K_TH)
    for spans in _documents(starts):
        v = _padded(v_BTH, spans)
        T = v.shape[1]
        dv_padded, dK_T = _convolution_gradients(_padded(dy_BTH, spans), v, K_TH[:T])
        _put(dv, spans, dv_padded)
        dK[:T] += dK_T
    return dv, dK


@_convolve.register_fake
def _like_v(v_BTH: Tensor, *_: Any) -> Tensor:
    return v_BTH.new_empty(v_BTH.shape)


@_gradients.register_fake
def _like_v_and_k(dy_BTH: Tensor, v_BTH: Tensor, K_TH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return v_BTH.new_empty(v_BTH.shape), K_TH.new_empty(K_TH.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy_BTH: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_gradients(dy_BTH, *ctx.saved_tensors), None)


_convolve.register_autograd(_differentiate, setup_context=_save)


def _from_state(h0: Tensor, C: Tensor, Lambda: Tensor, modes: Tensor) -> Tensor:
    """What the state before the first step adds to y: Re(C~ exp(Lambda (t + 1)) h0), (B, T, H)."""
    state = torch.view_as_complex(h0.to(modes.dtype).contiguous())
    weights = C * Lambda.exp().to(C.dtype) * state
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
    steps = v_BTH.new_full((B,), T, dtype=torch.long) if count is None else count
    if starts is not None:
        from_here_on = starts.flip(1).cumsum(1).flip(1)
        ended = (from_here_on - starts.to(from_here_on.dtype)) > 0
        v_BTH = v_BTH.masked_fill(ended.unsqueeze(-1), 0.0)
    if count is not None:  # the last of them comes last, after zeros
        place = torch.arange(T, device=v_BTH.device) - (T - steps)[:, None]
        v_BTH = v_BTH.take_along_dim(place.clamp(min=0).unsqueeze(-1), 1)
        v_BTH = v_BTH.masked_fill((place < 0).unsqueeze(-1), 0.0)
    h = (v_BTH.transpose(1, 2) @ modes.flip(0)).view(B, H, -1, 2)
    if h0 is None:
        return h
    decay = (Lambda * steps[:, None]).exp().to(modes.dtype.to_complex()).unsqueeze(1)
    carried = torch.view_as_real(decay * torch.view_as_complex(h0.to(modes.dtype).contiguous()))
    if starts is not None:
        carried = carried.masked_fill(starts.any(1).view(B, 1, 1, 1), 0.0)
    return h + carried


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
    for the steps between. An FFT adds up all steps: rounding, though nothing else, reaches from
    later inputs to earlier outputs.
    """
    T = v.shape[1]
    if isinstance(T, torch.SymInt):
        raise PHAError("dss: the form of its Fourier transform is of one length; export that one")
    if T == 1:
        return dss_naive(v, Lambda_re, Lambda_im, C_re, C_im, D, h0, starts, last_state, count)
    dtype = accumulation_type(v)
    Lambda, C = _modes(Lambda_re, Lambda_im, C_re, C_im, dtype)
    # Re(C~ p) is a product of real vectors, conj(C~) and p: half the work of complex ones.
    modes = _real(_powers(Lambda, T, C.dtype))
    kernel = modes @ _real(C.conj()).T
    kernel = torch.cat([kernel[:1] + D.to(dtype), kernel[1:]])
    x = v.to(dtype)
    y = _convolve(x, kernel, starts)
    if h0 is not None:
        carried = _from_state(h0, C, Lambda, modes)
        if starts is not None:
            carried = carried.masked_fill(starts.cumsum(1).gt(0).unsqueeze(-1), 0.0)
        y = y + carried
    h_last = _last_state(x, h0, Lambda, modes, starts, count) if last_state else None
    return y.to(v.dtype), h_last


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device_type)

    B, T, H, N = 2, 37, 5, 7
    inputs = normal(B, T, H), normal(N) - 1, normal(N), normal(H, N), normal(H, N), normal(H)
    starts = (torch.rand(B, T, generator=generator) < 0.1).to(device_type)
    return relative_error(
        lambda *x: backend(*x, starts), lambda *x: oracle(*x, starts), *inputs, normal(B, H, N, 2)
    )


_OP = Op("dss", {"naive": dss_naive, "fft": dss_fft}, {"default": "fft"}, _check, plain="fft")
