"""Sequences whose pieces several processes read: the same steps as one process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pha.data import TokenStore
from pha.runs import RunFolder
from pha.utils.errors import PHAError
from tests.train.conftest import Train
from tests.train.test_runs import arguments, weights


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "ranks"), [(2, 2), (4, 2), (4, 4)])
def test_processes_with_pieces_take_the_steps_of_one(
    processes: int, ranks: int, train_small: Train, store: TokenStore, tmp_path: Path
) -> None:
    changes = {"run__micro_batch": 2, "model__dropout": 0.0, "data__packed_documents": "true"}
    train_small("one", **changes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", "pha", "train", "pha-tiny.text"]
    command += ["--out", str(tmp_path / "split"), "--json"]
    command += arguments(store, run__epochs="null", run__context_parallel=ranks, **changes)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["provenance"]["processes"] == processes
    one, split = (RunFolder(tmp_path / name) for name in ("one", "split"))
    a, b = weights(one.checkpoint(8)), weights(split.checkpoint(8))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-4, atol=2e-5)
    losses = [
        [record.loss for part in (kept.train, kept.eval) for record in part]
        for kept in (one.read_metrics(), split.read_metrics())
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_does_not_go_with_it_is_refused(train_small: Train) -> None:
    with pytest.raises(PHAError, match=r"the number of processes \(1\) no multiple of it"):
        train_small(run__context_parallel=2)
    with pytest.raises(PHAError, match=r"must be a multiple of run\.context_parallel \(3\)"):
        train_small(run__context_parallel=3, data__sequence_length=32)
    with pytest.raises(PHAError, match=r"leave data\.carry out, or run\.context_parallel"):
        train_small(run__context_parallel=2, data__carry="chunks")
