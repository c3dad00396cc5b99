"""Many training runs: each in a process of its own, what is finished skipped, some side by side.

On one machine they are processes of ours; on a Slurm cluster submitit starts them, an optional
extra: `pip install 'pha-lm[cluster]'`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from pha.results import RunResult
from pha.runs import RunFolder
from pha.train.recipes import Settings, as_words, load_recipe
from pha.train.session import finished_result
from pha.utils.errors import (
    INTERRUPTED,
    STOPPED,
    PHAError,
    StoppedError,
    TrainingInterruptedError,
)
from pha.utils.formats import read_json
from pha.utils.modules import ASKED
from pha.utils.processes import Command, run_processes
from pha.utils.signals import leave, on_stop_signals

CLUSTER = "slurm"
CLUSTER_MINUTES = 24 * 60


@dataclass(frozen=True)
class Job:
    """One run to train."""

    recipe: str  # PRESET.PROTOCOL or a YAML file
    out: Path  # its run folder
    settings: Settings = field(default_factory=dict)  # what is changed in the recipe

    @property
    def run(self) -> RunFolder:
        """Where it is kept."""
        return RunFolder(self.out)

    @property
    def log(self) -> Path:
        """What it prints where several run side by side."""
        return self.out.with_name(f"{self.out.name}.log")

    def finished(self) -> bool:
        """Whether there is a result, or a record that the run diverged.

        Raises:
            PHAError: the folder holds another run, or the configuration is impossible.
        """
        config = load_recipe(self.recipe, self.settings)
        return finished_result(self.run, config) is not None or self.diverged_at() is not None

    def result(self) -> RunResult | None:
        """What it came to; None where it diverged.

        Raises:
            PHAError: neither is there yet.
        """
        return None if self.diverged_at() is not None else self.run.read_result()

    def diverged_at(self) -> int | None:
        """The step at which it diverged; None where it did not."""
        if not self.run.diverged.is_file():
            return None
        return int(read_json(self.run.diverged)["step"])

    def words(self) -> list[str]:
        """The command that trains it."""
        modules = [f"--import={name}" for name in ASKED]
        words = [sys.executable, "-m", "pha", *modules, "train", self.recipe]
        return [*words, "--out", str(self.out), "--quiet", *as_words(self.settings)]

    def check(self, code: int) -> None:
        """Refuse an exit code that is not that of a run with an outcome.

        Raises:
            PHAError: the training failed.
            TrainingInterruptedError: the run was stopped, resumable.
        """
        if code in (STOPPED, INTERRUPTED):
            raise TrainingInterruptedError("stopped; the same command continues", code)
        if code != 0 and self.diverged_at() is None:
            where = f"see {self.log}" if self.log.is_file() else "see above"
            raise PHAError(f"training {self.out} failed with exit code {code}; {where}")


def run_jobs(jobs: Sequence[Job], console: Console, parallel: int = 1) -> None:
    """Train what is not finished, `parallel` runs at a time.

    A process each makes peak memory and the state of random generators a matter of one run. Runs
    side by side share the cores, or get a GPU each in turn, and write to `OUT.log`. A run that
    diverges is an outcome, not a failure.

    Raises:
        PHAError: a bad configuration, found before anything is trained; or a training failed.
        TrainingInterruptedError: stopped by the user; the same call continues.
    """
    if parallel < 1:
        raise PHAError(f"jobs is {parallel}; at least 1")
    waiting = _unfinished(jobs, console)
    commands = [Command(job.words(), job.log if parallel > 1 else None) for job in waiting]
    try:
        with on_stop_signals(leave):
            run_processes(
                commands,
                parallel=parallel,
                started=lambda i: console.rule(f"{i + 1} of {len(waiting)}: {waiting[i].out}"),
                ended=lambda i, code: waiting[i].check(code),
            )
    except KeyboardInterrupt as stop:
        # The children have written their checkpoints.
        code = STOPPED if isinstance(stop, StoppedError) else INTERRUPTED
        raise TrainingInterruptedError("stopped; the same command continues", code) from None


def _unfinished(jobs: Sequence[Job], console: Console) -> list[Job]:
    waiting = [job for job in jobs if not job.finished()]
    for job in waiting:
        job.run.require_usable()
    if len(waiting) < len(jobs):
        console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are there already")
    return waiting


def run_on_cluster(jobs: Sequence[Job], partition: str, folder: Path, console: Console) -> None:
    """Submit every run that is not finished, a GPU each, and wait for all.

    All nodes must see the folders. Stopping this leaves the submitted runs in the queue; the same
    call later takes up what they have finished.

    Raises:
        PHAError: submitit or Slurm is not there, or a training failed.
    """
    try:
        import submitit  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise PHAError(
            "--cluster needs submitit, which is not installed; run `pip install 'pha-lm[cluster]'`"
        ) from error
    waiting = _unfinished(jobs, console)
    try:
        executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=CLUSTER)
    except RuntimeError as error:
        raise PHAError(f"--cluster: {error}") from error
    executor.update_parameters(
        slurm_partition=partition,
        gpus_per_node=1,
        timeout_min=CLUSTER_MINUTES,
        name="pha-study",
    )
    commands = [job.words() for job in waiting]
    submitted = executor.map_array(subprocess.call, commands) if waiting else []
    for number, (job, handle) in enumerate(zip(waiting, submitted, strict=True), start=1):
        try:
            code = handle.result()
        except submitit.core.utils.UncompletedJobError as error:
            raise PHAError(f"training {job.out} ended without an exit code: {error}") from error
        job.check(code)
        console.print(f"{number} of {len(waiting)}: {job.out}")
