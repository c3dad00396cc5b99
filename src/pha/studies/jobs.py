"""Many training runs: each in a process of its own, what is finished skipped, some side by side."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pha.runs import RunFolder
from pha.train.recipes import load_recipe
from pha.train.session import finished_result
from pha.train.signals import on_stop_signals
from pha.utils.errors import PHAError, TrainingInterruptedError
from pha.utils.files import read_json

INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """One run to train.

    Attributes:
        recipe: PRESET.PROTOCOL or a YAML file.
        out: its run folder.
        overrides: arguments such as `--run.seed=1`.
    """

    recipe: str
    out: Path
    overrides: tuple[str, ...] = ()

    @property
    def run(self) -> RunFolder:
        """Where it is kept."""
        return RunFolder(self.out)

    def finished(self) -> bool:
        """Whether there is a result, or a record that the run diverged.

        Raises:
            PHAError: the folder holds another run, or the configuration is impossible.
        """
        config = load_recipe(self.recipe, list(self.overrides))
        return finished_result(self.run, config) is not None or self.run.diverged.is_file()

    def outcome(self) -> dict[str, Any]:
        """`{"status": "finished", "result": RunResult}` or `{"status": "diverged", "step": ...}`.

        Raises:
            PHAError: neither is there yet.
        """
        if self.run.diverged.is_file():
            return {"status": "diverged", "step": read_json(self.run.diverged)["step"]}
        return {"status": "finished", "result": self.run.read_result()}


def run_jobs(jobs: Sequence[Job], console: Console, parallel: int = 1) -> list[dict[str, Any]]:
    """Train what is not finished, and return every outcome in the order of `jobs`.

    A process each makes peak memory and the state of random generators a matter of one run. A run
    that diverges is an outcome, not a failure.

    Args:
        jobs: runs with folders of their own.
        console: for progress. Runs side by side write to `OUT.log` instead.
        parallel: how many run at once. They share the cores, or get a GPU each in turn.

    Raises:
        PHAError: a bad configuration, found before anything is trained; or a training failed.
        TrainingInterruptedError: stopped by the user; the same call continues.
    """
    if parallel < 1:
        raise PHAError(f"jobs is {parallel}; at least 1")
    waiting = [job for job in jobs if not job.finished()]
    if len(waiting) < len(jobs):
        console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are there already")
    with on_stop_signals(_interrupt):
        if parallel == 1:
            for number, job in enumerate(waiting, start=1):
                console.rule(f"{number} of {len(waiting)}: {job.out}")
                check(job, _wait(subprocess.Popen(command(job), env=_environment(0, 1))))
        elif waiting:
            _side_by_side(waiting, console, parallel)
    return [job.outcome() for job in jobs]


def _interrupt() -> None:
    raise KeyboardInterrupt


def _side_by_side(waiting: Sequence[Job], console: Console, parallel: int) -> None:
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(parallel):
        slots.put(slot)
    running: set[subprocess.Popen[bytes]] = set()

    def work(job: Job) -> int:
        slot = slots.get()
        job.out.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(slots.put, slot)
            log = stack.enter_context(job.out.with_name(f"{job.out.name}.log").open("ab"))
            process = subprocess.Popen(
                command(job), env=_environment(slot, parallel), stdout=log, stderr=log
            )
            running.add(process)
            stack.callback(running.discard, process)
            return process.wait()

    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(work, job) for job in waiting]
        try:
            for number, (job, future) in enumerate(zip(waiting, futures, strict=True), start=1):
                check(job, future.result())
                console.print(f"{number} of {len(waiting)}: {job.out} {job.outcome()['status']}")
        except BaseException:
            for future in futures:
                future.cancel()
            for process in list(running):
                process.terminate()
            raise


def command(job: Job) -> list[str]:
    """The words that train it."""
    return [
        *(sys.executable, "-m", "pha", "train", job.recipe, "--out", str(job.out), "--quiet"),
        *job.overrides,
    ]


def _environment(slot: int, parallel: int) -> dict[str, str]:
    environment = dict(os.environ)
    if parallel > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // parallel))
        if devices := _cuda_devices():
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return environment


def _cuda_devices() -> list[str]:
    """Names of the GPUs that this process may use."""
    import torch

    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait()
    except KeyboardInterrupt:
        # The child writes its checkpoint. Ctrl-C reached it too; a signal to this process did not.
        process.terminate()
        process.wait()
        return INTERRUPTED


def check(job: Job, code: int) -> None:
    """Refuse an exit code that is not that of a run with an outcome.

    Raises:
        PHAError: the training failed.
        TrainingInterruptedError: the run was stopped, resumable.
    """
    if code == INTERRUPTED:
        raise TrainingInterruptedError("stopped; the same command continues")
    if code != 0 and not job.run.diverged.is_file():
        log = job.out.with_name(f"{job.out.name}.log")
        where = f"see {log}" if log.is_file() else "see above"
        raise PHAError(f"training {job.out} failed with exit code {code}; {where}")
