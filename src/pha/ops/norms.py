"""RMSNorm, and a weighted sum of RMSNorms: Eq. 3 of the paper in one pass over its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pha.ops import numba_runtime
from pha.ops.backends import Op
from pha.ops.precision import accumulation_type
from pha.ops.testing import relative_error

_MODULE = "numba_rows"


def mixed_norms(
    ys: Sequence[Tensor],
    gains: Sequence[Tensor],
    weights: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """sum_i w_i gain_i y_i / sqrt(mean(y_i^2) + eps), over the last dimension.

    Args:
        ys: tensors (..., d) of one floating type.
        gains: (d,) for each.
        weights: (number of ys,); None for ones.
        eps: added to the mean square.
        dtype: of the result.

    Returns:
        (..., d). Computed in float32 or wider.
    """
    return _OP(ys[0].device.type)(ys, gains, weights, eps, dtype)


def mixed_norms_naive(
    ys: Sequence[Tensor],
    gains: Sequence[Tensor],
    weights: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The oracle: as written."""
    accumulate = accumulation_type(ys[0])
    total = torch.zeros((), dtype=accumulate, device=ys[0].device)
    for i, (y, gain) in enumerate(zip(ys, gains, strict=True)):
        y = y.to(accumulate)
        normed = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * gain.to(accumulate)
        total = total + (normed if weights is None else weights[i].to(accumulate) * normed)
    return total.to(dtype)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * gain, of which only x and gain are kept. With n = x / rms(x) and g = dy gain,

    dx = (g - n mean(g n)) / rms(x),   dgain = sum over rows of dy n.
    """

    @staticmethod
    def forward(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        normed, _ = _normed(x, eps)
        return normed.mul_(gain.to(normed.dtype)).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, gain, ctx.eps, _ = inputs
        ctx.save_for_backward(x, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        normed, inverse = _normed(x, ctx.eps)
        dy, wide_gain = dy.to(normed.dtype), gain.to(normed.dtype)
        products = dy * normed
        dgain = products.flatten(0, -2).sum(0)
        mean = products.mul_(wide_gain).mean(-1, keepdim=True)
        dx = torch.mul(dy, wide_gain, out=products).addcmul_(normed, mean, value=-1).mul_(inverse)
        return dx.to(x.dtype), dgain.to(gain.dtype), None, None


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), new, and 1 / rms(x)."""
    wide = x.to(accumulation_type(x))
    inverse = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1]) + eps
    inverse.rsqrt_()
    return wide * inverse, inverse


