"""What a run keeps is what it was when it was asked for, and training does not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from pha.data import TokenStore
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.runs import RunFolder
from pha.train import saving
from pha.train.checkpoint import Progress, load_checkpoint
from pha.train.config import OptimizerConfig
from pha.train.optim import make_optimizer
from pha.train.saving import Saver, Snapshot, save_checkpoint


@pytest.fixture
def model() -> PHAForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "head_dim": 8, "state_size": 16}
    return PHAForCausalLM(PHAConfig.from_preset("pha-tiny", vocab_size=257, **sizes))


@pytest.fixture
def tokenizer(store: TokenStore) -> PreTrainedTokenizerFast:
    return store.tokenizer()


@pytest.fixture
def saver(
    model: PHAForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Iterator[Saver]:
    optimizer = torch.optim.AdamW(model.parameters())
    found = Saver(RunFolder(tmp_path), model, optimizer, tokenizer, main=True)
    yield found
    found.thread.shutdown()


def take_a_step(saver: Saver) -> None:
    ids = torch.arange(24).view(2, 12)
    saver.model(input_ids=ids, labels=ids).loss.backward()
    saver.optimizer.step()
    saver.optimizer.zero_grad()


def moments_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": x.clone()
        for name, parameter in model.named_parameters()
        for key, x in optimizer.state[parameter].items()
    }


def held_writing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have a checkpoint's writing wait, in its thread, until the event is set."""
    event = threading.Event()

    def write(*arguments: Any) -> None:
        assert event.wait(30), "nobody let it go on"
        save_checkpoint(*arguments)

    monkeypatch.setattr(saving, "save_checkpoint", write)
    return event


def test_a_snapshot_keeps_weights_and_settings_of_its_moment(
    model: PHAForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "plain")
    snapshot = Snapshot(model, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.config.attention_window = 5  # as `run.windows` does from step to step
    for name in ("first", "second"):  # it can be written twice
        snapshot.write(tmp_path / name)
        for file in ("model.safetensors", "config.json"):
            expected = (tmp_path / "plain" / file).read_bytes()
            assert (tmp_path / name / file).read_bytes() == expected


def test_training_goes_on_while_a_checkpoint_waits_to_be_written(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_a_step(saver)
    expected = {name: x.detach().clone() for name, x in saver.model.named_parameters()}
    moments = moments_by_name(saver.model, saver.optimizer)
    event = held_writing(monkeypatch)
    saver.save_checkpoint(Progress(step=1, tokens=24), keep=1, carried=None)
    take_a_step(saver)
    saver.check()
    assert not saver.run.checkpoint_steps()
    event.set()
    saver.wait()
    assert saver.run.checkpoint_steps() == [1]
    again = PHAForCausalLM(saver.model.config)
    optimizer = torch.optim.AdamW(again.parameters())
    assert load_checkpoint(saver.run.checkpoint(1), again, optimizer).tokens == 24
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[name])
    found = moments_by_name(again, optimizer)
    assert found.keys() == moments.keys()
    assert all(torch.equal(found[name], moments[name]) for name in moments)
    names = load_file(saver.run.checkpoint(1) / "optimizer.safetensors")
    assert "model.embed_tokens.weight.exp_avg" in names


def test_nothing_is_written_after_what_could_not_be(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space")

    take_a_step(saver)
    monkeypatch.setattr(Snapshot, "write", fail)
    saver.save_model(1, several=False, best=True)
    saver.save_checkpoint(Progress(step=1), keep=1, carried=None)
    with pytest.raises(OSError, match="no space"):
        saver.wait()
    saver.thread.shutdown()
    assert not saver.run.checkpoint_steps()


def test_a_matrix_that_has_had_no_gradient_goes_on_from_a_checkpoint(
    model: PHAForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    optimizer = make_optimizer(model, OptimizerConfig(kind="muon"))
    late = model.get_parameter("model.layers.0.branches.gss.W_C.weight")
    late.requires_grad = False
    with Saver(RunFolder(tmp_path), model, optimizer, tokenizer, main=True) as saver:
        take_a_step(saver)
        saver.save_checkpoint(Progress(step=1), 1, None)
    late.requires_grad = True
    load_checkpoint(RunFolder(tmp_path).checkpoint(1), model, optimizer)
    before = late.clone()
    take_a_step(saver)
    assert not torch.equal(late, before)
