"""Every op at shapes, types, strides and vocabularies that nobody thought of, against its oracle.

What `empty` returns holds NaN in tests, so anything that is read before it is written shows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops import OPS
from pha.ops.attention import attention_mask

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "every other": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "reversed": lambda x: x.flip(0)[list(range(x.shape[0]))[::-1]],
}
sizes = st.integers(1, 5)
lengths = st.integers(1, 70)
layouts = st.sampled_from(list(STRIDES))


class Problem:
    """Numbers from a seed, in a type, laid out in memory in some way."""

    def __init__(self, data: st.DataObject, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))

    def __call__(self, *shape: int, wide: bool = False) -> Tensor:
        x = torch.randn(*shape, generator=self.generator)
        x = x.to(torch.float32 if wide and self.dtype != torch.float64 else self.dtype)
        return STRIDES[self.data.draw(layouts)](x) if len(shape) > 1 else x

    def flags(self, *shape: int) -> Tensor | None:
        share = self.data.draw(st.sampled_from([None, 0.0, 0.2, 0.9, 1.0]))
        return None if share is None else torch.rand(*shape, generator=self.generator) < share


def gated_scan(new: Problem, B: int, T: int, n: int) -> tuple[list[Any], list[Any]]:
    a = torch.rand(n, generator=new.generator).to(new(1, wide=True).dtype)
    h0 = new(B, n, wide=True) if new.data.draw(st.booleans()) else None
    tensors = [new(B, T, n), new(B, T, n), a, new(n, wide=True), h0]
    return tensors, [new.flags(B, T), new.flags(B, T)]


def rms_norm(new: Problem, B: int, T: int, n: int) -> tuple[list[Any], list[Any]]:
    return [new(B, T, n), new(n, wide=True)], [1e-5, new.dtype]


def swiglu(new: Problem, B: int, T: int, n: int) -> tuple[list[Any], list[Any]]:
    return [new(B, T, n), new(B, T, n)], []


def unit_rotary(new: Problem, B: int, T: int, n: int) -> tuple[list[Any], list[Any]]:
    angles = torch.randn(1, T, n, generator=new.generator)
    return [new(B, 3, T, 2 * n), new(3, wide=True)], [angles.cos(), angles.sin()]


def attention(new: Problem, B: int, T: int, n: int) -> tuple[list[Any], list[Any]]:
    heads, groups, S = *new.data.draw(st.sampled_from([(1, 1), (4, 2), (6, 2)])), T + n - 1
    tensors = [new(B, heads, T, 2 * n), new(B, groups, S, 2 * n), new(B, groups, S, 2 * n)]
    mask = attention_mask(T, S, torch.device("cpu"), new.flags(B, S), new.flags(B, S))
    return tensors, [mask, new.data.draw(st.sampled_from([None, 1, 3, 100]))]


def linear_cross_entropy(new: Problem, B: int, T: int, n: int) -> tuple[list[Any], list[Any]]:
    vocabulary = new.data.draw(st.sampled_from([1, 2, 61, 257]))
    targets = torch.randint(vocabulary, (T,), generator=new.generator)
    ignored = new.flags(T)
    return [new(T, n), new(vocabulary, n)], [
        targets if ignored is None else targets.masked_fill(ignored, -100)
    ]


def dss(new: Problem, B: int, T: int, n: int) -> tuple[list[Any], list[Any]]:
    modes = new.data.draw(sizes)
    parameters = [new(modes, wide=True) - 1, new(modes, wide=True)]
    parameters += [new(n, modes, wide=True), new(n, modes, wide=True), new(n, wide=True)]
    return [new(B, T, n), *parameters], [None, new.flags(B, T)]


PROBLEMS = {
    function.__name__: function
    for function in (
        *(gated_scan, rms_norm, swiglu, unit_rotary, attention),
        *(linear_cross_entropy, dss),
    )
}


def outcome(function: Callable[..., Any], tensors: list[Any], rest: list[Any]) -> list[Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves, *rest)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    weights = [torch.arange(1, x.numel() + 1).view(x.shape).sin() for x in outputs]
    total = sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True))
    wanted = [x for x in leaves if x is not None]
    return [*outputs, *torch.autograd.grad(total, wanted)]


def test_every_op_is_here() -> None:
    assert set(PROBLEMS) == set(OPS)
    assert torch.empty(2).isnan().all()


@pytest.mark.parametrize("name", sorted(PROBLEMS))
@given(data=st.data(), dtype=st.sampled_from(DTYPES), B=sizes, T=lengths, n=st.integers(1, 20))
@settings(max_examples=60)
def test_what_runs_agrees_with_the_oracle(
    name: str, data: st.DataObject, dtype: torch.dtype, B: int, T: int, n: int
) -> None:
    op = OPS[name]
    tensors, rest = PROBLEMS[name](Problem(data, dtype), B, T, n)
    actual = outcome(op("cpu"), tensors, rest)
    wide = [x.double() if isinstance(x, Tensor) else x for x in tensors]
    rest = [torch.float64 if x is dtype else x for x in rest]
    expected = outcome(op.backends["naive"], wide, rest)
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        assert x.isfinite().all()
        # Relative to the largest number, with room for sums of terms of both signs.
        size = y.abs().max() + (1 if dtype == torch.bfloat16 else 0.1)
        error = float((x.double() - y).abs().max() / size)
        assert error <= {torch.float64: 1e-11, torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]


@given(
    data=st.data(),
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    vocabulary=st.sampled_from([3, 61, 257, 1001]),
    bf16=st.booleans(),
)
@settings(max_examples=60)
def test_the_model_agrees_with_its_oracles(
    data: st.DataObject, B: int, T: int, vocabulary: int, bf16: bool
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    config = PHAConfig(
        vocab_size=vocabulary,
        hidden_size=8 * data.draw(sizes),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=data.draw(st.sampled_from([1, 2, 4])),
        head_dim=2 * data.draw(sizes),
        state_size=16 * data.draw(sizes),
        attention_window=data.draw(st.sampled_from([None, 2, 7])),
        initializer_range=0.1,
    )
    model, ids = PHAForCausalLM(config).train(), torch.randint(vocabulary, (B, T))
    options: dict[str, Any] = {}
    if data.draw(st.booleans()):
        options["document_starts"] = torch.rand(B, T) < 0.2
    if data.draw(st.booleans()):
        options["attention_mask"] = (torch.arange(T) >= torch.arange(B)[:, None]).long()
    labels = torch.where(torch.rand(B, T) < 0.2, -100, ids)
    results = []
    for naive in (False, True):
        model.zero_grad()
        with ExitStack() as stack:
            if naive:
                model = model.double()
                for op in OPS.values():
                    stack.enter_context(op.force("naive"))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not naive))
            loss = model(ids, shift_labels=labels, **options).loss
        loss.backward()
        results.append([loss, *(p.grad.double() for p in model.parameters())])
    assert all(x.isfinite().all() for x in results[0])
    # Gradients that nearly vanish have no digit in common with theirs in bfloat16.
    for x, y in zip(*(result[:1] if bf16 else result for result in results), strict=True):
        assert float((x - y).norm() / (y.norm() + 1e-3)) <= (0.05 if bf16 else 1e-3)
