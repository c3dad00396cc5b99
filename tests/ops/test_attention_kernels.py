"""Causal grouped-query attention: every backend against the oracle, the oracle against a loop."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pha.ops import OPS
from pha.ops.attention import attention_mask

BACKENDS = sorted(OPS["attention"].backends)
CPU = torch.device("cpu")
AttentionFunction = Callable[..., Tensor]

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def backend_function(name: str) -> AttentionFunction:
    return OPS["attention"].backends[name]


def problem(
    B: int, H: int, G: int, T: int, S: int, K: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the model makes them: unit vectors, the queries times a temperature of 10."""
    generator = torch.Generator().manual_seed(H * 10000 + T * 100 + K)
    q = torch.randn(B, H, T, K, generator=generator, dtype=torch.float64)
    k = torch.randn(B, G, S, K, generator=generator, dtype=torch.float64)
    v = torch.randn(B, G, S, K, generator=generator, dtype=torch.float64)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    return (10 * q).to(dtype), k.to(dtype), v.to(dtype)


def starts_and_padding(B: int, S: int) -> tuple[Tensor, Tensor]:
    """Random document starts; left padding of a different length in each row."""
    starts = torch.rand(B, S, generator=torch.Generator().manual_seed(S)) < 0.15
    tokens = torch.arange(S).expand(B, S) >= torch.arange(B)[:, None] * min(3, S)
    return starts, tokens


def literal(q: Tensor, k: Tensor, v: Tensor, allowed: Callable[[int, int, int], bool]) -> Tensor:
    """One query at a time, over the keys that `allowed(b, query, key)` grants it."""
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    y = torch.zeros(B, H, T, v.shape[-1], dtype=v.dtype)
    for b in range(B):
        for head in range(H):
            shared = head // (H // G)
            for t in range(T):
                keys = [s for s in range(S) if allowed(b, S - T + t, s)]
                logits = [float(q[b, head, t] @ k[b, shared, s]) for s in keys]
                weights = [math.exp(x - max(logits)) for x in logits]
                for s, w in zip(keys, weights, strict=True):
                    y[b, head, t] += w / sum(weights) * v[b, shared, s]
    return y


