"""Causal grouped-query attention: every backend against the oracle, the oracle against a loop."""

from __future__ import annotations

import gc
import math
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pha.ops import OPS
from pha.ops.attention import attention_mask
from pha.ops.attention import flex as attention_flex
from pha.ops.attention.flex import block_mask, flex, serves
from tests.ops.common import (
    Function,
    Inputs,
    converted,
    cpu_backends,
    gradcheck,
    magnitudes,
    mask_of,
    moved,
    outcome,
    worst,
)

BACKENDS = cpu_backends("attention")

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def backend_function(name: str) -> Function:
    return OPS["attention"].backends[name]


def problem(
    B: int,
    H: int,
    G: int,
    T: int,
    S: int,
    K: int,
    dtype: torch.dtype = torch.float64,
    masked: bool = False,
    window: int | None = None,
) -> Inputs:
    """What the model makes: unit vectors, the queries times a temperature of 10."""
    generator = torch.Generator().manual_seed(H * 10000 + T * 100 + K)
    shapes = (B, H, T, K), (B, G, S, K), (B, G, S, K)
    q, k, v = (torch.randn(x, generator=generator, dtype=torch.float64) for x in shapes)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    mask = mask_of(T, S, *starts_and_padding(B, S)) if masked else None
    inputs = {"q": (10 * q).to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    return inputs | {"mask": mask, "window": window}


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


def error(actual: dict[str, Tensor], expected: dict[str, Tensor], inputs: Inputs) -> float:
    """The largest error of y, dq, dk and dv over the size of the terms that make each of them up.

    The gradients of q and k are differences of dp = dy v^T, and may vanish (one key) though dp
    does not: rounding is then relative to |dp| |k| and |dp| |q|.
    """
    q, k, v = (inputs[name].double() for name in "qkv")
    dp = float(v.norm(dim=-1).max()) * v.shape[-1] ** 0.5
    size = magnitudes({"y": v, "dq": dp * k, "dk": dp * q})
    return worst(actual, expected, size)


@each_backend
@pytest.mark.parametrize(("T", "S"), [(6, 6), (7, 7), (5, 9), (1, 8)])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_a_loop_over_keys(
    backend: str, T: int, S: int, window: int | None, masked: bool
) -> None:
    inputs = problem(2, 4, 2, T, S, 6, masked=masked, window=window)
    starts, tokens = starts_and_padding(2, S)
    document = starts.cumsum(-1)

    def allowed(b: int, query: int, key: int) -> bool:
        if not query - (window or S) < key <= query:
            return False
        if not masked or key == query:
            return True
        return bool(document[b, query] == document[b, key]) and bool(tokens[b, key])

    expected = literal(inputs["q"], inputs["k"], inputs["v"], allowed)
    y = backend_function(backend)(**inputs)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("K", [60, 64, 76])
@pytest.mark.parametrize(("H", "G"), [(8, 2), (6, 2), (3, 3)], ids=["4:1", "3:1", "1:1"])
@pytest.mark.parametrize(("T", "past"), [(1, 0), (1, 5), (7, 5), (63, 0), (63, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_oracle(K: int, H: int, G: int, T: int, past: int, masked: bool) -> None:
    inputs = converted(
        problem(2, H, G, T, T + past, K, torch.float32, masked=masked), torch.float64
    )
    expected = outcome(backend_function("naive"), inputs)
    # Softmax over at most 68 keys: a few dozen roundings of each type.
    for dtype, limit in ((torch.float64, 5e-15), (torch.float32, 2e-6)):
        actual = outcome(backend_function("sdpa"), converted(inputs, dtype))
        assert error(actual, expected, inputs) <= limit, dtype


@pytest.mark.parametrize("window", [1, 5, 16, 64, 500])
@pytest.mark.parametrize(("T", "past"), [(63, 0), (40, 23), (1, 70)])
@pytest.mark.parametrize("masked", [False, True])
def test_windows_in_blocks_match_the_oracle(
    window: int, T: int, past: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pha.ops.attention.sdpa"], "WINDOW_BLOCK", 16)
    inputs = problem(2, 8, 2, T, T + past, 60, masked=masked, window=window)
    actual, expected = (outcome(backend_function(name), inputs) for name in ("sdpa", "naive"))
    assert error(actual, expected, inputs) <= 5e-15


@each_backend
@pytest.mark.parametrize("K", [60, 76])
def test_bfloat16_is_as_good_as_its_inputs(backend: str, K: int) -> None:
    inputs = problem(2, 8, 2, 63, 63, K, torch.bfloat16)
    y = backend_function(backend)(**inputs)
    assert y.dtype == torch.bfloat16
    expected = backend_function("naive")(**converted(inputs, torch.float64))
    # The oracle in bfloat16 rounds logits of up to 10 by 2^-8, so weights by 2%.
    assert float((y.double() - expected).abs().max() / inputs["v"].abs().max()) <= 0.02


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_is_not_a_number(backend: str, dtype: torch.dtype) -> None:
    inputs = problem(3, 4, 2, 9, 9, 60, dtype)
    tokens = torch.ones(3, 9, dtype=torch.bool)
    tokens[0, :4] = False
    tokens[1] = False  # a row of nothing but padding
    starts = torch.zeros(3, 9, dtype=torch.bool)
    starts[:, [4, 5]] = True
    inputs["mask"] = mask_of(9, 9, starts, tokens)
    results = outcome(backend_function(backend), inputs)
    assert all(bool(x.isfinite().all()) for x in results.values())
    # A position that sees only itself returns its own value.
    y, own = results["y"], inputs["v"].double().repeat_interleave(2, dim=1)
    assert torch.equal(y[1], own[1])
    assert torch.equal(y[:, :, 4], own[:, :, 4])


@each_backend
@pytest.mark.parametrize("past", [0, 5])
def test_later_keys_do_not_matter(backend: str, past: int) -> None:
    inputs = problem(1, 4, 1, 70, 70 + past, 60, torch.float32)
    y = backend_function(backend)(**inputs)
    inputs["k"][:, :, past + 40 :] += 1.0
    inputs["v"][:, :, past + 40 :] -= 1.0
    changed = backend_function(backend)(**inputs)
    assert torch.equal(y[:, :, :40], changed[:, :, :40])
    assert not torch.equal(y[:, :, 40:], changed[:, :, 40:])


@pytest.mark.parametrize(("T", "S"), [(3, 3), (2, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(T: int, S: int, masked: bool) -> None:
    # Central differences with step 1e-6: third derivatives of the softmax times 1e-12, and
    # float64 rounding over the step, 1e-10.
    gradcheck(backend_function("sdpa"), problem(1, 4, 2, T, S, 3, masked=masked), atol=1e-8)


# Masks


@pytest.mark.parametrize(("T", "S"), [(11, 11), (4, 11), (1, 11)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_mask_by_its_definition(T: int, S: int, documents: bool, padding: bool) -> None:
    starts, tokens = starts_and_padding(3, S)
    keys = torch.arange(S)
    flags = starts if documents else None, tokens if padding else None
    mask = attention_mask(keys[S - T :], keys, *flags).expand(3, 1, T, S)
    for b in range(3):
        for row in range(T):
            query = S - T + row
            for key in range(S):
                same_document = not documents or not starts[b, key + 1 : query + 1].any()
                visible = not padding or bool(tokens[b, key]) or key == query
                expected = key <= query and bool(same_document) and visible
                assert bool(mask[b, 0, row, key]) == expected, (b, query, key)


def test_masks_of_some_places_are_cut_from_those_of_all() -> None:
    flags, places = starts_and_padding(2, 12), torch.arange(12)
    whole = attention_mask(places[-4:], places, *flags)
    kept = torch.tensor([9, 6, 11, 7, 10])
    assert torch.equal(attention_mask(places[-4:], kept, *flags), whole[..., kept])
    unfilled = attention_mask(places[-4:], torch.tensor([-1, 12]), *flags)
    assert not unfilled.any()


# FlexAttention: which positions it visits, and when it is asked at all. Its kernels need a GPU.


SHAPES = [(1, 3, 1, 1, 24), (1, 6, 2, 131, 20), (2, 4, 2, 160, 60), (2, 2, 2, 257, 16)]


def packed(shape: tuple[int, ...], documents: bool, window: int | None) -> Inputs:
    """Numbers of order one half, in few documents: flex skips blocks of 128 positions."""
    B, H, G, T, K = shape
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, heads, T, K, generator=generator) * 0.4 for heads in (H, G, G))
    starts = torch.rand(B, T, generator=generator) < 0.04
    mask = mask_of(T, T, starts) if documents else None
    return {"q": q, "k": k, "v": v, "mask": mask, "window": window}


each_bound = pytest.mark.parametrize(
    ("documents", "window"), [(True, None), (False, 40), (True, 40), (True, 1)]
)


@pytest.fixture
def quiet() -> None:
    """Without compiling, torch warns that FlexAttention writes everything out."""
    warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("shape", SHAPES[:2])
@each_bound
def test_flex_gives_the_values_of_the_oracle(
    shape: tuple[int, ...], documents: bool, window: int | None
) -> None:
    inputs = packed(shape, documents, window)
    torch.testing.assert_close(flex(**inputs), backend_function("naive")(**inputs))


@pytest.mark.usefixtures("quiet")
def test_the_last_queries_of_more_keys_look_where_they_should() -> None:
    inputs = problem(2, 4, 2, 50, 140, 20, torch.float32, window=30)
    torch.testing.assert_close(flex(**inputs), backend_function("naive")(**inputs))


def test_blocks_out_of_reach_are_skipped() -> None:
    cpu = torch.device("cpu")
    counts = block_mask(None, 128, 1024, 1024, cpu).to_dense().sum((-1, -2))
    assert counts.item() == 8 + 7  # the diagonal of 128 x 128 blocks and the one below
    starts = torch.zeros(2, 1024, dtype=torch.bool)
    starts[1, 512] = True
    counts = block_mask(mask_of(1024, 1024, starts), None, 1024, 1024, cpu).to_dense()
    assert counts.sum((-1, -2)).flatten().tolist() == [36, 20]


def test_the_blocks_of_a_mask_are_found_once_and_go_with_it() -> None:
    mask: Tensor | None = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
    assert mask is not None
    first = block_mask(mask, None, 256, 256, mask.device)
    assert block_mask(mask, None, 256, 256, mask.device) is first
    assert block_mask(mask, 9, 256, 256, mask.device) is not first
    kept = len(attention_flex._masks)
    mask = None
    gc.collect()
    assert len(attention_flex._masks) == kept - 1


def test_blocks_that_an_evaluation_found_serve_training() -> None:
    attention_flex._unmasked.cache_clear()
    with torch.inference_mode():
        blocks = attention_flex._unmasked(37, 150, 150, torch.device("cpu"))
    assert not blocks.kv_num_blocks.is_inference()


def test_on_a_cpu_it_is_not_asked() -> None:
    inputs = packed(SHAPES[2], True, None)
    assert not serves(inputs["q"], inputs["k"], inputs["mask"], None)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES[1:])
@each_bound
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_on_a_gpu(
    shape: tuple[int, ...],
    documents: bool,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if device.type != "cuda":
        pytest.skip("has no backward pass on a CPU")
    inputs = moved(converted(packed(shape, documents, window), dtype), device)
    assert serves(inputs["q"], inputs["k"], inputs["mask"], window)
    actual = outcome(flex, inputs)
    expected = outcome(backend_function("naive"), converted(inputs, torch.float64))
    # FlexAttention multiplies float32 in TF32 where torch allows it, which it does not by default.
    assert worst(actual, expected) <= (2e-2 if dtype == torch.bfloat16 else 1e-4)
