"""Every op at shapes, types, strides and vocabularies that nobody thought of, against its oracle.

What `empty` returns holds NaN in tests, so anything that is read before it is written shows.
"""

from __future__ import annotations

import functools
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
from tests.ops.common import Inputs, converted, magnitudes, mask_of, outcome, worst

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


def gated_scan(new: Problem, B: int, T: int, n: int) -> Inputs:
    inputs = {"gate": new(B, T, n), "value": new(B, T, n), "b": new(n, wide=True)}
    inputs["a"] = torch.rand(n, generator=new.generator).to(inputs["b"].dtype)
    if new.data.draw(st.booleans()):
        inputs["h0"] = new(B, n, wide=True)
    return inputs | {"starts": new.flags(B, T)}


def rms_norm(new: Problem, B: int, T: int, n: int) -> Inputs:
    return {"x": new(B, T, n), "gain": new(n, wide=True), "eps": 1e-5, "dtype": new.dtype}


def swiglu(new: Problem, B: int, T: int, n: int) -> Inputs:
    return {"gate": new(B, T, n), "up": new(B, T, n)}


def unit_rotary(new: Problem, B: int, T: int, n: int) -> Inputs:
    angles = torch.randn(1, T, n, generator=new.generator)
    inputs = {"x": new(B, 3, T, 2 * n), "scales": new(3, wide=True)}
    return inputs | {"cos": angles.cos(), "sin": angles.sin()}


def attention(new: Problem, B: int, T: int, n: int) -> Inputs:
    heads, groups, S = *new.data.draw(st.sampled_from([(1, 1), (4, 2), (6, 2)])), T + n - 1
    shapes = {"q": (B, heads, T, 2 * n), "k": (B, groups, S, 2 * n), "v": (B, groups, S, 2 * n)}
    mask = mask_of(T, S, new.flags(B, S), new.flags(B, S))
    window = new.data.draw(st.sampled_from([None, 1, 3, 100]))
    return {name: new(*x) for name, x in shapes.items()} | {"mask": mask, "window": window}


def linear_cross_entropy(new: Problem, B: int, T: int, n: int) -> Inputs:
    vocabulary = new.data.draw(st.sampled_from([1, 2, 61, 257]))
    targets = torch.randint(vocabulary, (T,), generator=new.generator)
    ignored = new.flags(T)
    targets = targets if ignored is None else targets.masked_fill(ignored, -100)
    return {"x": new(T, n), "weight": new(vocabulary, n), "targets": targets}


def dss(new: Problem, B: int, T: int, n: int) -> Inputs:
    modes = new.data.draw(sizes)
    shapes = {"Lambda_im": (modes,), "C_re": (n, modes), "C_im": (n, modes), "D": (n,)}
    inputs = {name: new(*x, wide=True) for name, x in shapes.items()}
    inputs |= {"v": new(B, T, n), "Lambda_re": new(modes, wide=True) - 1}
    return inputs | {"starts": new.flags(B, T)}


def linear_scan(new: Problem, B: int, T: int, n: int) -> Inputs:
    inputs = {"u": new(B, T, n), "a": new(B, T, n, wide=True).sigmoid()}
    h0 = {"h0": new(B, n, wide=True)} if new.data.draw(st.booleans()) else {}
    return inputs | h0 | {"starts": new.flags(B, T)}


def selective_scan(new: Problem, B: int, T: int, n: int) -> Inputs:
    N = new.data.draw(sizes)
    inputs = {"x": new(B, T, n), "dt": new(B, T, n, wide=True).sigmoid()}
    inputs |= {"A": -new(n, N, wide=True).exp(), "B": new(B, T, N), "C": new(B, T, N)}
    h0 = {"h0": new(B, n, N, wide=True)} if new.data.draw(st.booleans()) else {}
    return inputs | h0 | {"starts": new.flags(B, T)}


