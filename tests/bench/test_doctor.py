"""What `pha doctor` says of backends that cannot run."""

from __future__ import annotations

import pytest

from pha.bench.doctor import examine
from pha.ops import OPS
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
