"""Runs of several processes that torchrun started: what stops one, and how it goes on."""

from __future__ import annotations

import os
import re
import signal
import socket
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
    return torchrun(["--standalone", f"--nproc_per_node={processes}"], store, out, **changes)


def torchrun(
    options: list[str], store: TokenStore, out: Path, to: Any = subprocess.PIPE, **changes: Any
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    command += ["-m", "pha", "train", "pha-tiny.text", "--out", str(out)]
    command += arguments(store, run__epochs="null", **(CHANGES | changes))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    environment.pop("ACCELERATE_USE_CPU", None)
    return subprocess.Popen(
        command, env=environment, stdout=to, stderr=subprocess.STDOUT, text=True
    )


def worker(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of that rank below a torchrun."""
    (found,) = (
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank)
    )
    return found


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
    worker(process, 1).kill()
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


def test_a_rank_that_hangs_ends_the_job_and_is_named(store: TokenStore, tmp_path: Path) -> None:
    changes = {"run__global_batch": 6, "run__timeout": 10, "run__evaluate_every": 1000}
    run = RunFolder(tmp_path / "hanging")
    process = start(store, run.path, 3, **changes)
    wait_for_checkpoint(run, process)
    worker(process, 2).suspend()
    # Two signs of life after the timeout, then what torchrun gives a process to leave by itself.
    printed, _ = process.communicate(timeout=10 + 20 + 30 + 10)
    assert process.returncode != 0
    (line,) = (line for line in printed.splitlines() if line.startswith("pha: "))
    assert re.match(r"pha: rank 2 \(.+\) gives no sign of life: .*; step \d+ was not", line)
    before = run.checkpoint_steps()[-1]
    finish(store, run.path, 1, **changes)
    first = next(r.step for r in run.read_metrics().train if r.step > before)
    assert first == before + 1
    assert run.result.exists()


def test_three_machines_go_on_by_themselves_when_a_fourth_is_lost(
    store: TokenStore, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "elastic")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=3:4", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d"]
    options += [f"--rdzv_endpoint=127.0.0.1:{port}"]
    options += ["--rdzv_conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=5"]
    changes = {"run__global_batch": 12, "run__evaluate_every": 1000, "run__steps": 60}
    agents = []
    for number in range(4):
        with (tmp_path / f"{number}.log").open("w") as log:
            agents.append(torchrun(options, store, run.path, log, **changes))
        if number == 0:  # it holds the store of all, which the others look for
            time.sleep(1)
    try:
        wait_for_checkpoint(run, agents[0])
        lost = psutil.Process(agents[-1].pid)
        for process in [*lost.children(recursive=True), lost]:
            process.kill()
        agents.pop().wait()
        codes = [agent.wait(timeout=180) for agent in agents]
        assert codes == [0, 0, 0], (tmp_path / "0.log").read_text()[-3000:]
    finally:
        for agent in agents:
            agent.terminate()
    assert run.read_result().provenance["processes"] == 3
