"""Processes that share a batch, with whole weights or a part of them: the steps of one process."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pha.data import TokenStore
from pha.runs import RunFolder
from pha.utils.errors import PHAError
from pha.utils.processes import turns
from tests.train.conftest import Train
from tests.train.test_processes import finish, start

STEPS = 50
CHANGES: dict[str, Any] = {
    "optimizer__kind": "muon",
    "optimizer__learning_rate": 3e-3,
    "run__steps": STEPS,
    "run__global_batch": 8,
    "run__micro_batch": 1,  # so that dropout has the same masks in whichever process
    "run__checkpoint_every": 25,
    "run__evaluate_every": 25,
    "run__keep_best": 2,
    "run__average_best": 2,
    "run__watch_every": 20,
}


def losses(run: RunFolder) -> list[float]:
    kept = run.read_metrics()
    return [record.loss for part in (kept.train, kept.eval) for record in part]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["pha-tiny", "pha-125m-mamba2-tiny", "rg-lru-tiny"])
def test_processes_take_the_steps_of_one(store: TokenStore, tmp_path: Path, preset: str) -> None:
    changes = CHANGES | {"model__preset": preset}
    runs = {
        (processes, shards): finish(
            store, tmp_path / f"{processes}-{shards}", processes, **changes, run__shards=shards
        )
        for processes, shards in ((1, 1), (2, 1), (2, 2), (4, 2))
    }
    one = runs[1, 1]
    assert len(losses(one)) == STEPS + 2
    for (processes, _), run in runs.items():
        assert run.read_result().provenance["processes"] == processes
        assert losses(run) == pytest.approx(losses(one), rel=1e-5)
        # What the first layer's gradient was, in every step that was looked at, and the mixing.
        seen, other = (kept.read_metrics().watch for kept in (one, run))
        assert [x.layers[0].gradient for x in other] == pytest.approx(
            [x.layers[0].gradient for x in seen], rel=1e-3
        )
        averaged = [load_file(kept.averaged / "model.safetensors") for kept in (one, run)]
        for name, value in averaged[0].items():
            if value.numel() == 1:  # the weight of a branch that is alone has no gradient but noise
                continue
            torch.testing.assert_close(averaged[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_sharded_run_that_is_cut_goes_on_to_the_same_bits_and_on_fewer_processes(
    store: TokenStore, tmp_path: Path
) -> None:
    sharded = CHANGES | {"run__shards": 2}
    whole = finish(store, tmp_path / "whole", 2, **sharded)
    for processes, shards in ((2, 2), (1, 1)):
        run = RunFolder(tmp_path / f"cut-{processes}")
        process = start(store, run.path, 2, **sharded)
        while not (run.metrics.exists() and len(run.read_metrics().train) > 5):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
        assert 0 < run.checkpoint_steps()[-1] < STEPS, printed[-2000:]
        finish(store, run.path, processes, **sharded | {"run__shards": shards})
        assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
        for name in ("model.safetensors", "optimizer.safetensors"):
            a, b = (load_file(r.checkpoint(STEPS) / name) for r in (whole, run))
            assert a.keys() == b.keys()
            assert processes == 1 or all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_shards_of_pieces_take_the_steps_of_one(store: TokenStore, tmp_path: Path) -> None:
    changes = CHANGES | {"model__dropout": 0.0, "run__steps": 4, "run__average_best": 1}
    one = finish(store, tmp_path / "one", 1, **changes)
    both = finish(store, tmp_path / "both", 4, **changes, run__shards=4, run__context_parallel=2)
    assert losses(both) == pytest.approx(losses(one), rel=1e-5)


def test_shards_that_no_processes_make_are_refused(train_small: Train) -> None:
    with pytest.raises(PHAError, match=r"run\.shards is 2, and the number of processes \(1\) no"):
        train_small(run__shards=2)


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_every_process_takes_as_many_turns_and_every_item_counts_once(ranks: int) -> None:
    items = list("abcdefg")
    taken = [list(turns(items, (rank, ranks))) for rank in range(ranks)]
    assert len({len(each) for each in taken}) == 1
    assert sorted(x for each in taken for x, counts in each if counts) == items
