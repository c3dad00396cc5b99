"""The gate of a SwiGLU: SiLU(gate) * up, in one pass that keeps only its inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pha.ops import numba_runtime
from pha.ops.backends import Op
from pha.ops.precision import accumulation_type
from pha.ops.testing import relative_error

_MODULE = "numba_rows"


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up.

    Args:
        gate: (..., m).
        up: (..., m), of the same type.

    Returns:
        (..., m) in that type.
    """
    return _OP(gate.device.type)(gate, up)


def swiglu_naive(gate: Tensor, up: Tensor) -> Tensor:
    """The oracle: as written, in float32 or wider."""
    dtype = accumulation_type(gate)
    return (gate.to(dtype) * gate.to(dtype).sigmoid() * up.to(dtype)).to(gate.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate).mul_(up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """PyTorch's silu, then a product; neither is kept."""
    return _SwiGLU.apply(gate, up)


def swiglu_numba(gate: Tensor, up: Tensor) -> Tensor:
    """A compiled pass over rows, on the CPU. Few elements and other types go to torch."""
    known = gate.dtype in (torch.float32, torch.bfloat16, torch.float64)
    if not known or gate.dtype != up.dtype or gate.shape != up.shape:
        return swiglu_torch(gate, up)
    if gate.numel() < numba_runtime.SMALL or not _kernels_work(gate.dtype):
        return swiglu_torch(gate, up)
    return _forward(gate, up)


@torch.compiler.assume_constant_result
def _kernels_work(dtype: torch.dtype) -> bool:
    names = ("swiglu_forward", "swiglu_backward")
    return all(numba_runtime.kernel(name, dtype, _MODULE) for name in names)


def _rows(x: Tensor) -> tuple[Any, int]:
    """The memory of x (..., m), and how far apart its rows are; x is copied if that varies."""
    memory, (_, step) = numba_runtime.strided(x.reshape(1, -1, x.shape[-1]))
    return memory, step


def _run(name: str, gate: Tensor, up: Tensor, *others: Tensor) -> None:
    kernel = numba_runtime.kernel(name, gate.dtype, _MODULE)
    assert kernel is not None  # `_kernels_work` has compiled it
    m = gate.shape[-1]
    arrays = (numba_runtime.flat(x, x.dtype) for x in others)
    options = m, *_rows(gate), *_rows(up)
    numba_runtime.spread(kernel, gate.numel() // m, *options, *arrays, elements=gate.numel())


@torch.library.custom_op("pha::swiglu", mutates_args=(), device_types="cpu")
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = _output(gate, up)
    _run("swiglu_forward", gate, up, y)
    return y


@_forward.register_fake
def _output(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("pha::swiglu_backward", mutates_args=(), device_types="cpu")
def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = _gradients(dy, gate, up)
    _run(
        "swiglu_backward",
        gate,
        up,
        dy,
        dgate,
        dup,
        gate.new_empty(0, dtype=accumulation_type(gate)),
    )
    return dgate, dup


@_backward.register_fake
def _gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


def _check(backend: Any, oracle: Any, device_type: str) -> float:
    generator = torch.Generator().manual_seed(0)
    # Enough for each backend to use its kernel.
    gate, up = (torch.randn(3, 250, 67, generator=generator).to(device_type) for _ in range(2))
    return relative_error(backend, oracle, 3 * gate, up)


_OP = Op(
    "swiglu",
    {"naive": swiglu_naive, "torch": swiglu_torch, "numba": swiglu_numba},
    {"cpu": "numba", "default": "torch"},
    _check,
    only_on={"numba": "cpu"},
    fault=lambda backend, _: numba_runtime.fault(_MODULE) if backend == "numba" else None,
)