def linear_attention(new: Problem, B: int, T: int, n: int) -> Inputs:
    (heads, groups), K = (
        new.data.draw(st.sampled_from([(1, 1), (4, 2), (3, 3)])),
        new.data.draw(sizes),
    )
    inputs = {"q": new(B, T, groups, K), "v": new(B, T, heads, n)}
    inputs["k"] = torch.nn.functional.normalize(new(B, T, groups, K).double(), dim=-1).to(new.dtype)
    decay = new.data.draw(st.sampled_from([None, (B, T, heads), (B, T, heads, K)]))
    if decay is not None:
        inputs["g"] = torch.nn.functional.logsigmoid(3 * new(*decay, wide=True))
    if new.data.draw(st.booleans()):
        inputs["beta"] = new(B, T, heads).sigmoid()
    if new.data.draw(st.booleans()):
        inputs["h0"] = new(B, heads, K, n, wide=True)
    return inputs | {"starts": new.flags(B, T)}


def short_convolution(new: Problem, B: int, T: int, n: int) -> Inputs:
    w = new.data.draw(st.sampled_from([2, 3, 4, 64]))
    inputs = {"x": new(B, w - 1 + T, n), "weight": new(n, w, wide=True)}
    bias = {"bias": new(n, wide=True)} if new.data.draw(st.booleans()) else {}
    return inputs | bias | {"starts": new.flags(B, T)}


def long_convolution(new: Problem, B: int, T: int, n: int) -> Inputs:
    L, before = new.data.draw(lengths), new.data.draw(st.sampled_from([0, 1, 9]))
    inputs = {"x": new(B, before + T, n), "kernel": new(L, n, wide=True)}
    return inputs | {"starts": new.flags(B, T), "T": T}


def diagonal_ssm(new: Problem, B: int, T: int, n: int) -> Inputs:
    shape = n, new.data.draw(sizes)
    inputs = {name: new(*shape, wide=True) for name in ("Lambda_im", "w_re", "w_im")}
    inputs |= {"u": new(B, T, n), "Lambda_re": -new(*shape, wide=True).exp()}
    h0 = {"h0": new(B, *shape, 2, wide=True)} if new.data.draw(st.booleans()) else {}
    return inputs | h0 | {"D": new(n, wide=True), "starts": new.flags(B, T)}


PROBLEMS = {
    function.__name__: function
    for function in (
        *(gated_scan, rms_norm, swiglu, unit_rotary, attention),
        *(linear_cross_entropy, dss, linear_attention, short_convolution),
        *(linear_scan, selective_scan, long_convolution, diagonal_ssm),
    )
}


def test_every_op_is_here() -> None:
    assert set(PROBLEMS) == set(OPS)
    assert torch.empty(2).isnan().all()


@pytest.mark.parametrize("name", sorted(PROBLEMS))
@given(data=st.data(), dtype=st.sampled_from(DTYPES), B=sizes, T=lengths, n=st.integers(1, 20))
@settings(max_examples=60)
def test_what_runs_agrees_with_the_oracle(
    name: str, data: st.DataObject, dtype: torch.dtype, B: int, T: int, n: int
) -> None:
    op, inputs = OPS[name], PROBLEMS[name](Problem(data, dtype), B, T, n)
    constant = {key: inputs.pop(key) for key in ("cos", "sin", "dtype") if key in inputs}
    actual = outcome(functools.partial(op("cpu"), **constant), inputs)
    if "dtype" in constant:
        constant["dtype"] = torch.float64
    naive = functools.partial(op.backends["naive"], **constant)
    expected = outcome(naive, converted(inputs, torch.float64))
    assert all(x.isfinite().all() for x in actual.values())
    # Relative to the largest number, with room for sums of terms of both signs.
    room = 1 if dtype == torch.bfloat16 else 0.1
    sizes = {key: size + room for key, size in magnitudes(expected).items()}
    limit = {torch.float64: 1e-11, torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    assert worst(actual, expected, sizes) <= limit


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