def values_and_gradients(
    function: AttentionFunction, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = function(*leaves, mask)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    gradients = torch.autograd.grad((y.double() * weight.double()).sum(), leaves)
    return [x.detach().double() for x in (y, *gradients)]


def worst(actual: list[Tensor], expected: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> float:
    """Largest error of y, dq, dk and dv over the size of the terms that make each of them up.

    The gradients of q and k are differences of dp = dy v^T, and may vanish (one key) though dp
    does not: rounding is then relative to |dp| |k| and |dp| |q|.
    """
    dp = v.double().norm(dim=-1).max() * v.shape[-1] ** 0.5
    magnitudes = (v.abs().max(), dp * k.abs().max(), dp * q.abs().max(), expected[-1].abs().max())
    return max(
        float((x - y).abs().max() / size)
        for x, y, size in zip(actual, expected, magnitudes, strict=True)
    )


@each_backend
@pytest.mark.parametrize(("T", "S"), [(6, 6), (3, 7), (1, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_loop_over_keys(backend: str, T: int, S: int, masked: bool) -> None:
    q, k, v = problem(2, 4, 2, T, S, 6)
    starts, tokens = starts_and_padding(2, S)
    document = starts.cumsum(-1)

    def allowed(b: int, query: int, key: int) -> bool:
        if key > query:
            return False
        if not masked or key == query:
            return True
        return bool(document[b, query] == document[b, key]) and bool(tokens[b, key])

    mask = attention_mask(T, S, CPU, starts, tokens) if masked else None
    y = backend_function(backend)(q, k, v, mask)
    torch.testing.assert_close(y, literal(q, k, v, allowed), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "naive"])
@pytest.mark.parametrize("K", [60, 64, 76])
@pytest.mark.parametrize(("H", "G"), [(8, 2), (6, 2), (3, 3)], ids=["4:1", "3:1", "1:1"])
@pytest.mark.parametrize("T", [1, 7, 63])
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_oracle(
    backend: str, K: int, H: int, G: int, T: int, past: int, masked: bool
) -> None:
    S = T + past
    starts, tokens = starts_and_padding(2, S)
    mask = attention_mask(T, S, CPU, starts, tokens) if masked else None
    q, k, v = problem(2, H, G, T, S, K, torch.float32)
    exact = [x.double() for x in (q, k, v)]
    expected = values_and_gradients(OPS["attention"].backends["naive"], *exact, mask)
    # Softmax over at most 68 keys: a few dozen roundings of each type.
    for dtype, limit in ((torch.float64, 5e-15), (torch.float32, 2e-6)):
        inputs = [x.to(dtype) for x in exact]
        actual = values_and_gradients(backend_function(backend), *inputs, mask)
        assert worst(actual, expected, q, k, v) <= limit, dtype


@each_backend
@pytest.mark.parametrize("K", [60, 76])
def test_bfloat16_is_as_good_as_its_inputs(backend: str, K: int) -> None:
    q, k, v = problem(2, 8, 2, 63, 63, K, torch.bfloat16)
    y = backend_function(backend)(q, k, v)
    assert y.dtype == torch.bfloat16
    expected = OPS["attention"].backends["naive"](q.double(), k.double(), v.double())
    # The oracle in bfloat16 rounds logits of up to 10 by 2^-8, so weights by 2%.
    assert float((y.double() - expected).abs().max() / v.abs().max()) <= 0.02


def test_mask_is_left_out_exactly_where_causality_says_it_all() -> None:
    assert attention_mask(7, 7, CPU) is None
    assert attention_mask(1, 9, CPU) is None
    assert attention_mask(2, 9, CPU) is None
    starts, tokens = starts_and_padding(2, 9)
    assert attention_mask(1, 9, CPU, document_starts=starts) is not None
    assert attention_mask(9, 9, CPU, token_mask=tokens) is not None


@pytest.mark.parametrize(("T", "S"), [(11, 11), (4, 11), (1, 11)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_mask_by_its_definition(T: int, S: int, documents: bool, padding: bool) -> None:
    starts, tokens = starts_and_padding(3, S)
    mask = attention_mask(T, S, CPU, starts if documents else None, tokens if padding else None)
    if mask is None:
        mask = attention_mask(T, S, CPU, torch.zeros(1, S, dtype=torch.bool))  # one document
        assert mask is not None
    mask = mask.expand(3, 1, T, S)
    for b in range(3):
        for row in range(T):
            query = S - T + row
            for key in range(S):
                same_document = not documents or not starts[b, key + 1 : query + 1].any()
                visible = not padding or bool(tokens[b, key]) or key == query
                expected = key <= query and bool(same_document) and visible
                assert bool(mask[b, 0, row, key]) == expected, (b, query, key)


@each_backend
@pytest.mark.parametrize(("T", "S"), [(7, 7), (5, 9), (1, 8), (6, 6)])
@pytest.mark.parametrize("window", [1, 2, 5, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_window_equals_a_loop_over_keys(
    backend: str, T: int, S: int, window: int, masked: bool
) -> None:
    q, k, v = problem(2, 4, 2, T, S, 6)
    starts, tokens = starts_and_padding(2, S)
    document = starts.cumsum(-1)

    def allowed(b: int, query: int, key: int) -> bool:
        if not query - window < key <= query:
            return False
        if not masked or key == query:
            return True
        return bool(document[b, query] == document[b, key]) and bool(tokens[b, key])

    mask = attention_mask(T, S, CPU, starts, tokens) if masked else None
    y = backend_function(backend)(q, k, v, mask, window)
    torch.testing.assert_close(y, literal(q, k, v, allowed), rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "naive"])
@pytest.mark.parametrize("window", [1, 5, 16, 64, 500])
@pytest.mark.parametrize(("T", "past"), [(63, 0), (40, 23), (1, 70)])
@pytest.mark.parametrize("masked", [False, True])
def test_windows_in_blocks_match_the_oracle(
    backend: str, window: int, T: int, past: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pha.ops.attention.sdpa"], "WINDOW_BLOCK", 16)
    starts, tokens = starts_and_padding(2, T + past)
    mask = attention_mask(T, T + past, CPU, starts, tokens) if masked else None
    q, k, v = problem(2, 8, 2, T, T + past, 60)

    def windowed(name: str) -> list[Tensor]:
        function = backend_function(name)
        return values_and_gradients(lambda *x: function(*x, window), q, k, v, mask)

    assert worst(windowed(backend), windowed("naive"), q, k, v) <= 5e-15


def test_masks_of_the_last_keys_are_cut_from_longer_ones() -> None:
    starts, tokens = starts_and_padding(2, 12)
    whole = attention_mask(4, 12, CPU, starts, tokens)
    last = attention_mask(4, 7, CPU, starts, tokens)
    assert whole is not None
    assert last is not None
    assert torch.equal(whole[..., -7:], last)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_is_not_a_number(backend: str, dtype: torch.dtype) -> None:
    q, k, v = problem(3, 4, 2, 9, 9, 60, dtype)
    tokens = torch.ones(3, 9, dtype=torch.bool)
    tokens[0, :4] = False
    tokens[1] = False  # a row of nothing but padding
    starts = torch.zeros(3, 9, dtype=torch.bool)
    starts[:, [4, 5]] = True
    results = values_and_gradients(
        backend_function(backend), q, k, v, attention_mask(9, 9, CPU, starts, tokens)
    )
    assert all(bool(x.isfinite().all()) for x in results)
    # A position that sees only itself returns its own value.
    y = results[0]
    own = v.double().repeat_interleave(2, dim=1)
    assert torch.equal(y[1], own[1])
    assert torch.equal(y[:, :, 4], own[:, :, 4])


@each_backend
@pytest.mark.parametrize("past", [0, 5])
def test_later_keys_do_not_matter(backend: str, past: int) -> None:
    T = 70
    q, k, v = problem(1, 4, 1, T, T + past, 60, torch.float32)
    y = backend_function(backend)(q, k, v)
    k[:, :, past + 40 :] += 1.0
    v[:, :, past + 40 :] -= 1.0
    changed = backend_function(backend)(q, k, v)
    assert torch.equal(y[:, :, :40], changed[:, :, :40])
    assert not torch.equal(y[:, :, 40:], changed[:, :, 40:])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "naive"])
@pytest.mark.parametrize(("T", "S"), [(3, 3), (2, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(backend: str, T: int, S: int, masked: bool) -> None:
    inputs = [x.requires_grad_() for x in problem(1, 4, 2, T, S, 3)]
    starts, tokens = starts_and_padding(1, S)
    mask = attention_mask(T, S, CPU, starts, tokens) if masked else None
    # Central differences with step 1e-6: third derivatives of the softmax times 1e-12, and
    # float64 rounding over the step, 1e-10.
    assert torch.autograd.gradcheck(
        lambda q, k, v: backend_function(backend)(q, k, v, mask),
        inputs,
        eps=1e-6,
        atol=1e-8,
        rtol=1e-7,
    )
