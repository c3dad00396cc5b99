"""`pha bench sweep`: what it prints and keeps of what the sweep finds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pha.cli import main
from pha.ops.gated_scan import tuning
from pha.ops.gated_scan.sizes import Sizes, read_tuned
from pha.utils.formats import read_json


def test_a_sweep_keeps_the_best_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = Sizes(block=128)
    times = {64: 2e-3, 128: 1e-3, 256: None}

    def sweep(shapes: Any, dtype: Any, seconds: float, progress: Any) -> Any:
        assert [shape[:2] for shape in shapes] == [(2, 1024), (2, 2048)]
        rows = [{"sizes": asdict(Sizes(block=b)), "seconds": t} for b, t in times.items()]
        return [row for row in rows for _ in shapes], best

    monkeypatch.setenv("PHA_TUNED", str(tmp_path / "tuned.json"))
    monkeypatch.setattr("pha.utils.hardware.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr("pha.utils.hardware.device_name", lambda _: "a card")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a card")
    monkeypatch.setattr(tuning, "sweep", sweep)
    out = tmp_path / "out"
    main(["bench", "sweep", "--lengths", "1024,2048", "--out", str(out)])
    shown = capsys.readouterr().out
    assert "failed" in shown
    assert "2.00" in shown
    assert read_tuned() == {"a card": best}
    assert read_json(out / "bench-sweep.json")["best"] == asdict(best)


def test_a_sweep_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(SystemExit):
        main(["bench", "sweep"])
    assert "needs a CUDA device" in capsys.readouterr().err
