"""The script for a machine with a GPU, as far as a machine without one can prove it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from pha.data import TokenStore
from pha.nn.parameters import count_parameters
from pha.nn.presets import preset_config
from pha.train.recipes import load_recipe
from pha.utils.files import read_json, write_json
from scripts.gpu import collect, packages, stages, steps
from scripts.gpu.collect import pack
from scripts.gpu.main import main
from scripts.gpu.stages import FULL, STAGES, TINY, Plan, best_batch, run_length
from scripts.gpu.steps import FOLDER, SECONDS, Step, finished, read_record, run_step
from scripts.gpu.summary import summarise

ROOT = Path(__file__).parents[2]


def python(name: str, program: str, *words: str, output: str = "") -> Step:
    return Step("stage", name, (sys.executable, "-c", program, *words), output)


def make_plan(work: Path, **changes: object) -> Plan:
    settings = {"sizes": FULL, "work": work, "minutes": 10.0, "runs": 1, "compiled": True}
    settings |= {"data": None, "tokenizer": "bytes", "steps": 0}
    return Plan(**(settings | changes))  # type: ignore[arg-type]


def test_a_step_is_remembered_until_its_command_changes(tmp_path: Path) -> None:
    step = python("a", "import sys; print(sys.argv[1:])", FOLDER, SECONDS, output="out.txt")
    assert not finished(step, tmp_path)
    record = run_step(step, tmp_path, 60.9)
    assert (record["status"], record["returncode"]) == ("ok", 0)
    assert read_record(tmp_path / "a") == record
    assert (tmp_path / "a" / "out.txt").read_text() == f"{[str(tmp_path / 'a'), '60']}\n"
    assert finished(step, tmp_path)
    assert not finished(python("a", "pass"), tmp_path)


def test_a_failure_is_a_record_with_the_reason(tmp_path: Path) -> None:
    step = python("a", "import sys; print('before'); sys.exit('what was wrong')")
    record = run_step(step, tmp_path, 60)
    assert (record["status"], record["reason"]) == ("failed", "what was wrong")
    assert not finished(step, tmp_path)
    record = run_step(Step("stage", "b", ("no-such-program",)), tmp_path, 60)
    assert record["status"] == "failed"
    assert "no-such-program" in record["reason"]


def test_out_of_time_interrupts_and_then_kills_with_all_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SHORTEST", 0.0)
    monkeypatch.setattr(steps, "GRACE", 0.5)
    polite = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
    record = run_step(python("polite", polite), tmp_path, 1.5)
    assert record["status"] == "unfinished"
    assert "saved" in (tmp_path / "polite" / "log.txt").read_text()
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    stubborn = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    stubborn += "print(p.pid, flush=True); p.wait()"
    record = run_step(python("stubborn", stubborn, output="pid.txt"), tmp_path, 1.5)
    assert record["status"] == "unfinished"
    pid = int((tmp_path / "stubborn" / "pid.txt").read_text())
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_no_time_left_begins_nothing_and_a_benchmark_out_of_time_is_unfinished(
    tmp_path: Path,
) -> None:
    record = run_step(python("a", "print('begun')"), tmp_path, 1.0)
    assert record["status"] == "unfinished"
    assert not (tmp_path / "a" / "log.txt").exists()
    write_json(tmp_path / "b" / "bench-train.json", {"rows": [{"error": "the time limit was"}]})
    assert run_step(python("b", "pass"), tmp_path, 60)["status"] == "unfinished"


def measured(work: Path, batch: int, speed: float, compiled: bool = False) -> None:
    case = {"model": FULL.model, "batch": batch, "compiled": compiled}
    row = case | {"error": None, "tokens_per_second": {"median": speed}}
    other = row | {"model": "hf:gpt2", "tokens_per_second": {"median": 9 * speed}}
    name = f"train-compiled-b{batch}" if compiled else f"train-b{batch}"
    rows = [row, other, case | {"error": "out of memory"}]
    write_json(work / name / "bench-train.json", {"rows": rows})


def test_training_takes_the_fastest_batch_and_the_time_there_is(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    assert best_batch(plan) is None
    measured(tmp_path, 8, 100_000.0)
    measured(tmp_path, 64, 300_000.0)
    measured(tmp_path, 64, 400_000.0, compiled=True)
    best = best_batch(plan)
    assert best is not None
    assert (best["batch"], best["compiled"]) == (64, False)
    words = run_length(plan)
    step_count = int(0.4 * 600 * 400_000 / (128 * 1024))
    assert words == f"--run.steps {step_count} --run.micro_batch 64 --run.compile true".split()
    measured(tmp_path, 8, 900_000.0)
    assert run_length(plan) == words  # a run that is continued keeps its length


@pytest.mark.parametrize("sizes", [FULL, TINY])
def test_what_is_trained_is_a_recipe_and_both_models_are_of_one_size(
    sizes: object, tmp_path: Path
) -> None:
    plan = make_plan(tmp_path, sizes=sizes)
    measured(tmp_path, 64, 400_000.0, compiled=True)
    commands = [step.command for step in STAGES["train"](plan) if step.name != "prepare"]
    totals = []
    for command in commands:
        recipe = command[command.index("train") + 1]
        overrides = [*command[command.index("--quiet") + 1 :], "--data.store", "x"]
        config = load_recipe(recipe, overrides)
        config.model.vocab_size = 50257
        totals.append(sum(count_parameters(config.model).values()))
        assert config.run.steps
    assert totals[1] == pytest.approx(totals[0], rel=0.01)
    assert len(set(totals)) == 2


def test_every_step_has_a_name_of_its_own_and_models_that_exist(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    measured(tmp_path, 64, 400_000.0)
    made = [step for name in STAGES for step in STAGES[name](plan)]
    names = [step.name for step in made]
    assert len(set(names)) == len(names)
    assert "train-peers-b64" in names
    for name in (FULL.model, *FULL.prefill, FULL.op_model):
        preset_config(name)


def test_long_logs_are_cut_at_their_beginning(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("a" * 100 + "b" * 200_000)
    pack(tmp_path / "logs.tar.gz", [("step/log.txt", tmp_path / "log.txt")])
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        file = archive.extractfile("step/log.txt")
        assert file is not None
        assert file.read() == b"b" * 200_000


def test_mistakes_end_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["--stages", "bench,tain"], ["--minutes", "0"], ["--runs", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(["--work", str(tmp_path / "work"), *words])
        assert stop.value.code == 2
    assert "there is no stage tain; there are environment, tests" in capsys.readouterr().out
    monkeypatch.setattr(packages, "REQUIRED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit) as stop:
        main(["--work", str(tmp_path / "work")])
    assert stop.value.code == 2
    assert "missing no_such_package: nothing runs without it" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()


def test_the_summary_names_backends_that_cannot_run_here() -> None:
    def backend(name: str, ok: bool | None, error: float | None, reason: str | None) -> dict:
        each = {"op": "scan", "device": "cuda", "backend": name, "used": False}
        return each | {"ok": ok, "error": error, "reason": reason}

    backends = [
        backend("loop", True, 1e-7, None),
        backend("numba", None, None, "not usable here: runs on cpu"),
        backend("triton", False, None, "cannot run: no compiler"),
    ]
    record = {"environment": {"backends": backends}, "missing_packages": {}, "commit": None}
    record |= {"steps": [], "tests": None, "benchmarks": {}, "runs": {}}
    text = "\n".join(summarise(record))
    assert "1.0e-07" in text
    assert "not usable here: runs on cpu" in text
    assert re.search(r"triton +\| +WRONG +\| +cannot run: no compiler", text)


def test_a_summary_that_fails_does_not_end_the_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [
        lambda plan, name=name: [python(name, "print('measured')", output="out.txt")]
        for name in ("one", "two")
    ]
    monkeypatch.setattr(stages, "STAGES", dict(zip(("one", "two"), names, strict=True)))
    monkeypatch.setattr(collect, "summarise", lambda record: 1 / 0)
    with pytest.raises(SystemExit, match="1"):
        main(["--work", str(tmp_path)])
    assert (tmp_path / "two" / "out.txt").read_text() == "measured\n"
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rehearsal_goes_through_every_stage(store: TokenStore, tmp_path: Path) -> None:
    """On a machine without a GPU every step but those of its driver ends well, and is kept."""
    environment = os.environ | {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")}
    environment |= {"PYTHON": sys.executable, "DATA": str(store.path), "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "scripts" / "gpu.sh"), "--tiny", "--stages"]
    stages = ",".join(name for name in STAGES if name != "tests")
    done = subprocess.run([*command, stages], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert sum(file.stat().st_size for file in files) < 1_000_000
    record = read_json(tmp_path / "out" / "results.json")
    assert {step["status"] for step in record["steps"]} == {"ok"}
    assert record["environment"]["healthy"]
    assert set(record["runs"]) == {"pha", "attention"}
    rows = [row for rows in record["benchmarks"].values() for row in rows]
    assert {row["mode"] for row in rows} >= {"train", "prefill", "decode", "loss"}
    assert [row["error"] for row in rows] == [None] * len(rows)
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert all(
        f"## {title}" in summary for title in ("Steps", "Kernels: gated-scan", "Training runs")
    )
    again = subprocess.run([*command, "bench"], env=environment, capture_output=True, text=True)
    assert again.stdout.count("done before") == sum(s["stage"] == "bench" for s in record["steps"])
