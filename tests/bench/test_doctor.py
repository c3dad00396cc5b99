"""What `pha doctor` says of backends that cannot run."""

from __future__ import annotations

import pytest

from pha.bench.doctor import examine
from pha.ops import OPS, attention_blocked, numba_runtime
from pha.ops.linear_cross_entropy import _kernel_fault
from pha.utils.hardware import default_device

ELSEWHERE = "not usable here: runs on cuda"


@pytest.mark.skipif(default_device().type == "cuda", reason="needs a machine without CUDA")
def test_what_is_for_another_device_is_neither_right_nor_wrong() -> None:
    findings = examine()
    checks = [x for x in findings["backends"] if x["backend"].startswith("triton-")]
    assert {x["op"] for x in checks} == {"scan", "gated_scan"}
    assert {(x["ok"], x["error"], x["reason"]) for x in checks} == {(None, None, ELSEWHERE)}
    assert findings["healthy"]


def test_what_torch_computes_in_its_place_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        OPS["scan"], "fault", lambda backend, device: "broken" if backend == "loop" else None
    )
    findings = examine()
    wrong = [x for x in findings["backends"] if x["ok"] is False]
    assert {(x["op"], x["backend"], x["reason"]) for x in wrong} == {
        ("scan", "loop", "cannot run: broken")
    }
    assert not findings["healthy"]


def test_kernels_that_fail_to_compile_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numba torch computes in their place, right but slow: the doctor says so."""
    kept = numba_runtime.kernel, attention_blocked._compiled, _kernel_fault, numba_runtime._warn
    for cached in kept:
        cached.cache_clear()
    monkeypatch.setattr(numba_runtime, "_FAULTS", {})
    monkeypatch.setattr(numba_runtime, "_compile", lambda *_: 1 / 0)
    with pytest.warns(RuntimeWarning):
        findings = examine()
    for cached in kept:
        cached.cache_clear()
    wrong = {(x["op"], x["backend"]) for x in findings["backends"] if x["ok"] is False}
    by_numba = {(op.name, "numba") for op in OPS.values() if "numba" in op.backends}
    assert wrong <= by_numba | {("attention", "blocked")}
    assert wrong >= by_numba
    assert all("cannot" in x["reason"] for x in findings["backends"] if x["ok"] is False)