def mixed_norms_torch(
    ys: Sequence[Tensor],
    gains: Sequence[Tensor],
    weights: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Norms whose gains have the weights in them, added up in `dtype`."""
    if weights is not None:
        gains = [gain.to(weights.dtype) * w for gain, w in zip(gains, weights, strict=True)]
    total = _RMSNorm.apply(ys[0], gains[0], eps, dtype)
    for y, gain in zip(ys[1:], gains[1:], strict=True):
        total = total + _RMSNorm.apply(y, gain, eps, dtype)
    return total


def mixed_norms_numba(
    ys: Sequence[Tensor],
    gains: Sequence[Tensor],
    weights: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """A compiled pass over rows, on the CPU, that saves nothing but its inputs for the way back.

    Few elements, and types other than float32, float64 and bfloat16, go to torch.
    """
    if not _serves(ys, dtype) or not _kernels_work(ys[0].dtype, len(ys), dtype):
        return mixed_norms_torch(ys, gains, weights, eps, dtype)
    if weights is None:
        weights = torch.ones(len(ys), dtype=accumulation_type(ys[0]))
    return _forward(list(ys), list(gains), weights, eps, dtype)[0]


def _serves(ys: Sequence[Tensor], dtype: torch.dtype) -> bool:
    pairs = {
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    }
    return (
        all((y.dtype, dtype) in pairs for y in ys)
        and len({(y.dtype, y.shape) for y in ys}) == 1
        and ys[0].numel() >= numba_runtime.SMALL
    )


@torch.compiler.assume_constant_result
def _kernels_work(element: torch.dtype, count: int, dtype: torch.dtype) -> bool:
    return all(
        numba_runtime.kernel(name, element, _MODULE, count, dtype == torch.bfloat16)
        for name in ("norms_forward", "norms_backward")
    )


def _run(name: str, ys: list[Tensor], dtype: torch.dtype, *arguments: Any) -> None:
    kernel = numba_runtime.kernel(name, ys[0].dtype, _MODULE, len(ys), dtype == torch.bfloat16)
    assert kernel is not None  # `_kernels_work` has compiled it
    d = ys[0].shape[-1]
    elements = ys[0].numel()
    numba_runtime.spread(kernel, elements // d, d, *arguments, elements=elements * len(ys))


def _flat(xs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(numba_runtime.flat(x, dtype) for x in xs)


@torch.library.custom_op(
    "pha::mixed_norms",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor[] ys, Tensor[] gains, Tensor weights, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor)",
)
def _forward(
    ys: list[Tensor], gains: list[Tensor], weights: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out, inverses = _outputs(ys, gains, weights, eps, dtype)
    real = inverses.dtype
    arrays = _flat(ys, ys[0].dtype), _flat(gains, real), numba_runtime.flat(weights, real)
    results = numba_runtime.flat(out, dtype), numba_runtime.flat(inverses, real)
    _run("norms_forward", ys, dtype, eps, *arrays, *results)
    return out, inverses


@_forward.register_fake
def _outputs(
    ys: list[Tensor], gains: list[Tensor], weights: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    y = ys[0]
    inverses = y.new_empty(*y.shape[:-1], len(ys), dtype=accumulation_type(y))
    return y.new_empty(y.shape, dtype=dtype), inverses


@torch.library.custom_op(
    "pha::mixed_norms_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dout, Tensor[] ys, Tensor[] gains, Tensor weights, Tensor inverses) "
    "-> (Tensor[], Tensor, Tensor)",
)
def _backward(
    dout: Tensor, ys: list[Tensor], gains: list[Tensor], weights: Tensor, inverses: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    d, real = ys[0].shape[-1], inverses.dtype
    calls = numba_runtime.calls(ys[0].numel() // d, ys[0].numel() * len(ys))
    dys = [torch.empty(y.shape, dtype=y.dtype) for y in ys]
    dgains = inverses.new_empty(len(ys), calls, d)
    dweights = inverses.new_zeros(calls, len(ys))
    _run(
        "norms_backward",
        ys,
        dout.dtype,
        *(_flat(ys, ys[0].dtype), _flat(gains, real)),
        *(numba_runtime.flat(x, x.dtype) for x in (weights.to(real), inverses, dout)),
        *(_flat(dys, dys[0].dtype), _flat(list(dgains), real)),
        numba_runtime.flat(dweights, real),
    )
    return dys, dgains.sum(1), dweights.sum(0)


@_backward.register_fake
def _gradients(
    dout: Tensor, ys: list[Tensor], gains: list[Tensor], weights: Tensor, inverses: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    dys = [y.new_empty(y.shape) for y in ys]
    return dys, inverses.new_empty(len(ys), ys[0].shape[-1]), inverses.new_empty(len(ys))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ys, gains, weights, _, _ = inputs
    ctx.count = len(ys)
    ctx.save_for_backward(*ys, *gains, weights, output[1])


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, weights, inverses = ctx.saved_tensors
    ys, gains = tensors[: ctx.count], tensors[ctx.count :]
    dys, dgains, dweights = _backward(dout, ys, gains, weights, inverses)
    dgains = [d.to(gain.dtype) for d, gain in zip(dgains, gains, strict=True)]
    return dys, dgains, dweights.to(weights.dtype), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device_type)

    shape, d = (3, 250, 67), 67  # enough for each backend to use its kernel
    inputs = *(normal(*shape) for _ in range(3)), *(1 + normal(d) for _ in range(3)), normal(3)

    def run(function: Any) -> Any:
        return lambda *x: function(x[:3], x[3:6], x[6], 1e-6, x[0].dtype)

    return relative_error(run(backend), run(oracle), *inputs)


_OP = Op(
    "mixed_norms",
    {"naive": mixed_norms_naive, "torch": mixed_norms_torch, "numba": mixed_norms_numba},
    {"cpu": "numba", "default": "torch"},
    _check,
    only_on={"numba": "cpu"},
    fault=lambda backend, _: numba_runtime.fault(_MODULE) if backend == "numba" else None,
)
