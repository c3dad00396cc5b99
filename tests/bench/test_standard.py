"""The standard set: all of it runs, goes on where it was stopped, and says what it will take."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pha.bench import standard, worker
from pha.bench.op_work import op_backends
from pha.bench.runner import OUT_OF_TIME, make_row, run_groups
from pha.bench.standard import expected_seconds, standard_set
from pha.bench.work import Job
from pha.cli import main
from pha.utils.errors import PHAError
from tests.bench.test_runner import answers


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that have been measured, at no cost."""
    jobs: list[Job] = []

    def note(job: Job) -> dict[str, Any]:
        jobs.append(job)
        rates = dict.fromkeys(("matmul", "sdpa", "read", "copy"), 1.0)
        return answers(float(len(jobs))) | {"floors": rates}

    monkeypatch.setattr(worker, "measure", note)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # a quarter of a second for each job
    return jobs


def test_it_fits_into_ten_minutes_and_begins_with_table_8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(standard, "default_device", lambda: torch.device("cuda"))
    jobs = [job for group in standard_set("paper") for job in group]
    assert len({tuple(vars(job).items()) for job in jobs}) == len(jobs)
    assert sum(map(expected_seconds, jobs)) < 600
    modes = list(dict.fromkeys(job.mode for job in jobs))
    assert modes[:3] == ["prefill", "train", "decode"]
    assert jobs[0].compiled
    # torch has a loss of its own from 2.13 on.
    timed = {job.backend.partition(",")[0] for job in jobs if job.mode == "loss"}
    assert timed - {"torch"} == {"chunked", "triton"}


def test_the_rehearsal_has_a_job_for_each_model_and_mode() -> None:
    paper, tiny = standard_set("paper"), standard_set("tiny")
    kinds = [
        {(j.mode, standard._tiny(j.model) if s is paper else j.model, j.compiled) for j in group}
        for s in (paper, tiny)
        for group in [[job for each in s for job in each]]
    ]
    assert kinds[0] == kinds[1]


def test_a_second_call_goes_on_where_the_first_was_stopped(measured: list[Job]) -> None:
    groups = standard_set("tiny")
    jobs = [job for group in groups for job in group]
    failed = make_row(jobs[1], [{"error": "out of memory"}])
    known = [
        make_row(jobs[0], [answers(2.0)]),
        failed,
        make_row(jobs[2], [OUT_OF_TIME]),
    ]
    known = json.loads(json.dumps(known))
    kept: list[list[dict[str, Any]]] = []
    rows = run_groups(groups, 1, None, True, lambda line: None, kept.append, known)
    assert measured == jobs[2:]
    assert [(row["mode"], row["model"], row["backend"]) for row in rows] == [
        (job.mode, job.model, job.backend) for job in jobs
    ]
    assert [row["error"] for row in rows[:3]] == [None, "out of memory", None]
    assert rows[2]["speed_ratio"] == 0.5
    assert [len(each) for each in kept] == list(range(3, len(jobs) + 1))
    assert run_groups(groups, 1, None, True, lambda line: None, kept.append, rows) == rows
    assert len(measured) == len(jobs) - 2


def test_the_command_resumes_its_own_file(
    tmp_path: Path, measured: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "all", "--scale", "tiny", "--in-process", "--out", str(tmp_path)]
    main([*words, "--seconds-limit", "1e-9"])
    assert "not run: the time limit was reached" in capsys.readouterr().out
    assert not measured
    main(words)
    whole = len(measured)
    assert whole == sum(map(len, standard_set("tiny")))
    printed = capsys.readouterr().out
    for shown in ("prefill", "hf:llama-tiny, fp32, 1 x 16, torch.compile", "gated-scan"):
        assert shown in printed
    assert (tmp_path / "train-throughput-fp32-t16-compiled.png").exists()
    main([*words, "--json"])
    assert len(measured) == whole
    record = json.loads((tmp_path / "bench-all.json").read_text())
    assert len(record["rows"]) == whole
    record["provenance"]["device"] = "another"
    (tmp_path / "bench-all.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        main(words)
    assert "is of another device (another); choose another --out" in capsys.readouterr().err
    del record["rows"]
    (tmp_path / "bench-all.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        main(words)
    assert "bench-all.json: bench.rows is missing" in capsys.readouterr().err


def test_a_dry_run_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "all", "--dry-run"])
    printed = capsys.readouterr().out
    assert "predicted" in printed
    assert "prefill of pha-180m compiled, bf16, 1 x 65536" in printed
    main(["bench", "loss", "--models", "pha-tiny", "--dry-run", "--json"])
    jobs = json.loads(capsys.readouterr().out)
    assert len(jobs) == 2 * len(op_backends("loss", "cpu"))


def test_what_the_set_says_itself_is_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "all", "--batch", "3"])
    assert "all takes no --batch; leave it out" in capsys.readouterr().err


def test_a_gpu_that_no_longer_answers_ends_it(
    measured: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(standard, "default_device", lambda: torch.device("cuda"))
    groups = standard_set("paper")
    monkeypatch.setattr("pha.bench.runner.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    kept: list[list[dict[str, Any]]] = []
    with pytest.raises(PHAError, match="no longer answers"):
        run_groups(groups, 1, None, True, lambda line: None, kept.append)
    assert len(kept[-1]) == len(measured) == 1


@pytest.mark.slow
def test_the_whole_set_runs_at_tiny_sizes(tmp_path: Path) -> None:
    main(["bench", "all", "--scale", "tiny", "--in-process", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "bench-all.json").read_text())["rows"]
    assert [row for row in rows if row["error"] is not None] == []
