"""Sequences whose pieces several processes read: the same steps as one process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pha.cli import main
from pha.data import TokenStore
from pha.modeling import PHAConfig
from pha.runs import RunFolder
from pha.train.plan import activation_bytes_per_token
from pha.train.split import gathered_bytes
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


def test_what_crosses_the_network_is_counted() -> None:
    config = PHAConfig.from_preset("pha-tiny", num_hidden_layers=3)
    ranks, length = 4, 2048
    got = gathered_bytes(config, "fp32", length, ranks)
    keys = 2 * config.num_key_value_heads * config.head_dim * length // ranks
    assert got == {
        "attention": 3 * (ranks - 1) * 4 * keys,
        "gss": 3 * (ranks - 1) * 4 * 2 * config.state_size,  # last state and decays
    }
    assert gathered_bytes(config, "bf16", length, ranks)["attention"] == got["attention"] / 2


def test_a_plan_for_more_devices_names_their_traffic(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "pha-tiny.text", "--data", str(store.path), "--out", str(tmp_path / "run")]
    words += ["--data.sequence_length", "32", "--run.global_batch", "2", "--run.epochs", "null"]
    words += ["--run.steps", "1", "--run.context_parallel", "4"]
    main([*words, "--dry-run", "--devices", "8", "--json"])
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["devices"] == 8
    assert plan["gradient_bytes"] == round(7 / 8 * 8 * plan["parameters"])
    assert plan["gathered_bytes"]["attention"] > 0
    with pytest.raises(SystemExit):
        main([*words, "--devices", "8"])
    assert "--devices is for --dry-run" in capsys.readouterr().err


def test_what_a_rank_keeps_falls_with_their_number() -> None:
    config = PHAConfig.from_preset("pha-125m", num_hidden_layers=2)
    whole = activation_bytes_per_token(config, "bf16")
    for ranks in (2, 8):
        kept = activation_bytes_per_token(config, "bf16", ranks=ranks)
        # Each token of a piece keeps the gathered keys of `ranks` tokens, and states twice.
        assert whole < kept < 1.4 * whole
