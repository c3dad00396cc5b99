"""Runs spread over a Slurm cluster by submitit, an optional extra: `pip install 'pha[cluster]'`.

submitit and not Ray: the runs are independent processes that share a file system and nothing else,
which is what a batch queue is for, and it needs no service of its own to be up.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pha.studies.jobs import Job, check, command
from pha.utils.errors import PHAError

MINUTES = 24 * 60


def run_on_cluster(
    jobs: Sequence[Job], partition: str, folder: Path, console: Console
) -> list[dict[str, Any]]:
    """Submit every run that is not finished, a GPU each, and wait for all.

    Stopping this leaves the submitted runs in the queue; the same call later takes up what they
    have finished.

    Args:
        jobs: runs with folders of their own, on a file system that all nodes see.
        partition: of the cluster.
        folder: for the logs.
        console: for progress.

    Raises:
        PHAError: submitit is not installed, or a training failed.
    """
    try:
        import submitit  # type: ignore[import-not-found]
    except ImportError as error:
        raise PHAError(
            "--cluster needs submitit, which is not installed; run `pip install 'pha[cluster]'`"
        ) from error
    waiting = [job for job in jobs if not job.finished()]
    executor = submitit.AutoExecutor(folder=folder / "slurm")
    executor.update_parameters(
        slurm_partition=partition, gpus_per_node=1, timeout_min=MINUTES, name="pha-study"
    )
    commands = [command(job) for job in waiting]
    submitted = executor.map_array(subprocess.call, commands) if waiting else []
    for number, (job, handle) in enumerate(zip(waiting, submitted, strict=True), start=1):
        check(job, handle.result())
        console.print(f"{number} of {len(waiting)}: {job.out} {job.outcome()['status']}")
    return [job.outcome() for job in jobs]
