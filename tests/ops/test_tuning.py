"""Sizes of Triton's scan: where they come from, and the sweep that finds better ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pha.ops.gated_scan import sizes as module
from pha.ops.gated_scan import triton as triton_scan
from pha.ops.gated_scan import tuning
from pha.ops.gated_scan.sizes import Sizes, read_tuned, sizes_of, tuned_file, write_tuned
from pha.utils.errors import PHAError
from tests.ops.common import device_of, kernels

CUDA = torch.device("cuda")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where findings are kept, on a machine whose device is called G1."""
    monkeypatch.setenv("PHA_TUNED", str(tmp_path / "folder" / "tuned.json"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "G1")
    monkeypatch.setattr(module, "TUNED", {"G1": Sizes(unroll=4), "G2": Sizes(unroll=2)})
    sizes_of.cache_clear()
    return tuned_file()


def test_a_finding_of_the_user_comes_before_ours(file: Path) -> None:
    assert sizes_of(torch.device("cpu")) == Sizes()
    assert sizes_of(CUDA) == Sizes(unroll=4)
    assert write_tuned(CUDA, Sizes(stages=2)) == file
    assert sizes_of(CUDA) == Sizes(stages=2)
    file.write_text(json.dumps({"G2": {"block": 128}, **json.loads(file.read_text())}))
    write_tuned(CUDA, Sizes(stages=4))
    assert read_tuned() == {"G1": Sizes(stages=4), "G2": Sizes(block=128)}


def test_findings_are_in_the_cache_unless_they_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHA_TUNED", raising=False)
    monkeypatch.setenv("PHA_CACHE", str(tmp_path))
    assert tuned_file() == tmp_path / "gated-scan.json"
    assert read_tuned() == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"G1": {"block": "many"}}', '{"G1": 3}'])
def test_a_file_without_sizes_is_named(text: str, file: Path) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(PHAError, match=r"tuned\.json"):
        sizes_of(CUDA)


def test_few_sizes_are_tried() -> None:
    assert len({*tuning.WALKS}) + len(tuning.PROGRAMS) <= 24
    assert Sizes() in tuning.WALKS


@pytest.mark.gpu
@kernels[1]
def test_a_sweep_skips_what_fails_or_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of("triton")
    small = Sizes(unroll=2, shortest=4)
    broken, wrong = replace(small, block=48), replace(small, stages=4)
    right = triton_scan.scan_forward

    def forward(*arguments: Any) -> Any:
        h, last = right(*arguments)
        return h * (1.01 if arguments[-1].stages == 4 else 1.0), last

    monkeypatch.setattr(triton_scan, "scan_forward", forward)
    monkeypatch.setattr(tuning, "PROGRAMS", [(2, 1)])
    given = [(1, 5, 3)], torch.float32, 0.0
    rows, best = tuning.sweep(*given, walks=[broken, wrong, small], device=device)
    assert best == replace(small, wanted=2, enough=1)
    assert [row["seconds"] is None for row in rows] == [True, True, False, False]
    assert "power of 2" in rows[0]["reason"]
    assert rows[1]["reason"] == "it is off by 0.01"
    assert max(row["error"] for row in rows[2:]) < 1e-5
    json.dumps(rows)
    with pytest.raises(PHAError, match=r"no size of the scan works .*power of 2"):
        tuning.sweep(*given, walks=[broken], device=device)
