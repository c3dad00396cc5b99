"""Processes that take turns, fail, run out of time, and leave nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pha import decoder
from pha.bench import floors as floors_module
from pha.bench import peers, runner, worker
from pha.bench.runner import Request, add_ratios, make_row, run_benchmark, run_worker
from pha.bench.work import Job
from pha.bench.worker import measure
from pha.cli import main
from pha.ops import OPS
from pha.utils.errors import PHAError

REQUEST = Request(mode="prefill", models=("pha-tiny", "hf:gpt2-tiny"), lengths=(16,), runs=2)
JOB = Job("prefill", "pha-tiny", "fp32", 2, 16, seconds=0.01)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without processes, on small buffers and a small vocabulary."""
    monkeypatch.setattr(peers, "VOCABULARY", 512)
    monkeypatch.setitem(floors_module.BUFFER_BYTES, "cpu", 1 << 22)
    monkeypatch.setattr(runner, "run_worker", lambda job, left: measure(job))


def answers(speed: float) -> dict[str, Any]:
    """A worker's result."""
    return {
        "tokens_per_second": speed,
        "floors": {"matmul": 2.0 * speed},
        **dict.fromkeys(runner.MEDIANS, speed),
        **dict.fromkeys(("units", *runner.SIZES), 1),
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "sleep"}, "no mode 'sleep'"),
        ({"models": ()}, "models is empty"),
        ({"models": ("pha-tiny", "pha-tiny")}, "models names one twice"),
        ({"models": ("pha-tinny",)}, "did you mean pha-tiny"),
        ({"lengths": (1,)}, "a length is 1; at least 2"),
        ({"batch": 0}, "batch is 0; at least 1"),
        ({"runs": 0}, "runs is 0; at least 1"),
        ({"precisions": ("fp16",)}, "no precision 'fp16'; choose fp32 or bf16"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds_limit": -1.0}, "the limit is -1.0 seconds"),
        ({"chunk": -1}, "chunk is -1"),
        ({"mode": "train", "chunk": 4}, "train reads no prompt"),
        ({"mode": "loss"}, "hf:gpt2-tiny is not one"),
        ({"backends": ("loop",)}, "prefill has no backends"),
        ({"mode": "loss", "models": ("pha-tiny",), "backends": ("x",)}, "loss has no backend 'x'"),
        ({"mode": "loss", "models": ("pha-tiny",), "compiled": True}, "no compiled form"),
        ({"mode": "kernels"}, "hf:gpt2-tiny is not one"),
        ({"models": ("hf:gpt2-tiny+chunked_loss",)}, "is a way to train"),
        ({"models": ("pha-tiny+gradient_checkpointing",)}, "is a way to train"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PHAError, match=said):
        replace(REQUEST, **changes)


def test_cases_take_turns_within_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []

    def note(job: Job, left: float | None) -> dict[str, Any]:
        order.append((job.model, job.length))
        return answers(float(len(order)))

    monkeypatch.setattr(runner, "run_worker", note)
    rows = run_benchmark(replace(REQUEST, lengths=(16, 32)))
    turn = ["pha-tiny", "hf:gpt2-tiny"]
    assert order == [(model, length) for length in (16, 32) for model in turn * 2]
    assert [row["tokens_per_second"]["values"] for row in rows] == [[1, 3], [2, 4], [5, 7], [6, 8]]


def test_decoding_is_measured_at_batch_one_as_well() -> None:
    for batch, batches in ((3, [1, 3]), (1, [1])):
        groups = replace(REQUEST, mode="decode", batch=batch).groups()
        assert [group[0].batch for group in groups] == batches


def test_compiled_rows_are_compared_among_themselves() -> None:
    (jobs,) = replace(REQUEST, compiled=True).groups()
    assert [job.compiled for job in jobs] == [False, False, True, True]
    rows = [make_row(job, [answers(v)]) for job, v in zip(jobs, (2.0, 3.0, 10.0, 5.0), strict=True)]
    add_ratios(rows)
    assert [row["speed_ratio"] for row in rows] == [1.0, 1.5, 1.0, 0.5]
    assert [row["memory_ratio"] for row in rows] == [1.0, 1.5, 1.0, 0.5]


def test_a_row_holds_medians_and_the_spread() -> None:
    row = make_row(JOB, [answers(v) for v in (3.0, 1.0, 8.0)])
    speeds = {"median": 3.0, "low": 1.0, "high": 8.0, "values": [3.0, 1.0, 8.0]}
    assert row["tokens_per_second"] == speeds
    assert row["peak_memory"] == 3.0
    assert row["floors"] == {"matmul": 6.0}
    assert row["error"] is None


def test_a_failing_model_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fail_first(job: Job, left: float | None) -> dict[str, Any]:
        calls.append(job.model)
        return {"error": "out of memory"} if job.model == "pha-tiny" else answers(2.0)

    monkeypatch.setattr(runner, "run_worker", fail_first)
    failed, other = run_benchmark(REQUEST)
    assert failed["error"] == "out of memory"
    assert failed["speed_ratio"] is None
    assert other["error"] is None
    assert other["speed_ratio"] is None  # there is nothing to compare it with
    assert calls.count("pha-tiny") == 1  # it is not tried again


def test_runs_before_the_time_limit_count(monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([answers(2.0), answers(4.0)])
    late = {"error": "stopped", "out_of_time": True}
    monkeypatch.setattr(runner, "run_worker", lambda job, left: next(results, late))
    rows = run_benchmark(replace(REQUEST, lengths=(16, 32), runs=3))
    assert [row["error"] for row in rows] == [None, None, "stopped", "stopped"]
    assert [row.get("runs") for row in rows] == [1, 1, None, None]


def test_no_process_is_started_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_worker", lambda *_: pytest.fail("started"))
    for row in run_benchmark(replace(REQUEST, seconds_limit=1e-9)):
        assert row["error"] == "not run: the time limit was reached"


def test_a_process_that_takes_too_long_is_stopped() -> None:
    begin = time.monotonic()
    result = run_worker(JOB, 0.3)
    assert result == {"error": "stopped: the time limit was reached", "out_of_time": True}
    assert time.monotonic() - begin < 5
    assert not psutil.Process().children()


def _workers(process: psutil.Process) -> list[psutil.Process]:
    return [p for p in process.children() if "pha.bench.worker" in p.cmdline()]


def _wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return value


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "killed, most likely out of memory"),
        (signal.SIGSEGV, "ended by SIGSEGV"),
    ],
)
def test_a_process_that_is_killed_says_so(number: int, said: str) -> None:
    results: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: results.append(run_worker(JOB)))
    thread.start()
    (worker,) = _wait_for(lambda: _workers(psutil.Process()))
    worker.send_signal(number)
    thread.join(30)
    assert results == [{"error": said}]


