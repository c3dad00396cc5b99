"""The compiled attention: arithmetic at odd sizes, what it serves, threads, torch.compile."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, attention_blocked, numba_runtime
from pha.ops.attention_blocked import blocked_attention, serves

numba_tiles = pytest.importorskip("pha.ops.numba_tiles")
naive, sdpa = (OPS["attention"].backends[name] for name in ("naive", "sdpa"))
TYPES = [
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if numba_tiles.supported(dtype == torch.bfloat16)
]
pytestmark = pytest.mark.skipif(not TYPES, reason="needs AVX-512")
each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(
    B: int,
    H: int,
    G: int,
    T: int,
    S: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    scale: float = 10.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the model makes them; v lies in memory as (B, S, G, K)."""
    generator = torch.Generator().manual_seed(T * 100 + K)
    q = torch.randn(B, H, T, K, generator=generator)
    k = torch.randn(B, G, S, K, generator=generator)
    v = torch.randn(B, S, G, K, generator=generator).transpose(1, 2)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    return (scale * q).to(dtype), k.to(dtype), v.to(dtype)


def values_and_gradients(
    function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, window: int | None = None
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = function(*leaves, window=window)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    return [y.detach(), *torch.autograd.grad(y, leaves, weight.to(y.dtype))]


def errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Largest error of y, dq, dk and dv, each over its own largest element."""
    return [
        float((x.double() - y).abs().max() / y.abs().max())
        for x, y in zip(actual, expected, strict=True)
    ]


SIZES = [
    (1, 2, 2, 2, 1, 6),  # one head dimension word and a half of float32, no multiple of anything
    (2, 3, 1, 5, 5, 7),  # an odd head size: half a word of bfloat16 is padding
    (2, 4, 1, 63, 0, 20),
    (2, 3, 1, 66, 97, 60),
    (1, 4, 4, 65, 0, 64),
    (1, 2, 1, 500, 0, 76),
    (1, 4, 2, 97, 933, 76),
    (1, 3, 1, 1030, 0, 64),
    (1, 2, 1, 70, 0, 130),  # nine vectors: several panels
]


@each_type
@pytest.mark.parametrize(("B", "H", "G", "T", "past", "K"), SIZES)
@pytest.mark.parametrize("window", [None, 3, 100])
def test_matches_the_oracle(
    dtype: torch.dtype, B: int, H: int, G: int, T: int, past: int, K: int, window: int | None
) -> None:
    inputs = problem(B, H, G, T, T + past, K, dtype)
    exact = values_and_gradients(naive, *(x.double() for x in inputs), window=window)
    actual = values_and_gradients(blocked_attention, *inputs, window=window)
    assert [x.dtype for x in actual] == [dtype] * 4
    # Sums of up to 1,030 terms; in bfloat16 the weights and the results are rounded to 2^-9.
    limit = 1e-5 if dtype == torch.float32 else 0.02
    assert max(errors(actual, exact)) <= limit


@pytest.mark.skipif(torch.bfloat16 not in TYPES, reason="needs AVX-512 BF16")
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("K", [60, 64, 76])
def test_bfloat16_is_no_worse_than_torch(scale: float, K: int) -> None:
    inputs = problem(2, 4, 2, 400, 400, K, torch.bfloat16, scale)
    exact = values_and_gradients(naive, *(x.double() for x in inputs))

    def mean_errors(function: Callable[..., Tensor]) -> list[float]:
        found = values_and_gradients(function, *inputs)
        return [float((x - y).square().mean()) ** 0.5 for x, y in zip(found, exact, strict=True)]

    for ours, theirs in zip(mean_errors(blocked_attention), mean_errors(sdpa), strict=True):
        assert ours <= 1.1 * theirs


@each_type
def test_large_logits_and_faint_weights(dtype: torch.dtype) -> None:
    """The maximum rises from block to block, by far more than the exponential can hold."""
    S, K = 700, 20
    q = torch.ones(1, 1, S, K, dtype=dtype)
    k = torch.zeros(1, 1, S, K, dtype=dtype)
    k[..., 0] = torch.arange(S).to(dtype)
    v = torch.randn(1, 1, S, K, generator=torch.Generator().manual_seed(0)).to(dtype)
    for sign in (1, -1):
        exact = values_and_gradients(naive, *(x.double() for x in (q, sign * k, v)))
        actual = values_and_gradients(blocked_attention, q, sign * k, v)
        assert errors(actual[:1], exact[:1])[0] <= (1e-5 if dtype == torch.float32 else 0.01)
        assert all(bool(x.isfinite().all()) for x in actual)


@each_type
@pytest.mark.parametrize("window", [None, 150])
def test_later_tokens_and_other_rows_change_nothing(dtype: torch.dtype, window: int | None) -> None:
    q, k, v = problem(2, 4, 2, 300, 420, 60, dtype)
    before = values_and_gradients(blocked_attention, q, k, v, window)
    for t in (1, 98, 171):
        q2, k2, v2 = (x.clone() for x in (q, k, v))
        q2[:, :, t:] *= -3
        k2[:, :, t + 120 :] += 5
        v2[:, :, t + 120 :] -= 1
        q2[1], k2[1], v2[1] = 0, 1, 2
        after = blocked_attention(q2, k2, v2, window)
        assert torch.equal(after[0, :, :t], before[0][0, :, :t])
        assert not torch.equal(after[0, :, t:], before[0][0, :, t:])
        alone = values_and_gradients(blocked_attention, q[1:], k[1:], v[1:], window)
        assert torch.equal(alone[0][0], before[0][1])


@each_type
def test_any_number_of_threads_any_time(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    inputs = problem(1, 3, 1, 333, 400, 76, dtype)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(values_and_gradients(blocked_attention, *inputs))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


@each_type
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    q, k, v = problem(2, 4, 2, 50, 90, 20, dtype)
    expected = values_and_gradients(blocked_attention, q, k, v)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.nn.functional.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
    ]
    for view in views:
        actual = values_and_gradients(blocked_attention, *(view(x) for x in (q, k, v)))
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    # The gradient of a sum is one number, expanded.
    summed = torch.autograd.grad(blocked_attention(*leaves).sum(), leaves)
    written = torch.autograd.grad(blocked_attention(*leaves), leaves, torch.ones_like(q))
    assert all(torch.equal(x, y) for x, y in zip(summed, written, strict=True))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradient_of_one_input_alone(wanted: int) -> None:
    inputs = list(problem(1, 4, 2, 40, 60, 20))
    expected = values_and_gradients(lambda *x, window: blocked_attention(*x).square(), *inputs)
    inputs[wanted] = inputs[wanted].requires_grad_()
    y = blocked_attention(*inputs).square()
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    (gradient,) = torch.autograd.grad(y, inputs[wanted], weight)
    assert torch.equal(gradient, expected[1 + wanted])


def test_not_a_number_stays_one() -> None:
    q, k, v = problem(1, 2, 1, 300, 300, 20)
    q[0, 0, 7, 3] = torch.nan
    v[0, 0, 200, 5] = torch.nan
    y = blocked_attention(q, k, v)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[0, 0, 7] = True
    expected[0, :, 200:, 5] = True
    assert bool(y.isnan()[expected].all())
    assert not bool(y[0, :, :192].isnan()[~expected[0, :, :192]].any())


@pytest.mark.parametrize("window", [None, 33])
def test_compiled_by_torch(window: int | None) -> None:
    inputs = problem(2, 4, 2, 70, 130, 20)
    expected = values_and_gradients(OPS["attention"].backends["blocked"], *inputs, window=window)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x, window: 1 * OPS["attention"].backends["blocked"](*x, None, window),
        backend="aot_eager",
        fullgraph=True,
    )
    actual = values_and_gradients(compiled, *inputs, window=window)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_operator_is_registered_as_torch_wants() -> None:
    inputs = [x.requires_grad_() for x in problem(1, 2, 1, 20, 30, 6)]
    torch.library.opcheck(torch.ops.pha.blocked_attention.default, (*inputs, 9))


def test_under_autocast() -> None:
    q, k, v = problem(1, 2, 1, 130, 130, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = OPS["attention"].backends["blocked"](q, k, v)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, naive(q, k, v), rtol=0, atol=1e-5)


def test_what_it_does_not_serve_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = problem(1, 2, 1, 256, 256, 20)
    assert serves(q, k, v, None)
    assert not serves(q, k, v, torch.ones(1, 1, 256, 256, dtype=torch.bool))
    assert not serves(q[:, :, -1:], k, v, None)
    assert not serves(q.double(), k.double(), v.double(), None)
    assert not serves(q.half(), k.half(), v.half(), None)
    assert not serves(q.bfloat16(), k, v, None)
    monkeypatch.setattr(numba_tiles, "supported", lambda bfloat16: False)
    attention_blocked._compiled.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not serves(q, k, v, None)
        assert torch.equal(OPS["attention"].backends["blocked"](q, k, v), sdpa(q, k, v))
    attention_blocked._compiled.cache_clear()


def test_without_numba_torch_takes_over_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = attention_blocked._compiled, numba_runtime.kernel, numba_runtime._warn
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(numba_runtime, "_FAULTS", {})
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "pha.ops.numba_tiles")
    q, k, v = problem(1, 2, 1, 256, 256, 20)
    with pytest.warns(RuntimeWarning, match="attention run several times slower.*numba") as seen:
        y = OPS["attention"].backends["blocked"](q, k, v)
    assert len(seen) == 1
    assert torch.equal(y, sdpa(q, k, v))
    for cached in caches:
        cached.cache_clear()


def test_compiled_for_another_processor_than_this_one() -> None:
    """Instructions that numba was told not to use would end the process."""
    script = """
import torch
from pha.ops import OPS
x = torch.ones(1, 1, 300, 20, dtype=torch.bfloat16)
y = OPS["attention"].backends["blocked"](x, x, x)
assert torch.equal(y, OPS["attention"].backends["sdpa"](x, x, x))
"""
    environment = {"NUMBA_CPU_NAME": "generic", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
