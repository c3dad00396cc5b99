"""Causal grouped-query attention: every backend against the oracle, the oracle against a loop."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pha.ops import OPS
from pha.ops.attention import attention, attention_mask, block_mask, takes_blocks
from pha.ops.attention import flex as attention_flex
from pha.ops.attention import sdpa as attention_sdpa
from pha.ops.attention.flex import BLOCK
from pha.ops.attention.naive import written_out
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


@pytest.mark.parametrize("K", [60, 76])
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


@pytest.fixture
def quiet() -> None:
    """Without compiling, torch warns that FlexAttention writes everything out."""
    warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")


class Sizes(TorchDispatchMode):
    """Sees how many elements the largest tensor has that an operation makes."""

    largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not function.is_view:
                self.largest = max(self.largest, x.numel())
        return result


def seen_by_blocks(blocks: BlockMask) -> Tensor:
    """What the kernel computes: blocks in full, and of others what the mask says."""
    T, S = blocks.shape[-2:]
    parts = [
        BlockMask.from_kv_blocks(counts, places, BLOCK_SIZE=BLOCK, seq_lengths=(T, S)).to_dense()
        for counts, places in (
            (blocks.kv_num_blocks, blocks.kv_indices),
            (blocks.full_kv_num_blocks, blocks.full_kv_indices),
        )
        if counts is not None and places is not None
    ]
    partly, fully = (
        x.bool().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[..., :T, :S] for x in parts
    )
    exact = written_out(blocks)
    assert exact is not None
    return fully | (partly & exact)


@pytest.mark.parametrize(
    ("T", "S", "first"), [(1, 1, 0), (256, 256, 0), (300, 300, 0), (130, 401, 0), (257, 500, -43)]
)
@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_blocks_say_what_the_mask_says(
    T: int, S: int, first: int, window: int | None, documents: bool, padding: bool
) -> None:
    generator = torch.Generator().manual_seed(T)
    key = torch.arange(S) + first
    query = key[S - T :] if first == 0 else key[-first : T - first]  # cached, or in fixed places
    starts = torch.rand(2, S, generator=generator) < 0.008 if documents else None
    if starts is not None:  # whole blocks of one document each, beside those of another
        starts[0] = torch.arange(S) % BLOCK == 0
    tokens = None
    if padding:  # holes, and rows that begin or end with nothing
        tokens = torch.rand(2, S, generator=generator) < 0.99
        tokens[0, : S // 3] = False
        tokens[1, S - S // 4 :] = False
    blocks = block_mask(query, key, starts, tokens, window)
    expected = attention_mask(query, key, starts, tokens, window)
    assert torch.equal(seen_by_blocks(blocks), expected.expand(blocks.shape[0], -1, -1, -1))


def test_blocks_out_of_reach_are_skipped_and_none_is_asked_in_vain() -> None:
    places = torch.arange(1024)

    def visited(*bounds: Any) -> list[int]:
        return block_mask(places, places, *bounds).to_dense().sum((-1, -2)).flatten().tolist()

    assert visited(None, None, 128) == [8 + 7]  # the diagonal of blocks and the one below
    starts = torch.zeros(2, 1024, dtype=torch.bool)
    starts[1, 512] = True
    assert visited(starts) == [36, 20]
    partly = block_mask(places, places, starts).kv_num_blocks.sum(-1).flatten().tolist()
    assert partly == [8, 8]  # the diagonal alone


def test_blocks_take_no_memory_of_the_size_of_the_logits() -> None:
    T = 1 << 16
    places = torch.arange(T)
    with Sizes() as sizes:
        block_mask(places, places, torch.rand(2, T) < 0.001, torch.rand(2, T) < 0.9, 5000)
    assert sizes.largest <= 2 * (T // BLOCK + 1) ** 2  # pairs of blocks


SHAPES = [(1, 3, 1, 1, 24), (1, 6, 2, 131, 20), (2, 4, 2, 160, 60), (2, 2, 2, 257, 16)]


def packed(
    shape: tuple[int, ...], documents: bool, window: int | None, device: str = "cpu"
) -> Inputs:
    """Numbers of order one half, in few documents, and the blocks that they leave."""
    B, H, G, T, K = shape
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, heads, T, K, generator=generator) * 0.4 for heads in (H, G, G))
    places = torch.arange(T, device=device)
    starts = (torch.rand(B, T, generator=generator) < 0.04).to(device) if documents else None
    return {"q": q, "k": k, "v": v, "mask": block_mask(places, places, starts, window=window)}


BOUNDS = [(True, None), (False, 40), (True, 40), (True, 1)]
each_bound = pytest.mark.parametrize(("documents", "window"), BOUNDS)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("shape", SHAPES[:2])
@each_bound
@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_blocks_give_the_values_of_the_oracle(
    shape: tuple[int, ...], documents: bool, window: int | None, backend: str
) -> None:
    inputs = packed(shape, documents, window)
    expected = backend_function("naive")(**inputs)
    torch.testing.assert_close(backend_function(backend)(**inputs), expected)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("T", "S"), [(130, 200), (140, 140)])
def test_flex_sees_by_itself_that_keys_are_cached_or_out_of_reach(T: int, S: int) -> None:
    inputs = problem(2, 4, 2, T, S, 20, torch.float32, window=30)
    with mock.patch.object(attention_flex, "flex", wraps=attention_flex.flex) as asked:
        actual = backend_function("flex")(**inputs)
    assert asked.called
    torch.testing.assert_close(actual, backend_function("naive")(**inputs))


def test_flex_is_compiled_where_the_layers_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled it is the whole matrix: as the watch and an evaluation's last rows ask for."""
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def first(q: Tensor, *_: Any, **options: Any) -> Tensor:
        return q + 1

    monkeypatch.setattr(attention_flex, "_compiled", torch.compile(first, backend=count))
    q = torch.empty(1, 2, BLOCK, 16, device="meta")  # anywhere but on a CPU
    places = torch.arange(BLOCK)
    with torch.compiler.set_stance("force_eager"):
        attention_flex.flex(q, q, q, block_mask(places, places))
        assert torch.compile(first, backend=count)(q).shape == q.shape
    assert len(graphs) == 1