def test_a_process_that_cannot_start_shows_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'no such library' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert run_worker(JOB) == {"error": "ended with exit code 3: no such library"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
@pytest.mark.slow
def test_nothing_is_left_running_after(number: int, code: int) -> None:
    words = ("bench", "train", "--models", "pha-tiny", "--lengths", "64", "--seconds", "600")
    process = subprocess.Popen(
        [sys.executable, "-m", "pha", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        (worker,) = _wait_for(lambda: _workers(psutil.Process(process.pid)))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        if code == 130:
            assert errors.decode().strip().endswith("interrupted")
        _wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_command_measures_in_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--models", "pha-tiny,hf:llama-tiny", "--lengths", "16", "--runs", "1")
    main(["bench", "prefill", *words, "--seconds", "0.01", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["error"] for row in rows] == [None, None]
    assert all(row["tokens_per_second"]["median"] > 0 for row in rows)


@pytest.mark.usefixtures("in_process")
def test_json_and_files_hold_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--models", "pha-tiny,hf:gpt2-tiny", "--lengths", "16,32", "--runs", "1")
    out = tmp_path / "new" / "folder"
    main(["bench", "prefill", *words, "--seconds", "0.001", "--json", "--out", str(out)])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "bench-prefill.json").read_text())
    assert printed["kind"] == "bench"
    assert printed["provenance"]["precision"] == "fp32"
    assert printed["request"]["lengths"] == [16, 32]
    assert [(row["model"], row["length"]) for row in printed["rows"]] == [
        (model, length) for length in (16, 32) for model in ("pha-tiny", "hf:gpt2-tiny")
    ]
    for row in printed["rows"]:
        assert set(runner.MEDIANS) | set(runner.SIZES) <= set(row)
        assert set(row["floors"]) == {"matmul", "sdpa", "read", "copy"}
    names = {
        f"prefill-{measure}-fp32-b2.{kind}"
        for measure in ("throughput", "memory")
        for kind in ("svg", "png")
    }
    assert {path.name for path in out.iterdir()} == names | {"bench-prefill.json"}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("mode", ["train", "decode", "gated-scan", "loss", "attention"])
def test_every_mode_prints_a_table(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--models", "pha-tiny", "--lengths", "16", "--precision", "fp32,bf16")
    main(["bench", mode, *words, "--runs", "1", "--seconds", "0.001"])
    printed = capsys.readouterr().out
    for heading in (f"{mode}, fp32, 2 x 16", f"{mode}, bf16, 2 x 16", "floors, bf16, T 16"):
        assert heading in printed
    assert "failed" not in printed
    assert "…" not in printed


@pytest.mark.usefixtures("in_process")
def test_kernels_are_compared_with_their_absence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    op, used = OPS["swiglu"], []

    def fast(*inputs: Any) -> Any:
        used.append(op.choice("cpu"))
        return op.backends["torch"](*inputs)

    monkeypatch.setitem(op.backends, "fast", fast)
    monkeypatch.setitem(op.preferred, "cpu", "fast")
    words = ("--models", "pha-tiny", "--lengths", "16", "--runs", "1", "--seconds", "0.001")
    main(["bench", "kernels", *words, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["mode"], row["backend"], row["without"]) for row in rows] == [
        ("train", "all kernels", []),
        ("train", "no swiglu", ["swiglu"]),
        ("prefill", "all kernels", []),
        ("prefill", "no swiglu", ["swiglu"]),
        ("decode", "all kernels", []),
        ("decode", "no decoder", ["decoder"]),
    ]
    assert all(row["speed_ratio"] > 0 for row in rows)
    assert used
    assert decoder.enabled
    main(["bench", "kernels", *words])
    assert "train, pha-tiny, fp32, 2 x 16" in capsys.readouterr().out


def test_a_failed_row_says_why_below_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "run_worker", lambda job, left: {"error": "[out] of memory"})
    main(["bench", "prefill", "--models", "pha-tiny", "--lengths", "16"])
    printed = capsys.readouterr().out
    assert "failed" in printed
    assert "pha-tiny, fp32, 2 x 16: [out] of memory" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prefill", "--lengths", "ten"), "not a list of whole numbers"),
        (("prefill", "--models", "hf:nothing"), "there is no model 'hf:nothing'"),
        (("sleep",), "invalid choice: 'sleep'"),
        (("train", "--scale", "tiny"), "train takes no --scale"),
        (("sweep", "--seconds-limit", "9"), "sweep takes no --seconds-limit"),
        (("sweep", "--precision", "fp32,bf16"), "one --precision at a time"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *words])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


def test_rows_are_kept_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[str | None]] = []

    def note(job: Job, left: float | None) -> dict[str, Any]:
        path = tmp_path / "bench-prefill.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        found.append([row["error"] for row in rows])
        return {"error": f"length {job.length}"}

    monkeypatch.setattr(runner, "run_worker", note)
    words = ("--models", "pha-tiny,hf:gpt2-tiny", "--lengths", "16,32", "--runs", "1")
    main(["bench", "prefill", *words, "--out", str(tmp_path)])
    lengths = ["length 16", "length 16", "length 32"]
    assert found == [lengths[:count] for count in range(4)]


def test_in_one_process_a_fallback_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall_back(*_: Any) -> Any:
        warnings.warn("runs slower, by torch", RuntimeWarning, stacklevel=2)

    monkeypatch.setattr(peers, "VOCABULARY", 512)
    monkeypatch.setattr(runner, "run_worker", lambda *_: pytest.fail("in a process of its own"))
    monkeypatch.setitem(worker.MODEL_MODES, "train", fall_back)
    with warnings.catch_warnings():
        main(["bench", "train", "--models", "pha-tiny", "--lengths", "16", "--in-process"])
    assert "RuntimeWarning: runs slower, by torch" in capsys.readouterr().out
