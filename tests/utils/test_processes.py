"""Child processes: order, side by side, time, and that none is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pha.utils.processes import Command, run_processes


def python(code: str, log: Path | None = None) -> Command:
    return Command([sys.executable, "-c", code], log)


def test_commands_run_in_order_and_say_how_they_end(tmp_path: Path) -> None:
    events: list[object] = []
    log = tmp_path / "new" / "log"
    run_processes(
        [python("print('one')", log), python("import sys; print('two'); sys.exit(3)", log)],
        started=events.append,
        ended=lambda index, code: events.append((index, code)),
    )
    assert events == [0, (0, 0), 1, (1, 3)]
    assert log.read_text() == "one\ntwo\n"


def test_side_by_side_they_share_cores_and_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    logs = [tmp_path / str(number) for number in range(3)]
    run_processes([python(code, log) for log in logs], parallel=3)
    assert [log.read_text() for log in logs] == ["4 3\n", "7 3\n", "4 3\n"]


def test_when_one_fails_the_others_are_asked_to_stop(tmp_path: Path) -> None:
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"
    waits = (
        "import pathlib, signal, sys, time\n"
        f"def stop(*_): pathlib.Path({str(stopped)!r}).touch(); sys.exit(0)\n"
        f"signal.signal(signal.SIGTERM, stop); pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    fails = (
        "import os, sys, time\n"
        f"while not os.path.exists({str(ready)!r}): time.sleep(0.01)\n"
        "sys.exit(1)"
    )

    def refuse(index: int, code: int) -> None:
        raise RuntimeError(f"{index} ended with {code}")

    with pytest.raises(RuntimeError, match="1 ended with 1"):
        run_processes([python(waits), python(fails), python(fails)], parallel=2, ended=refuse)
    assert stopped.is_file()  # which was waited for
    assert not psutil.Process().children()


def test_no_process_outlives_the_time() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        run_processes([python("import time; time.sleep(60)")], seconds=0.2, kill=True)
    assert time.monotonic() - begin < 30
    assert not psutil.Process().children()


@pytest.mark.slow
def test_a_process_that_watches_stops_when_its_parent_is_killed(tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    child = (
        "import pathlib, signal, sys, time\n"
        "from pha.utils.processes import leave_with_parent\n"
        f"def stop(*_): pathlib.Path({str(stopped)!r}).touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop); leave_with_parent()\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        "import sys\n"
        "from pha.utils.processes import Command, run_processes\n"
        f"run_processes([Command([sys.executable, '-c', {child!r}])])"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        process.stdout.read()  # until the child has closed it too
    assert stopped.is_file()
