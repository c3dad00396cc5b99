"""What `pha doctor` says of backends that cannot run."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from pha.bench import doctor
from pha.bench.doctor import examine
from pha.decoder import runtime
from pha.ops import OPS, Op
from pha.ops.backends import Trial
from pha.utils.errors import PHAError
from pha.utils.hardware import default_device

ELSEWHERE = "not usable here: runs on cuda"


@pytest.mark.slow
@pytest.mark.skipif(default_device().type == "cuda", reason="needs a machine without CUDA")
def test_what_is_for_another_device_is_neither_right_nor_wrong() -> None:
    findings = examine()
    assert {x["op"] for x in findings["backends"] if x["used"]} == {*OPS, "decoder"}
    checks = [x for x in findings["backends"] if x["backend"] == "triton"]
    assert {x["op"] for x in checks} == {"gated_scan", "linear_cross_entropy"}
    assert {(x["ok"], x["error"], x["reason"]) for x in checks} == {(None, None, ELSEWHERE)}
    (decoder,) = [x for x in findings["backends"] if x["op"] == "decoder"]
    assert decoder["used"]
    assert 0 < decoder["error"] < 1e-5
    assert findings["healthy"]


def test_a_kernel_that_fails_is_named_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS["swiglu"].trials, "torch", Trial(lambda _: 1.0, 0.1))
    monkeypatch.setattr(OPS["swiglu"], "faults", {})
    findings = examine()
    wrong = [x for x in findings["backends"] if x["ok"] is False]
    assert {(x["op"], x["backend"], x["reason"]) for x in wrong} == {
        ("swiglu", "torch", "cannot run: it is off by 1")
    }
    assert not findings["healthy"]


def test_one_type_of_device_is_checked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU does not wait for what is compiled for the CPU."""
    checked: list[tuple[str, str]] = []

    def note(op: Op, name: str, where: str) -> dict[str, Any]:
        checked.append((op.name, where))
        return {"ok": True}

    monkeypatch.setattr(doctor, "_check", note)
    monkeypatch.setattr(doctor, "_decoder", lambda: pytest.fail("is for the CPU"))
    monkeypatch.setattr(doctor, "default_device", lambda: torch.device("cuda"))
    for name in ("device_name", "free_memory", "matmul_rate", "choose_precision"):
        monkeypatch.setattr(doctor, name, lambda *_: 1)
    assert examine("cuda")["healthy"]
    assert {op for op, _ in checked} == {*OPS}
    assert {where for _, where in checked} == {"cuda"}
    with pytest.raises(PHAError, match="no mps here; choose cpu or cuda"):
        examine("mps")


def test_a_decoder_that_fails_to_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.kernel.cache_clear()
    monkeypatch.setattr(runtime, "_FAULTS", [])
    monkeypatch.setattr(runtime, "_compile", lambda *_: 1 / 0)
    with pytest.warns(RuntimeWarning):
        findings = examine()
    runtime.kernel.cache_clear()
    (wrong,) = [x for x in findings["backends"] if x["ok"] is False]
    assert wrong["op"] == "decoder"
    assert wrong["reason"] == "cannot run: ZeroDivisionError: division by zero"


def test_a_decoder_without_numba_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pha.decoder")
    monkeypatch.setitem(sys.modules, "numba", None)
    findings = examine()
    (decoder,) = [x for x in findings["backends"] if x["op"] == "decoder"]
    assert decoder["ok"] is None
    assert "pip install" in decoder["reason"]
    assert findings["healthy"]
    assert torch.is_grad_enabled()
