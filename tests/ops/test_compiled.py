"""A graph of torch.compile gives what the operations give, with all gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pha.ops import (
    OPS,
    attention,
    diagonal_ssm,
    dss,
    gated_scan,
    linear_attention,
    linear_cross_entropy,
    linear_scan,
    long_convolution,
    rms_norm,
    selective_scan,
    short_convolution,
    swiglu,
    unit_rotary,
)

Problem = tuple[Callable[..., Tensor], list[Tensor]]


def problem(name: str, dtype: torch.dtype) -> Problem:
    """An op as a function of what is differentiated, and that."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    B, T, n = 2, 9, 6
    x, y = normal(B, T, n).to(dtype), normal(B, T, n).to(dtype)
    a, b, cos = normal(n).sigmoid(), normal(n), normal(1, T, n // 2)
    heads = [normal(B, h, T, n).to(dtype) for h in (4, 2, 2)]
    modes = [normal(3) - 1, normal(3), normal(n, 3), normal(n, 3), normal(n)]
    targets, starts = torch.arange(T) % 5, (torch.arange(T) % 5 == 0).expand(B, T)
    problems: dict[str, Problem] = {
        "gated_scan": (lambda *inputs: gated_scan(*inputs)[0], [x, y, a, b, normal(B, n)]),
        "rms_norm": (lambda x, gain: rms_norm(x, gain, 1e-5, dtype), [x, b]),
        "swiglu": (swiglu, [x, y]),
        "unit_rotary": (lambda x, s: unit_rotary(x, s, cos.cos(), cos.sin()), [heads[0], b[:4]]),
        "attention": (attention, heads),
        "linear_cross_entropy": (
            lambda x, w: linear_cross_entropy(x[0], w, targets),
            [x, normal(5, n).to(dtype)],
        ),
        "linear_scan": (lambda *x: linear_scan(*x)[0], [x, y.float().sigmoid(), normal(B, n)]),
        "selective_scan": (
            lambda x, A, B: selective_scan(x, x.float().exp(), -A.exp(), B, B, starts=starts)[0],
            [x, normal(n, 3), normal(B, T, 3)],
        ),
        "short_convolution": (
            lambda x, w, b: short_convolution(x, w, b, starts=starts)[0],
            [x, normal(n, 4), b],
        ),
        "linear_attention": (
            lambda q, k, v, g, beta: linear_attention(q, k, v, -g.exp(), beta, starts=starts)[0],
            [*(h.transpose(1, 2) for h in (heads[1], heads[1] / 4, heads[0])), *normal(2, B, T, 4)],
        ),
        "long_convolution": (
            lambda x, kernel: long_convolution(x, kernel, starts=starts)[0],
            [x, normal(4, n)],
        ),
        "diagonal_ssm": (
            lambda u, rate, *rest: diagonal_ssm(u, -rate.exp(), *rest)[0],
            [x, *normal(4, n, 3), b, normal(B, n, 3, 2)],
        ),
        "dss": (lambda *inputs: dss(*inputs)[0], [x, *modes]),
    }
    return problems[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(OPS))
def test_a_compiled_graph_changes_nothing(name: str, dtype: torch.dtype) -> None:
    function, inputs = problem(name, dtype)

    def outcome(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        result = function(*leaves)
        return [result, *torch.autograd.grad(result.float().sin().sum(), leaves)]

    torch.compiler.reset()
    compiled = outcome(torch.compile(function, backend="aot_eager", fullgraph=True))
    for actual, expected in zip(compiled, outcome(function), strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-5 if dtype.itemsize == 4 else 2**-7, atol=1e-5
        )
