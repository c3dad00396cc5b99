"""Runs of several processes that torchrun started: what stops one, and how it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pha.data import TokenStore
from pha.runs import RunFolder
from tests.train.test_runs import arguments, wait_for_checkpoint, weights

pytestmark = pytest.mark.slow
CHANGES = {"run__steps": 120, "run__checkpoint_every": 5, "run__evaluate_every": 60}


def start(store: TokenStore, out: Path, processes: int, **changes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", "pha", "train", "pha-tiny.text"]
    command += ["--out", str(out), *arguments(store, run__epochs="null", **(CHANGES | changes))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU", None)
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(store: TokenStore, out: Path, processes: int, **changes: Any) -> RunFolder:
    process = start(store, out, processes, **changes)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed[-3000:]
    return RunFolder(out)


def assert_same(a: RunFolder, b: RunFolder) -> None:
    one, other = (weights(run.checkpoint(CHANGES["run__steps"])) for run in (a, b))
    for key, value in one.items():
        assert torch.equal(other[key], value), key


def test_a_job_that_is_asked_to_stop_saves_and_goes_on(store: TokenStore, tmp_path: Path) -> None:
    """As a scheduler does before it preempts: SIGTERM to torchrun."""
    whole = finish(store, tmp_path / "whole", 2)
    run = RunFolder(tmp_path / "stopped")
    process = start(store, run.path, 2, run__checkpoint_every=1000)
    while not (run.metrics.exists() and run.read_metrics().train):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert run.checkpoint_steps(), printed[-3000:]
    assert not run.result.exists()
    assert_same(whole, finish(store, run.path, 2, run__checkpoint_every=1000))


def test_a_rank_that_is_killed_ends_the_job_and_its_number_is_named(
    store: TokenStore, tmp_path: Path
) -> None:
    whole = finish(store, tmp_path / "whole", 2)
    run = RunFolder(tmp_path / "killed")
    process = start(store, run.path, 2)
    wait_for_checkpoint(run, process)
    (victim,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == "1"
    )
    victim.kill()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "rank      : 1" in printed
    assert "SIGKILL" in printed or "-9" in printed
    assert_same(whole, finish(store, run.path, 2))


def test_fewer_processes_go_on(store: TokenStore, tmp_path: Path) -> None:
    changes = {"model__dropout": 0.0}  # whose masks depend on the micro-batch
    whole = finish(store, tmp_path / "whole", 1, **changes)
    run = RunFolder(tmp_path / "elastic")
    process = start(store, run.path, 4, **changes)
    wait_for_checkpoint(run, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    last = finish(store, run.path, 2, **changes)
    losses = [kept.read_metrics().eval[-1].loss for kept in (whole, last)]
    # Sums over a batch are associated differently.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
