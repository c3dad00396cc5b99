"""The elements of the compiled kernel, and how it is compiled, kept and run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from pha.decoder import elements, kernel, runtime
from tests.modeling.common import assert_same, scrambled, small_config, tokens

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run(script: str, **environment: str) -> str:
    """What a fresh process prints; no warning of ours may be among it."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", script],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout


def test_exponential() -> None:
    vectorised = numba.vectorize(["f4(f4)"])(lambda x: elements.exp32(x))
    x = np.concatenate([np.linspace(-87.3, 88.3, 1_000_003), [0.0, -0.0]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    units = np.abs(vectorised(x) - exact) / np.spacing(exact.astype(np.float32))
    assert units.max() <= 2
    assert vectorised(np.float32(0)) == 1
    lowest, highest = vectorised(np.array([-np.inf, np.inf], np.float32))
    assert 0 < lowest < 1.3e-38
    assert 2e38 < highest < np.inf
    assert np.isnan(vectorised(np.array([np.nan], np.float32))).all()


def test_exponential_less_one() -> None:
    vectorised = numba.vectorize(["f4(f4)"])(lambda x: elements.expm1_32(x))
    x = np.concatenate([-np.logspace(-9, 1.9, 1_000_003), [0.0]]).astype(np.float32)
    exact = np.expm1(x.astype(np.float64))
    units = np.abs(vectorised(x) - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert units.max() <= 3


def test_bfloat16_is_read_and_rounded_as_torch_does() -> None:
    @numba.njit
    def add(a: np.ndarray, b: np.ndarray) -> None:
        for i in range(a.size):
            a[i] = elements.narrow(elements.widen(a[i]) + elements.widen(b[i]), a[i])

    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    # Sums of two such numbers meet every case of rounding: up, down, ties, infinity, NaN.
    other = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    total = every.clone()
    add(total.view(torch.uint16).numpy(), other.view(torch.uint16).numpy())
    expected = (every.float() + other.float()).bfloat16()
    assert torch.equal(total.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(total[number], expected[number])


def test_one_byte_that_is_different_is_seen() -> None:
    first, second = np.arange(7, dtype=np.float32), np.arange(3, dtype=np.uint16)
    kept = np.concatenate([x.view(np.uint8) for x in (first, second)])
    addresses = np.array([first.ctypes.data, second.ctypes.data], np.int64)
    sizes = np.array([first.nbytes, second.nbytes], np.int64)
    assert kernel.same(addresses, sizes, kept)
    second[2] += 1
    assert not kernel.same(addresses, sizes, kept)


@needs_fork
def test_after_a_fork() -> None:
    parts: list[int] = []
    runtime.together(lambda part, of: parts.append(part), 3)
    child = os.fork()
    if child == 0:  # which has none of its parent's threads
        signal.alarm(60)
        try:
            runtime.together(lambda part, of: parts.append(part), 3)
        finally:
            os._exit(0 if sorted(parts) == [0, 0, 1, 1, 2, 2] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
def test_what_is_compiled_is_kept_where_it_can_be_written(tmp_path: Path) -> None:
    script = """
import torch, pha
from pha.decoder import kernel
model = pha.PHAForCausalLM(pha.PHAConfig.from_preset("pha-tiny", vocab_size=31)).eval()
model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4)
print(sum(kernel.run.stats.cache_hits.values()), sum(kernel.run.stats.cache_misses.values()))
"""
    places = {"PHA_CACHE": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    assert [run(script, **places).split() for _ in range(2)] == [["0", "1"], ["1", "0"]]
    assert list((tmp_path / "numba").rglob("*.nbc"))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(name: str, dtype: torch.dtype) -> None:
        raise RuntimeError("no such processor")

    runtime.kernel.cache_clear()
    monkeypatch.setattr(runtime, "_FAULTS", [])
    monkeypatch.setattr(runtime, "_compile", fail)
    yield
    runtime.kernel.cache_clear()


@pytest.mark.usefixtures("broken")
def test_where_numba_fails_the_layers_write_and_say_so() -> None:
    model, ids = scrambled(small_config()), tokens(1, 8)
    with torch.no_grad():
        cache = model(ids[:, :6]).past_key_values
        with pytest.warns(RuntimeWarning, match=r"by the layers, as numba fails .*no such proc"):
            model(ids[:, 6:7], past_key_values=cache)
        logits = model(ids[:, 7:], past_key_values=cache).logits
        assert_same(logits, model(ids).logits[:, 7:])


@pytest.mark.slow
@needs_fork
def test_without_numba_or_without_the_folder_the_layers_write() -> None:
    # Each child imports pha without one of the two; what takes long to import they share.
    script = """
import os, sys, torch, transformers.modeling_utils, transformers.generation
for missing in ("numba", "pha.decoder"):
    child = os.fork()
    if child == 0:
        sys.modules[missing] = None
        import pha
        assert pha.PHAForCausalLM.decode is None
        model = pha.PHAForCausalLM(pha.PHAConfig.from_preset("pha-tiny", vocab_size=31))
        ids = torch.ones(1, 3, dtype=torch.long)
        print(model.generate(ids, max_new_tokens=4).shape[1], flush=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    assert run(script).split() == ["7", "7"]
