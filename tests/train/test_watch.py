"""The numerics watch: what it measures, what it names, and that it changes nothing."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pha.model import BRANCHES, Branch, Context, Diagnostics
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.results import WarningRecord, WatchRecord
from pha.runs import RunFolder
from pha.train import trainer as trainer_module
from pha.train.config import TrainConfig
from pha.train.run import run_training
from pha.train.watch import Place, Watch, measure
from tests.train.conftest import Train
from tests.train.test_runs import assert_same_weights, timeless

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 32,
    "head_dim": 8,
    "dropout": 0.0,
}


def small_model(**changes: Any) -> PHAForCausalLM:
    torch.manual_seed(0)
    return PHAForCausalLM(PHAConfig.from_preset("pha-tiny", **SHAPE | changes)).train()


def tokens(rows: int = 2, length: int = 24) -> dict[str, Any]:
    ids = torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "document_starts": None}


def step(watch: Watch, number: int, loss: float) -> None:
    """A step with gradients of noise, but for the loss."""
    watch.before(number, tokens())
    noise = torch.Generator().manual_seed(number)
    for parameter in watch.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=noise)
    watch.gradients()
    watch.after(number, loss, tokens())


def looked(model: PHAForCausalLM) -> tuple[WatchRecord, list[WarningRecord]]:
    """What the watch says of a model at its first step."""
    watch = Watch(model, 1, 48, nullcontext)  # type: ignore[arg-type]
    step(watch, 1, 4.0)
    seen, *warnings = watch.records
    assert isinstance(seen, WatchRecord)
    assert watch.status.count("!") == bool(warnings)
    return seen, warnings  # type: ignore[return-value]


@pytest.mark.parametrize(
    "changes",
    [{}, {"run__micro_batch": 1, "run__gradient_checkpointing": "true", "run__precision": "bf16"}],
    ids=["plain", "accumulated"],
)
def test_watching_every_step_changes_no_bit(
    train_small: Train, tmp_path: Path, changes: dict[str, Any]
) -> None:
    train_small("watched", run__watch_every=1, **changes)
    train_small("blind", run__watch_every=0, **changes)
    watched, blind = RunFolder(tmp_path / "watched"), RunFolder(tmp_path / "blind")
    assert_same_weights(watched.checkpoint(8), blind.checkpoint(8))
    seen = watched.read_metrics()
    assert [record.step for record in seen.watch] == list(range(1, 9))
    assert blind.read_metrics().watch == blind.read_metrics().warning == []
    without = [record for record in timeless(watched) if "leaving" not in record]
    assert without == timeless(blind)


def test_a_look_measures_what_the_model_computes() -> None:
    model = small_model()
    inputs = tokens()
    found = measure(model, **inputs)
    with torch.no_grad():
        hidden = model.model(inputs["input_ids"], output_hidden_states=True).hidden_states
    for layer, x in enumerate(hidden[:-1]):
        entering = found[Place("entering", layer)]
        assert entering["rms"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-4)
        assert entering["largest"] == pytest.approx(float(x.abs().max()), rel=1e-4)
    second: Any = model.model.layers[1]
    gss = second.branches["gss"]
    numbers = found[Place("output", 1, "gss")]
    with torch.no_grad():
        half_lives = math.log(2) / (gss.log_dt.exp().repeat_interleave(16) * gss.log_A.exp())
    assert numbers["half_life_min"] == pytest.approx(float(half_lives.min()), rel=1e-4)
    assert numbers["half_life_max"] == pytest.approx(float(half_lives.max()), rel=1e-4)
    assert numbers["saturated_states"] == numbers["saturated_gates"] == 0
    attention = found[Place("output", 1, "attention")]
    assert attention["temperature_min"] == pytest.approx(10) == attention["temperature_max"]
    assert attention["clamped"] == 0
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_gradient_of_a_layer_is_over_all_its_parameters() -> None:
    model = small_model()
    record, warnings = looked(model)
    for layer, seen in zip(model.model.layers, record.layers, strict=True):
        grads = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
        assert seen.gradient == pytest.approx(float(grads.square().mean().sqrt()), rel=1e-4)
    assert warnings == []


@torch.no_grad()
def change(model: PHAForCausalLM, what: str) -> None:
    layer: Any = model.model.layers[1]
    if what == "dead branch":
        layer.mixing.theta[layer.mixing.names.index("attention")] = -20
    elif what == "silent branch":
        layer.branches["gss"].W_C.weight.zero_()
    elif what == "saturated gates":
        layer.branches["gss"].W_g.weight.mul_(1e5)
    elif what == "saturated states":
        layer.branches["gss"].log_dt.fill_(-18)
    elif what == "clamped temperature":
        layer.branches["attention"].logit_scale[1] = 7
    elif what == "overflow":
        model.model.layers[0].primary_ffn.W_down.weight.mul_(1e21)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("what", "branch", "message"),
    [
        ("dead branch", "attention", "attention in layer 1 has a share of 0.0%"),
        ("silent branch", "gss", "gss in layer 1 has a share of 0.0%"),
        ("saturated gates", "gss", "of its gates within 0.001 of 0 or 1"),
        ("saturated states", "gss", "everything in 100.0% of its states"),
        ("clamped temperature", "attention", "attention in layer 1 has 1 at the clamp"),
        ("overflow", None, "layer 1 has values up to"),
    ],
)
def test_what_is_wrong_is_named(what: str, branch: str | None, message: str) -> None:
    model = small_model()
    change(model, what)
    _, [warning] = looked(model)
    assert warning.what == what.replace("silent", "dead")
    assert (warning.layer, warning.branch) == (1, branch)
    assert message in warning.message


class Average(Branch):
    """One that forgets half at every token, and one state in four everything."""

    def forward(self, z: Tensor, context: Context) -> Tensor:
        return z / 2

    def diagnostics(self, z: Tensor) -> Diagnostics:
        return Diagnostics(decays=torch.tensor([0.5, 0.5, 0.5, 0.0]))


def test_a_branch_of_ones_own_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BRANCHES, "average", Average)
    record, _ = looked(small_model(branches=["average", "aux_ffn"]))
    average = record.layers[1].branches["average"]
    assert average["half_life_max"] == pytest.approx(1, rel=1e-4)
    assert average["half_life_min"] == 0
    assert average["saturated_states"] == 0.25
    assert record.layers[1].branches["aux_ffn"].keys() == {"rms", "largest"}


def test_a_loss_far_above_its_median_is_a_spike_and_begins_once() -> None:
    watch = Watch(small_model(), 1000, 48, nullcontext)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(0)
    for number in range(1, 121):
        loss = 6 * 0.997**number + 0.1 * float(torch.randn((), generator=noise))
        step(watch, number, loss)
        assert not [r for r in watch.records if isinstance(r, WarningRecord)]
    step(watch, 121, 2 * loss)
    assert "loss spike" in watch.status
    seen, warning = watch.records
    assert isinstance(seen, WatchRecord)  # although none was due
    assert isinstance(warning, WarningRecord)
    assert "no layer left its range" in warning.message
    step(watch, 122, 2 * loss)
    assert watch.records == []
    assert "loss spike" in watch.status
    step(watch, 123, loss)
    assert watch.status == ""
    again = Watch(watch.model, 1000, 48, nullcontext)  # type: ignore[arg-type]
    again.load_state(json.loads(json.dumps(watch.state())))
    assert again.state() == watch.state()


@pytest.mark.parametrize(
    ("every", "place"), [(1, "what enters layer 1"), (50, "the gradient of layer 1")]
)
def test_a_spike_is_traced_to_its_step_and_layer(
    small_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    place: str,
) -> None:
    original = trainer_module.Trainer._step

    def poisoned(self: Any, number: int, rate: float) -> Any:
        body = self.plain_model.model
        with torch.no_grad():
            if number == 35:  # which the norms after it hide from the loss
                body.layers[0].primary_ffn.W_down.weight.mul_(1e5)
            if number == 40:
                body.norm.weight.mul_(30)
        return original(self, number, rate)

    monkeypatch.setattr(trainer_module.Trainer, "_step", poisoned)
    console = Console(file=io.StringIO(), width=300)
    settings = {"run__steps": 42, "run__watch_every": every, "run__evaluate_every": 42}
    config = small_config(**settings, optimizer__learning_rate=1e-5)
    run_training(config, tmp_path / "run", console)
    metrics = RunFolder(tmp_path / "run").read_metrics()
    [warning] = [each for each in metrics.warning if each.what == "loss spike"]
    assert (warning.step, warning.began, warning.layer) == (41, 36, 1)
    assert f"it began at step 36 with {place}" in warning.message
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"step 41: loss spike: {warning.message}" in output
    assert "! loss spike" in output
