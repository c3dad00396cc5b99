"""Causal depthwise convolution with few taps: y_t = bias + sum_l weight[w - 1 - l] x_{t-l}.

As in a Conv1d of torch, the last tap is that of the step itself. Nothing crosses the beginning of a
document.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops.backends import Op
from pha.ops.past_inputs import documents, with_past
from pha.ops.pieces import Pieces
from pha.ops.precision import accumulation_type
from pha.ops.shapes import require_shapes
from pha.ops.testing import random_numbers, relative_error
from pha.utils.errors import PHAError

MOST = 64  # taps; from there on a transform costs less


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past: Tensor | None = None,
    starts: Tensor | None = None,
    mask: Tensor | None = None,
    last_state: bool = True,
    pieces: Pieces | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve every channel over time with its own w taps.

    Args:
        x: (B, T, C) inputs, any floating type.
        weight: (C, w) taps, 2 <= w <= 64.
        bias: (C,), or None.
        past: (B, w - 1, C) inputs before the first step; zeros when absent.
        starts: (B, T) bool, true where a document begins: what was before it counts as zero.
        mask: (B, T) bool, false where there is no step (padding): y is 0 there, and the others are
            as if it were left out.
        last_state: whether the last inputs are wanted.
        pieces: where the rest of the sequence is, if these are the steps of one piece of it; the
            past is then that of the piece before.

    Returns:
        y (B, T, C) in the type of `x`, summed in float32 (float64 for float64 inputs), and the
        last inputs (B, w - 1, C), zeros where they are not of the present document, or None.

    Raises:
        PHAError: shapes that do not fit each other, or another number of taps.
    """
    (B, T, C), w = x.shape, weight.shape[-1]
    if not 2 <= w <= MOST:
        raise PHAError(f"short_convolution: weight has {w} taps; give 2 to {MOST}")
    shapes = {"weight": (weight, (C, w)), "bias": (bias, (C,)), "past": (past, (B, w - 1, C))}
    flags = {"starts": (starts, (B, T)), "mask": (mask, (B, T))}
    require_shapes("short_convolution", "x", shapes | flags)
    if pieces is not None:
        tail = x[:, 1 - w :]
        if starts is not None:  # the rest is not of the document that goes on
            document = starts.cumsum(1)
            tail = torch.where((document[:, 1 - w :] == document[:, -1:]).unsqueeze(-1), tail, 0)
        past, last_state = pieces.before(tail, w - 1), False

    def convolve(x: Tensor, starts: Tensor | None) -> Tensor:
        x = F.pad(x, (0, 0, w - 1, 0)) if past is None else x
        return _OP(x.device.type)(x, weight, bias, starts)

    return with_past(convolve, x, w, past, starts, mask, last_state)


def short_convolution_naive(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """The oracle: tap after tap over x (B, w - 1 + T, C), which begins with the past."""
    dtype, w, T = accumulation_type(x), weight.shape[1], x.shape[1] - weight.shape[1] + 1
    wide, taps = x.to(dtype), weight.to(dtype)
    document = None if starts is None else documents(starts, w - 1)
    y = wide.new_zeros(()) if bias is None else bias.to(dtype)
    for tap in range(w):
        seen = wide[:, tap : tap + T]
        if document is not None:
            same = document[:, tap : tap + T] == document[:, w - 1 :]
            seen = torch.where(same.unsqueeze(-1), seen, 0)
        y = y + taps[:, tap] * seen
    return y.to(x.dtype)


def _spread(x: Tensor, starts: Tensor | None, w: int) -> tuple[Tensor, Tensor | None]:
    """x (B, S, C) as (B, C, L) with w - 1 zeros before each document, and where it lies in B L."""
    if starts is None:
        return x.mT, None
    B, S, C = x.shape
    place = torch.arange(S, device=x.device) + (w - 1) * documents(starts, w - 1)
    L = int(place[:, -1].max()) + 1
    rows = (place + L * torch.arange(B, device=x.device)[:, None]).flatten()
    wide = x.new_zeros(B * L, C).index_copy_(0, rows, x.flatten(0, 1))
    return wide.view(B, L, C).mT, rows.view(B, S)


# Operators, for where documents lie is nothing that a graph of torch.compile could hold.
@torch.library.custom_op("pha::short_convolve", mutates_args=())
def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """y (B, T, C) of x (B, w - 1 + T, C)."""
    (C, w), dtype = weight.shape, accumulation_type(x)
    wide, rows = _spread(x.to(dtype), starts, w)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv1d(wide, weight.to(dtype).unsqueeze(1), bias, groups=C).mT
    if rows is not None:  # an output lies where the first of its w inputs does
        first = (
            rows[:, w - 1 :] - (w - 1) * torch.arange(1, len(rows) + 1, device=x.device)[:, None]
        )
        y = y.flatten(0, 1)[first]
    return y.to(x.dtype).contiguous()  # as a graph of torch.compile is told


@torch.library.custom_op("pha::short_convolve_backward", mutates_args=())
def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    (C, w), dtype = weight.shape, accumulation_type(x)
    wide, rows = _spread(x.to(dtype), starts, w)
    dy = F.pad(dy.to(dtype), (0, 0, w - 1, 0))
    dy_wide = _spread(dy, starts, w)[0][..., w - 1 :]
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        *(dy_wide, wide, weight.to(dtype).unsqueeze(1), None),
        *([1], [0], [1], False, [0], C, [True, True, False]),
    )
    dx = dx.mT if rows is None else dx.mT.flatten(0, 1)[rows]
    return dx.to(x.dtype).contiguous(), dweight.squeeze(1).to(weight.dtype)


@_convolve.register_fake
def _shorter(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - weight.shape[1] + 1, x.shape[2])


@_gradients.register_fake
def _like_both(dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, starts = inputs
    ctx.save_for_backward(x, weight, starts)
    ctx.bias_type = None if bias is None else bias.dtype


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, starts = ctx.saved_tensors
    dbias = None
    if ctx.bias_type is not None:
        dbias = dy.sum((0, 1), dtype=accumulation_type(x)).to(ctx.bias_type)
    return *_gradients(dy, x, weight, starts), dbias, None


_convolve.register_autograd(_differentiate, setup_context=_save)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    normal, uniform = random_numbers(device_type)
    inputs = normal(2, 37, 19), normal(19, 5), normal(19)
    starts = uniform(2, 33) < 0.1
    return relative_error(lambda *x: backend(*x, starts), lambda *x: oracle(*x, starts), *inputs)


_OP = Op(
    "short_convolution",
    {"naive": short_convolution_naive, "torch": _convolve},
    {"default": "torch"},
    _check,
)