@pytest.mark.gpu  # where each case is compiled for some seconds, so not all of them
@pytest.mark.parametrize(
    ("shape", "documents", "window", "dtype"),
    [
        *((SHAPES[2], *bound, torch.bfloat16) for bound in BOUNDS),
        *((shape, True, 40, torch.bfloat16) for shape in (SHAPES[1], SHAPES[3])),
        *((SHAPES[2], True, window, torch.float32) for window in (None, 40)),
    ],
)
def test_flex_on_a_gpu(
    shape: tuple[int, ...],
    documents: bool,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if device.type != "cuda":
        pytest.skip("has no backward pass on a CPU")
    inputs = moved(converted(packed(shape, documents, window, device.type), dtype), device)
    actual = outcome(backend_function("flex"), inputs)
    expected = outcome(backend_function("naive"), converted(inputs, torch.float64))
    if window == 1:  # a softmax over one key: no gradient for what it is of
        for name in ("dq", "dk"):
            assert max(x.pop(name).abs().max() for x in (actual, expected)) <= 2e-2
    # FlexAttention multiplies float32 in TF32 where torch allows it, which it does not by default.
    assert worst(actual, expected) <= (2e-2 if dtype == torch.bfloat16 else 1e-4)


# The kernels that a GPU is asked for, by name. Which takes what is of torch's sdp_utils.cpp.


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[SDPBackend]]:
    """The kernels that were named, each time that attention was computed; on any device."""
    found: list[list[SDPBackend]] = []

    @contextmanager
    def name(kernels: list[SDPBackend], set_priority: bool) -> Iterator[None]:
        found.append(kernels)
        yield

    monkeypatch.setattr(attention_sdpa, "sdpa_kernel", name)
    monkeypatch.setattr(attention_sdpa, "_has_flash", lambda device: True)
    return found


def refuse_what_no_kernel_takes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kernels: list[SDPBackend],
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    assert q.shape[3] % 8 == k.shape[3] % 8 == v.shape[3] % 8 == 0
    assert enable_gqa == (q.shape[1] != k.shape[1])
    if SDPBackend.EFFICIENT_ATTENTION in kernels:
        assert not enable_gqa
        assert not (is_causal and mask is not None)
    else:
        assert mask is None
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert not is_causal or q.shape[2] == k.shape[2]


