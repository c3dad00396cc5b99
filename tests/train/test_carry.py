"""What rows leave to the next step: as if their text had been read at once, to the bit."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pha.data import TokenStore
from pha.data.sampler import StretchSampler
from pha.modeling import PHAForCausalLM
from pha.runs import RunFolder
from pha.train.carry import Carried
from pha.train.config import DataConfig, RunConfig, TrainConfig
from pha.train.windows import window_at
from pha.utils.errors import PHAError, TrainingInterruptedError
from tests.mixers.test_every_mixer import SMALL
from tests.modeling.common import scrambled, small_config, tokens
from tests.train.conftest import Train, arguments
from tests.train.test_runs import assert_same_weights, stop_after, timeless

T, ROWS, STEPS = 7, 3, 4

MODELS: dict[str, dict[str, Any]] = {
    "pha": {"attention_window": None},
    "windowed": {"attention_window": 6},
    "mamba2": {"branches": ["mamba2", "attention"]},
    "gated_deltanet": {"branches": ["gated_deltanet"]},
    "compressive": {"branches": ["compressive_attention"]},
    "alibi": {
        "branches": ["attention"],
        "attention_logits": "dot-product",
        "branch_options": {"attention": {"positions": "alibi"}},
    },
}


def model_of(name: str) -> PHAForCausalLM:
    changes = MODELS[name]
    options = changes.get("branch_options", {})
    small = {b: SMALL[b] for b in changes.get("branches", ()) if b in SMALL}
    config = small_config(**changes | {"branch_options": options | small})
    return scrambled(config).double().train()


def carried(model: PHAForCausalLM, carry: Any = "chunks", **data: Any) -> Carried:
    config = TrainConfig(
        model=model.config,
        data=DataConfig(sequence_length=T, carry=carry, **data),
        run=RunConfig(global_batch=ROWS),
    )
    return Carried(config, [(0, 2), (2, ROWS)], torch.device("cpu"))


def pieces(ids: torch.Tensor, starts: torch.Tensor | None, step: int) -> list[dict[str, Any]]:
    """Arguments of the model for the micro-batches of a step, as the sampler gives them."""
    at = slice(step * T, (step + 1) * T)
    return [
        {
            "input_ids": ids[rows, at],
            "shift_labels": ids[rows, at],
            "document_starts": None if starts is None else starts[rows, at],
        }
        for rows in (slice(0, 2), slice(2, ROWS))
    ]


def run_steps(model: PHAForCausalLM, past: Carried, ids: Any, starts: Any = None) -> Any:
    """Last hidden states (ROWS, STEPS T, d) of all steps."""
    steps = []
    for step in range(ids.shape[1] // T):
        outputs = []
        for piece, inputs in enumerate(pieces(ids, starts, step)):
            given = past.enter(step, piece, inputs)
            given.pop("shift_labels")
            outputs.append(model.model(**given).last_hidden_state)
            past.leave(piece, given)
        steps.append(torch.cat(outputs))
    return torch.cat(steps, 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
def test_steps_in_a_row_are_one_long_forward(name: str, packed: bool) -> None:
    model, ids = model_of(name), tokens(ROWS, STEPS * T)
    starts = torch.rand(ids.shape) < 0.1 if packed else None
    memory = None if name == "windowed" else STEPS * T
    actual = run_steps(model, carried(model, memory=memory), ids, starts)
    whole = model.model(ids, document_starts=starts).last_hidden_state
    torch.testing.assert_close(actual, whole, rtol=0, atol=1e-11)


def test_gradients_stay_within_a_step() -> None:
    model, ids = model_of("pha"), tokens(ROWS, 2 * T)
    past = carried(model, memory=T)
    run_steps(model, past, ids[:, :T])
    assert past.memory == T
    assert all(not x.requires_grad for x in past.pasts[0].values())
    seen = [x.clone() for x in past.pasts[0].values()]
    given = past.enter(1, 0, pieces(ids, None, 1)[0])
    model.model.gradient_checkpointing = True  # which reads the past a second time
    again = model(**given).loss
    again.backward()
    assert all(torch.equal(x, y) for x, y in zip(seen, past.pasts[0].values(), strict=True))
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.model.gradient_checkpointing = False
    model.zero_grad()
    loss = model(**past.enter(1, 0, pieces(ids, None, 1)[0])).loss
    loss.backward()
    assert torch.equal(loss, again)
    mine = [p.grad for p in model.parameters() if p.grad is not None]
    for x, y in zip(grads, mine, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_memory_is_bounded_and_only_what_it_holds_is_seen() -> None:
    model, ids = model_of("pha"), tokens(ROWS, 3 * T)
    past = carried(model, memory=4)
    run_steps(model, past, ids)
    sizes = {name: x.shape for name, x in past.pasts[0].items()}
    assert {s[2] for name, s in sizes.items() if name[:3] in ("key", "val")} == {4}
    assert sizes["starts"] == (2, 4)
    one = small_config(branches=["attention"], num_hidden_layers=1)
    attention, first_seen = scrambled(one).double(), 2 * T - 4

    def last_step(changed: int) -> torch.Tensor:
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 7
        step: torch.Tensor = run_steps(attention, carried(attention, memory=4), other)[:, -T:]
        return step

    unchanged = run_steps(attention, carried(attention, memory=4), ids)[:, -T:]
    assert torch.equal(last_step(first_seen - 1), unchanged)
    assert not torch.equal(last_step(first_seen), unchanged)


def test_a_row_that_begins_anew_sees_nothing_of_the_past() -> None:
    model, ids = model_of("pha"), tokens(ROWS, 2 * T)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[1, T] = True
    both = run_steps(model, carried(model), ids, starts)
    alone = model.model(ids[1:2, T:]).last_hidden_state
    torch.testing.assert_close(both[1:2, T:], alone, rtol=0, atol=1e-11)
    assert not torch.allclose(both[0, T:], model.model(ids[:1, T:]).last_hidden_state[0])


def test_states_are_passed_in_their_share_of_steps_and_without_keys() -> None:
    model, ids = model_of("pha"), tokens(ROWS, 2 * T)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, ::T] = True
    past = carried(model, "states", carry_share=1.0)
    passed = run_steps(model, past, ids, starts)
    assert {name.split(".")[0] for name in past.pasts[0]} == {"state", "tokens"}
    apart = model.model(ids[:, T:]).last_hidden_state
    assert not torch.allclose(passed[:, T:], apart)
    never = run_steps(model, carried(model, "states", carry_share=0.0), ids, starts)
    torch.testing.assert_close(never[:, T:], apart, rtol=0, atol=1e-11)
    gss = scrambled(small_config(branches=["gss"])).double()  # where states are all there is
    passed = run_steps(gss, carried(gss, "states", carry_share=1.0), ids, starts)
    whole = gss.model(ids).last_hidden_state
    torch.testing.assert_close(passed, whole, rtol=0, atol=1e-11)
    half = carried(model, "states")
    passes = [half._goes_on(step) for step in range(2000)]
    assert abs(sum(passes) / 2000 - 0.5) < 0.05
    # Windows of attention that are drawn for the same steps have nothing to do with it.
    narrow = [window_at({"16": 0.5, "full": 0.5}, half.seed, step) == 16 for step in range(2000)]
    agree = sum(a == b for a, b in zip(passes, narrow, strict=True))
    assert abs(agree / 2000 - 0.5) < 0.05


def test_rows_go_on_and_begin_anew_with_text_and_epoch() -> None:
    sampler = StretchSampler(np.arange(4 * 23 + 2), 4, 3, seed=1)
    length = sampler.steps_per_epoch
    assert (sampler.windows, length) == (23, 7)
    batches = [sampler.batch(step) for step in range(2 * length)]
    for step, (before, batch) in enumerate(itertools.pairwise(batches), 1):
        starts = batch.document_starts
        begins = torch.zeros(3, dtype=torch.bool) if starts is None else starts[:, 0]
        assert torch.equal(before.targets[:, -1] == batch.inputs[:, 0], ~begins)
        assert bool(begins.all()) == (step == length)
        assert torch.equal(begins, (batch.inputs[:, 0] == 0) | (step == length))
    for epoch in (batches[:length], batches[length:]):
        begin = torch.cat([batch.inputs[:, 0] for batch in epoch]).tolist()
        assert len(set(begin)) == len(begin) == 21
    assert torch.equal(StretchSampler(np.arange(94), 4, 3, 1).batch(9).inputs, batches[9].inputs)
    documents = StretchSampler(np.arange(94), 4, 3, 1, np.array([0, 5, 46]))
    for step in range(length):
        inputs, starts = documents.batch(step).inputs, documents.batch(step).document_starts
        expected = torch.isin(inputs, torch.tensor([0, 5, 46]))
        expected[:, 0] |= step == 0
        assert starts is not None
        assert torch.equal(starts, expected)


@pytest.mark.parametrize("carry", ["chunks", pytest.param("states", marks=pytest.mark.slow)])
def test_interrupted_and_resumed_equals_uninterrupted(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carry: str
) -> None:
    settings = {"data__carry": carry, "run__micro_batch": 3, "run__steps": 4}
    train_small = partial(train_small, **settings, run__watch_every=0)
    train_small("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(TrainingInterruptedError):
            train_small("cut")
    kept = load_file(RunFolder(tmp_path / "cut").checkpoint(2) / "carried.safetensors")
    assert {len(x) for x in kept.values()} == {4}
    train_small("cut")
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    assert_same_weights(whole.checkpoint(4), cut.checkpoint(4))
    assert timeless(whole) == timeless(cut)


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(
    train_small: Train, store: TokenStore, tmp_path: Path
) -> None:
    """And with other micro-batches; a checkpoint holds the rows of both."""
    changes = {"data__carry": "chunks", "model__dropout": 0.0, "run__watch_every": 0}
    train_small("one", **changes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "pha", "train", "pha-tiny.text", "--out", str(tmp_path / "two"), "--json"]
    command += arguments(store, run__epochs="null", run__micro_batch=1, **changes)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (RunFolder(tmp_path / name).checkpoint(8) for name in ("one", "two"))
    for name, limits in (("model", (1e-4, 2e-5)), ("carried", (1e-3, 1e-3))):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
        for key, value in a.items():
            torch.testing.assert_close(b[key], value, rtol=limits[0], atol=limits[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__memory": 8}, "data.memory is 8, and data.carry none carries no keys"),
        ({"data__carry": "chunks", "run__compile": True}, "run.compile needs one shape"),
        ({"data__carry": "chunks", "data__memory": -1}, "data.memory is -1; it must be at least 0"),
        ({"data__carry": "states", "data__carry_share": 2}, "data.carry_share is 2.0"),
        ({"data__carry": "states", "model__branches": "[attention]"}, "no branch of this model"),
    ],
)
def test_what_cannot_be_carried_is_refused(
    train_small: Train, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(PHAError, match=words):
        train_small(**changes)
