"""Causal depthwise convolution with as many taps as one likes: y_t = sum_{l <= t} K[l] x_{t-l}.

By Fourier transforms, of each document by itself. An FFT adds up all steps: rounding, though
nothing else, reaches from later inputs to earlier outputs.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pha.ops.backends import Op
from pha.ops.past_inputs import documents, with_past
from pha.ops.precision import accumulation_type
from pha.ops.shapes import require_shapes
from pha.ops.testing import random_numbers, relative_error


def long_convolution(
    x: Tensor,
    kernel: Tensor,
    past: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    last_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Convolve every channel over time with its own kernel.

    Args:
        x: (B, T, C) inputs, any floating type.
        kernel: (L, C), the tap of the step itself first; there is nothing behind L taps.
        past: (B, L - 1, C) inputs before the first step; zeros when absent.
        starts: (B, T) bool, true where a document begins: what was before it counts as zero.
        mask: (B, T) bool, false where there is no step (padding): y is 0 there, and the others are
            as if it were left out.
        last_state: whether the last inputs are wanted.

    Returns:
        y (B, T, C) in the type of `x`, summed in float32 (float64 for float64 inputs), and the
        last inputs (B, L - 1, C), zeros where they are not of the present document, or None.

    Raises:
        PHAError: shapes that do not fit each other.
    """
    (B, T, C), L = x.shape, kernel.shape[0]
    shapes = {"kernel": (kernel, (L, C)), "past": (past, (B, L - 1, C))}
    flags = {"starts": (starts, (B, T)), "mask": (mask, (B, T))}
    require_shapes("long_convolution", "x", shapes | flags)

    def convolve(x: Tensor, starts: Tensor | None) -> Tensor:
        return _OP(x.device.type)(x, kernel, starts, T)

    return with_past(convolve, x, L, past, starts, mask, last_state)


def long_convolution_flops(channels: int, length: int) -> float:
    """FLOPs a token: three transforms of twice the length, 5/2 N log2 N each, and their product."""
    return channels * (15 * math.log2(2 * length) + 6.0)


def long_convolution_naive(
    x: Tensor, kernel: Tensor, starts: Tensor | None = None, T: int | None = None
) -> Tensor:
    """The oracle: tap after tap over x (B, S, C), for the last T (if absent S) steps of it."""
    S, dtype = x.shape[1], accumulation_type(x)
    before = 0 if T is None else S - T
    wide, taps = x.to(dtype), kernel.to(dtype)
    document = None if starts is None else documents(starts, before)
    y = torch.zeros_like(wide[:, before:])
    for lag in range(min(len(taps), S)):
        seen = F.pad(wide, (0, 0, lag, 0))[:, before:S]
        if document is not None:
            same = F.pad(document, (lag, 0), value=-1)[:, before:S] == document[:, before:]
            seen = torch.where(same.unsqueeze(-1), seen, 0)
        y = y + taps[lag] * seen
    return y.to(x.dtype)


def long_convolution_fft(
    x: Tensor, kernel: Tensor, starts: Tensor | None = None, T: int | None = None
) -> Tensor:
    """By Fourier transforms; the last step alone is a sum. See `long_convolution_naive`."""
    S, dtype = x.shape[1], accumulation_type(x)
    before = 0 if T is None else S - T
    wide, taps = x.to(dtype), kernel[:S].to(dtype)
    if before == S - 1:
        seen = wide[:, S - len(taps) :]
        if starts is not None:
            document = documents(starts, len(taps) - 1)
            seen = torch.where((document == document[:, -1:]).unsqueeze(-1), seen, 0)
        return (seen * taps.flip(0)).sum(1, keepdim=True).to(x.dtype)
    begins = None if starts is None else F.pad(starts, (before, 0))
    return _convolve(wide, taps, begins)[:, before:].to(x.dtype)


