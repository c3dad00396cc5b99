"""The study of speed and memory: what is asked of the benchmark, and what is said of its rows."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pha.bench.runner import Request
from pha.studies import efficiency
from pha.studies.definition import Benchmark, Study, load_study, scales
from pha.studies.study import run_efficiency


def row(request: Request, model: str, speeds: list[float], memory: float) -> dict[str, Any]:
    return {
        "mode": request.mode,
        "model": model,
        "length": request.lengths[0],
        "batch": request.batch,
        "precision": "fp32",
        "device": "a CPU",
        "error": None,
        "compiled": False,
        "backend": "",
        "tokens_per_second": {
            "median": sorted(speeds)[1],
            "low": min(speeds),
            "high": max(speeds),
            "values": speeds,
        },
        "peak_memory": memory,
        "work_memory": memory / 2,
    }


@pytest.fixture
def study() -> Study:
    chosen = load_study("efficiency")
    small = Benchmark(modes=["prefill"], lengths=[64, 128], batch=1, precision="fp32")
    return replace(chosen, benchmark={"tiny": small})


def test_the_baseline_comes_first_in_every_request() -> None:
    asked = efficiency.requests(load_study("efficiency"), scales()["paper"])
    assert [(request.mode, request.lengths) for request in asked] == [
        (mode, (length,)) for mode in ("prefill", "train") for length in (2048, 4096, 8192, 16384)
    ]
    assert all(request.models[0] == "attention-only-180m" for request in asked)
    assert len(asked[0].models) == 3


def test_rows_become_gains_with_intervals_and_are_kept(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measured(request: Request, progress: Any) -> list[dict[str, Any]]:
        calls.append(request)
        speeds = ([100.0, 102.0, 101.0], [99.0, 103.0, 100.0], [110.0, 112.2, 112.11])
        sizes = (3e9, 3.1e9, 2e9)
        triples = zip(request.models, speeds, sizes, strict=True)
        return [row(request, model, speed, size) for model, speed, size in triples]

    monkeypatch.setattr(efficiency, "run_benchmark", measured)
    console = Console(file=io.StringIO())
    *_, found = efficiency.measure(study, scales()["tiny"], tmp_path, console)
    assert len(calls) == 2
    (ours, paper) = found.tables[0].sections
    assert ours.rows[2][:5] == ["64", "PHA", "112", "+10.3 ± 1.4%", "2.00"]
    assert ["2,048", "hybrid (paper)", "34,409", "+5.5%", "1.28", "–"] in [
        list(r) for r in paper.rows
    ]

    pictures = efficiency.draw(study, scales()["tiny"], found, tmp_path)
    assert {path.name for path in pictures if path.suffix == ".png"} == {
        "prefill-throughput-fp32-b1.png",
        "prefill-memory-fp32-b1.png",
    }
    assert all(path.is_file() for path in pictures)

    (again,) = efficiency.measure(study, scales()["tiny"], tmp_path, console)
    assert len(calls) == 2
    assert again.record["rows"] == found.record["rows"]
    assert [(each["mode"], each["length"]) for each in again.record["measured"]] == [
        ("prefill", 64),
        ("prefill", 128),
    ]

    other = Benchmark(modes=["prefill"], lengths=[64, 256], batch=2, precision="fp32")
    changed = replace(study, benchmark={"tiny": other})
    list(efficiency.measure(changed, scales()["tiny"], tmp_path, console))
    assert [(each.lengths, each.batch) for each in calls[2:]] == [((64,), 2), ((256,), 2)]


def test_a_stopped_study_has_the_tables_of_what_was_measured(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(request: Request, progress: Any) -> list[dict[str, Any]]:
        if request.lengths == (128,):
            raise KeyboardInterrupt
        return [row(request, model, [1.0, 1.0, 1.0], 1e9) for model in request.models]

    monkeypatch.setattr(efficiency, "run_benchmark", measured)
    tiny = scales()["tiny"]
    with pytest.raises(KeyboardInterrupt):
        run_efficiency(study, tiny, tmp_path, Console(file=io.StringIO()))
    kept = json.loads((tmp_path / "study.json").read_text())
    assert {each["length"] for each in kept["rows"]} == {64}
    assert kept["missing"] == ["reading a prompt at 128"]
    assert "Not measured yet: reading a prompt at 128 tokens." in (tmp_path / "table.md").read_text(
        encoding="utf-8"
    )


def test_a_table_names_all_machines_that_it_is_of(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(request: Request, progress: Any) -> list[dict[str, Any]]:
        rows = [row(request, model, [1.0, 1.0, 1.0], 1e9) for model in request.models]
        return [each | {"device": f"machine {request.lengths[0]}"} for each in rows]

    monkeypatch.setattr(efficiency, "run_benchmark", measured)
    *_, found = efficiency.measure(study, scales()["tiny"], tmp_path, Console(file=io.StringIO()))
    assert "machine 64, fp32 and machine 128, fp32" in found.tables[0].sections[0].about


def test_a_case_that_fails_is_a_row(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(request: Request, progress: Any) -> list[dict[str, Any]]:
        rows = [row(request, model, [1.0, 1.0, 1.0], 1e9) for model in request.models]
        rows[0] = {**rows[0], "error": "killed, most likely out of memory"}
        return rows

    monkeypatch.setattr(efficiency, "run_benchmark", measured)
    *_, found = efficiency.measure(study, scales()["tiny"], tmp_path, Console(file=io.StringIO()))
    assert found.tables[0].sections[0].rows[0][2].startswith("killed")
    assert found.sentences == []