@pytest.mark.parametrize(
    ("T", "S", "masked"), [(1, 2, False), (1, 40, True), (9, 9, True), (130, 130, False)]
)
@pytest.mark.parametrize(("H", "G", "K"), [(6, 2, 20), (4, 4, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_named_kernels_are_given_is_the_same_attention(
    T: int,
    S: int,
    masked: bool,
    H: int,
    G: int,
    K: int,
    dtype: torch.dtype,
    asked: list[list[SDPBackend]],
) -> None:
    inputs = problem(2, H, G, T, S, K, dtype, masked)
    del inputs["window"]

    def named(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention_sdpa._by_named_kernels(q, k, v, mask, causal=mask is None and T > 1)

    actual = outcome(named, inputs)
    expected = outcome(backend_function("naive"), converted(inputs, torch.float64))
    assert worst(actual, expected) <= (1e-5 if dtype == torch.float32 else 2e-2)
    efficient = dtype == torch.float32 or masked
    assert asked == [[SDPBackend.EFFICIENT_ATTENTION] if efficient else attention_sdpa.TRAINING]


@pytest.mark.parametrize(("T", "S", "masked"), [(1, 1, False), (1, 40, True), (8, 21, True)])
@pytest.mark.parametrize(("H", "G", "K"), [(6, 2, 20), (4, 4, 7), (3, 1, 76)])
def test_few_queries_are_the_same_attention(
    T: int, S: int, masked: bool, H: int, G: int, K: int
) -> None:
    inputs = problem(2, H, G, T, S, K, torch.float64, masked)
    del inputs["window"]
    q, k, v = inputs["q"], *(torch.cat([inputs[x]] * 2, 2)[:, :, :S] for x in "kv")
    actual = attention_sdpa.few_queries(q, k, v, inputs["mask"])
    torch.testing.assert_close(actual, backend_function("naive")(**inputs))


@pytest.mark.parametrize(("T", "masked"), [(1, False), (8, True), (8, False)])
def test_few_queries_ask_for_no_kernel_unless_one_is_named_or_differentiated(
    T: int, masked: bool, asked: list[list[SDPBackend]]
) -> None:
    inputs = problem(2, 6, 2, T, 8, 20, torch.float32, masked)
    q, k, v, mask = (inputs[name] for name in ("q", "k", "v", "mask"))
    causal = mask is None and T > 1
    with torch.no_grad():
        y = attention_sdpa._by_named_kernels(q, k, v, mask, causal)
        assert not asked
        attention_sdpa._by_named_kernels(q, k, v, mask, causal, [SDPBackend.FLASH_ATTENTION])
    assert len(asked) == 1
    attention_sdpa._by_named_kernels(q.requires_grad_(), k, v, mask, causal)
    assert len(asked) == 2
    torch.testing.assert_close(y, backend_function("naive")(q.detach(), k, v, mask))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("T", "masked"), [(1, False), (1, True), (5, True)])
def test_few_queries_on_a_gpu(
    T: int, masked: bool, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = moved(problem(2, 12, 4, T, 300, 76, dtype, masked), device)
    with torch.no_grad():
        actual = backend_function("flex")(**inputs)
        expected = backend_function("naive")(**converted(inputs, torch.float64))
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= (1e-2 if dtype == torch.bfloat16 else 1e-5)


LENGTH = 16384
PATHS: dict[str, tuple[int, bool, int | None]] = {  # queries, padding, window
    "a prompt": (LENGTH, False, None),
    "a prompt with padding": (LENGTH, True, None),
    "a prompt in a window": (LENGTH, False, 4096),
    "a piece of a prompt": (1024, False, None),
    "a short piece": (100, False, None),
    "a token": (1, False, None),
    "a token and places that are not filled": (1, True, None),
}


@pytest.mark.parametrize("which", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("K", [60, 76])
def test_a_gpu_never_holds_the_logits(
    which: str,
    dtype: torch.dtype,
    K: int,
    asked: list[list[SDPBackend]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted on tensors that have no numbers, with the kernels left out."""
    T, padded, window = PATHS[which]
    H, G, sizes = 12, 4, Sizes()

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> Tensor:
        refuse_what_no_kernel_takes(
            q, k, v, mask, asked[-1], options["is_causal"], options["enable_gqa"]
        )
        return q.new_empty(*q.shape[:3], v.shape[3])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(attention_flex, "flex", lambda q, k, v, blocks: torch.empty_like(q))
    # Without a GPU its tensors cannot be indexed, not even these: so as if this were one.
    monkeypatch.setattr(attention_sdpa, "_sdpa", attention_sdpa._by_named_kernels)
    with FakeTensorMode():
        q = torch.empty(1, H, T, K, dtype=dtype)
        k, v = (torch.empty(1, G, LENGTH, K, dtype=dtype) for _ in range(2))
        key = torch.arange(LENGTH)
        tokens = torch.ones(1, LENGTH, dtype=torch.bool) if padded else None
        with sizes:
            mask: Any = None
            if padded:
                make = block_mask if takes_blocks(None, T, "cuda") else attention_mask
                mask = make(key[LENGTH - T :], key, None, tokens, window)
            y = attention(q, k, v, mask, None if padded else window, backend="flex")
    assert y.shape == q.shape
    # Keys that are repeated for heads, and heads padded; all logits of a head would be 20 times it.
    assert sizes.largest <= H * LENGTH * 80


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_one_kernel_can_be_asked_for(
    backend: str, asked: list[list[SDPBackend]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_sdpa, "_sdpa", attention_sdpa._by_named_kernels)
    inputs = problem(1, 4, 2, 9, 9, 8, torch.bfloat16)
    backend_function(backend)(**inputs)
    wanted = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    assert asked == [[wanted[backend]]]