def _fft_length(T: int, L: int) -> int:
    """A length of at least T + L - 1 that splits into factors of 2 and at most one 3 or 5."""
    least = T + L - 1
    return min(odd << ((least - 1) // odd).bit_length() for odd in (1, 3, 5))


def _convolution(x_BTC: Tensor, K_LC: Tensor) -> Tensor:
    """y_t = sum_{l <= t} K[l] x_{t-l} by real FFTs."""
    T, L = x_BTC.shape[1], K_LC.shape[0]
    n = _fft_length(T, L)
    x_f, K_f = torch.fft.rfft(x_BTC, n, dim=1), torch.fft.rfft(K_LC, n, dim=0)
    return torch.fft.irfft(x_f * K_f, n, dim=1)[:, :T]


def _convolution_gradients(dy_BTC: Tensor, x_BTC: Tensor, K_LC: Tensor) -> tuple[Tensor, Tensor]:
    """dx is the correlation of dy with K, dK that of dy with x, summed over the batch."""
    T, L = x_BTC.shape[1], K_LC.shape[0]
    n = _fft_length(T, L)
    dy_f = torch.fft.rfft(dy_BTC, n, dim=1)
    x_f, K_f = torch.fft.rfft(x_BTC, n, dim=1), torch.fft.rfft(K_LC, n, dim=0)
    dx = torch.fft.irfft(dy_f * K_f.conj(), n, dim=1)[:, :T]
    return dx, torch.fft.irfft((dy_f * x_f.conj()).sum(0), n, dim=0)[:L]


def _spans(starts: Tensor) -> list[list[tuple[int, int]]]:
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


def _padded(x_BTC: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    rows = x_BTC.flatten(0, 1)
    return pad_sequence([rows[begin : begin + size] for begin, size in spans], batch_first=True)


def _put(y_BTC: Tensor, spans: list[tuple[int, int]], padded: Tensor) -> None:
    rows = y_BTC.flatten(0, 1)
    for (begin, size), row in zip(spans, padded, strict=True):
        rows[begin : begin + size] = row[:size]


# Operators, for how documents lie is nothing that a graph of torch.compile could hold. Saved are x
# and K: transforming them again costs less than their transforms would hold.
@torch.library.custom_op("pha::convolve", mutates_args=())
def _convolve(x_BTC: Tensor, K_LC: Tensor, starts: Tensor | None) -> Tensor:
    """Causal convolution over time, of each document by itself."""
    if starts is None:
        return _convolution(x_BTC, K_LC).contiguous()
    y = torch.empty_like(x_BTC, memory_format=torch.contiguous_format)
    for spans in _spans(starts):
        x = _padded(x_BTC, spans)
        _put(y, spans, _convolution(x, K_LC[: x.shape[1]]))
    return y


@torch.library.custom_op("pha::convolve_backward", mutates_args=())
def _gradients(
    dy_BTC: Tensor, x_BTC: Tensor, K_LC: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    if starts is None:
        dx, dK = _convolution_gradients(dy_BTC, x_BTC, K_LC)
        return dx.contiguous(), dK.contiguous()
    dx = torch.empty_like(x_BTC, memory_format=torch.contiguous_format)
    dK = torch.zeros_like(K_LC)
    for spans in _spans(starts):
        x = _padded(x_BTC, spans)
        T = x.shape[1]
        dx_padded, dK_L = _convolution_gradients(_padded(dy_BTC, spans), x, K_LC[:T])
        _put(dx, spans, dx_padded)
        dK[: len(dK_L)] += dK_L
    return dx, dK


@_convolve.register_fake
def _like_x(x_BTC: Tensor, *_: Any) -> Tensor:
    return x_BTC.new_empty(x_BTC.shape)


@_gradients.register_fake
def _like_x_and_kernel(
    dy_BTC: Tensor, x_BTC: Tensor, K_LC: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return x_BTC.new_empty(x_BTC.shape), K_LC.new_empty(K_LC.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy_BTC: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_gradients(dy_BTC, *ctx.saved_tensors), None)


_convolve.register_autograd(_differentiate, setup_context=_save)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, uniform = random_numbers(device_type)
    starts = uniform(2, 29) < 0.1
    return relative_error(
        lambda *x: backend(*x, starts, 29),
        lambda *x: oracle(*x, starts, 29),
        *(normal(2, 37, 5), normal(23, 5)),
    )


_OP = Op(
    "long_convolution",
    {"naive": long_convolution_naive, "fft": long_convolution_fft},
    {"default": "fft"},
    _check,
    plain="fft",
)
