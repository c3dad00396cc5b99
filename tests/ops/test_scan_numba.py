"""The compiled scans: arithmetic, threads and processes, doing without numba, torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pha.ops import OPS, numba_runtime

numba = pytest.importorskip("numba")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def gradients(op: str, *inputs: Tensor, starts: Tensor | None = None) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    h, h_last = OPS[op].backends["numba"](*leaves, starts)
    total = (h.float() * h.detach().float().sin()).sum() + h_last.sin().sum()
    return [h.detach(), h_last.detach(), *torch.autograd.grad(total, leaves)]


def wide_problem(B: int, T: int, n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """gate, value, a, b, h0; some of these sizes take several blocks, or several fetches."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    a = torch.rand(n, generator=generator)
    return [normal(B, T, n).to(dtype), normal(B, T, n).to(dtype), a, normal(n), normal(B, n)]


def test_exponential() -> None:
    from pha.ops.numba_math import exp32

    vectorised = numba.vectorize(["f4(f4)"])(lambda x: exp32(x))
    x = np.concatenate([np.linspace(-87.3, 88.3, 1_000_003), [0.0, -0.0]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    units = np.abs(vectorised(x) - exact) / np.spacing(exact.astype(np.float32))
    assert units.max() <= 2
    assert vectorised(np.float32(0)) == 1
    lowest, highest = vectorised(np.array([-np.inf, np.inf], np.float32))
    assert 0 < lowest < 1.3e-38
    assert 2e38 < highest < np.inf
    assert np.isnan(vectorised(np.array([np.nan], np.float32))).all()


def test_bfloat16_is_read_and_rounded_as_torch_does() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    # Sums of two such numbers meet every case of rounding: up, down, ties, infinity, NaN.
    other = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    u = torch.stack([every, other])[None]
    h, _ = OPS["scan"].backends["numba"](u, torch.ones(2**16))
    expected = torch.stack([every, (every.float() + other.float()).bfloat16()])
    assert torch.equal(h[0].isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(h[0][number], expected[number])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5, 8200), (3, 70, 1030), (2, 130, 600)])
def test_any_number_of_threads_and_blocks(
    shape: tuple[int, int, int], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    inputs = wide_problem(*shape, dtype)
    starts = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < 0.05
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(gradients("gated_scan", *inputs, starts=starts))
    # Another cut may round a remainder of a vector loop otherwise.
    one_step = 1e-6 if dtype == torch.float32 else 2**-7
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert float((x - y).abs().max()) <= one_step * float(y.abs().max())
    naive, exact = OPS["gated_scan"].backends["naive"], [x.double() for x in inputs]
    h, h_last = naive(*exact, starts)
    assert float((results[0][0] - h).abs().max()) <= (1e-5 if dtype == torch.float32 else 0.05)
    assert float((results[0][1] - h_last).abs().max()) <= 1e-5


def test_threads_of_the_caller(threads: Callable[[int], None]) -> None:
    threads(2)
    inputs = wide_problem(2, 64, 512)
    expected = gradients("gated_scan", *inputs)
    found: list[list[Tensor]] = []
    callers = [
        threading.Thread(target=lambda: found.append(gradients("gated_scan", *inputs)))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    for result in found:
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork() -> None:
    script = """
import os, torch
from pha.ops import gated_scan
torch.set_num_threads(2)
x, a = torch.ones(2, 64, 512), torch.full((512,), 0.5)
# Compared as bytes: torch's own loops may hang after a fork.
expected = gated_scan(x, x, a, a)[0].numpy().tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if gated_scan(x, x, a, a)[0].numpy().tobytes() == expected else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.slow
def test_what_is_compiled_is_kept_where_it_can_be_written(tmp_path: Path) -> None:
    script = """
import torch, numba
from pha.ops import scan
from pha.ops.numba_scan import scan_forward
scan(torch.ones(1, 2, 3), torch.ones(3))
print(sum(scan_forward.stats.cache_hits.values()), sum(scan_forward.stats.cache_misses.values()))
"""
    environment = os.environ | {"PHA_CACHE": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    counts = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout.split()
        for _ in range(2)
    ]
    assert counts == [["0", "1"], ["1", "0"]]
    assert list((tmp_path / "numba").rglob("*.nbc"))


def test_numba_is_not_imported_before_it_is_needed() -> None:
    script = "import sys, pha, pha.ops, pha.nn; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for cached in (numba_runtime.kernel, numba_runtime._warn):
        cached.cache_clear()
    monkeypatch.setattr(numba_runtime, "_FAULTS", {})
    monkeypatch.setitem(sys.modules, "numba", None)
    yield
    for cached in (numba_runtime.kernel, numba_runtime._warn):
        cached.cache_clear()


@pytest.mark.usefixtures("without_numba")
@pytest.mark.parametrize("op", ["scan", "gated_scan"])
def test_without_numba_torch_takes_over_and_says_so_once(op: str) -> None:
    with pytest.warns(RuntimeWarning, match=r"several times slower.*numba") as seen:
        error = OPS[op].self_check("numba", "cpu")
    assert len(seen) == 1
    assert error <= 2e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OPS[op].self_check("numba", "cpu") == error


def test_float16_is_rounded_once() -> None:
    gate, value, a, b, h0 = wide_problem(2, 9, 5, torch.float16)
    for op, inputs in {"scan": (value, a, h0), "gated_scan": (gate, value, a, b, h0)}.items():
        h, h_last = OPS[op].backends["numba"](*inputs)
        exact, exact_last = OPS[op].backends["naive"](*(x.double() for x in inputs))
        assert h.dtype == torch.float16
        assert h_last.dtype == torch.float32
        assert float((h - exact).abs().max()) <= 2**-11 * float(exact.abs().max())
        assert float((h_last - exact_last).abs().max()) <= 1e-6 * float(exact_last.abs().max())


@pytest.mark.parametrize("op", ["scan", "gated_scan"])
def test_as_an_operator_of_torch(op: str) -> None:
    gate, value, a, b, h0 = (x.requires_grad_() for x in wide_problem(2, 9, 5))
    starts = torch.zeros(2, 9, dtype=torch.bool)
    inputs = (value, a, h0, starts) if op == "scan" else (gate, value, a, b, h0, starts, None)
    # Schema, fake outputs, autograd and tracing, as torch wants them of its own operators.
    torch.library.opcheck(getattr(torch.ops.pha, op).default, inputs)
