from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from pha.modeling import PHAConfig, PHAForCausalLM
from pha.train.config import OptimizerConfig, ScheduleConfig
from pha.train.optim import (
    Muon,
    MuonAdamW,
    Schedule,
    make_optimizer,
    orthogonal,
    set_rate,
)
from pha.utils.errors import PHAError


@pytest.fixture(scope="module")
def model() -> PHAForCausalLM:
    config = PHAConfig.from_preset("pha-tiny", vocab_size=50, num_hidden_layers=2)
    return PHAForCausalLM(config)


def test_the_state_space_of_mehta_does_not_decay_and_its_rates_are_capped() -> None:
    config = PHAConfig.from_preset("pha-125m-mehta-tiny", vocab_size=50, num_hidden_layers=2)
    model = PHAForCausalLM(config)
    optimizer = make_optimizer(
        model, OptimizerConfig(weight_decay=0.3, state_space_learning_rate=1e-4)
    )
    set_rate(optimizer, 1e-2)
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    settings = {
        names[id(p)]: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert settings["Lambda_re"] == settings["Lambda_im"] == (0.0, 1e-4)
    assert settings["C_re"] == settings["C_im"] == settings["D"] == (0.0, 1e-2)
    seen = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())


def test_only_matrices_decay_and_every_parameter_is_in_one_group(model: PHAForCausalLM) -> None:
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    seen: list[str] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            undecayed = any(
                part in name for part in ("norm", "theta", "logit_scale", "log_A", "log_dt")
            )
            assert group["weight_decay"] == (0.0 if undecayed else 0.3), name
    assert sorted(seen) == sorted(names.values())


def test_state_space_rate_is_capped(model: PHAForCausalLM) -> None:
    optimizer = make_optimizer(model, OptimizerConfig(state_space_learning_rate=1e-4))
    names = {id(p): name for name, p in model.named_parameters()}
    for rate in (1e-2, 1e-5):
        set_rate(optimizer, rate)
        for group in optimizer.param_groups:
            is_state_space = any("log_" in names[id(p)] for p in group["params"])
            assert group["lr"] == (min(rate, 1e-4) if is_state_space else rate)


def muon_config(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(kind="muon", **changes)


def make_muon(model: PHAForCausalLM, **changes: Any) -> MuonAdamW:
    optimizer = make_optimizer(model, muon_config(**changes))
    assert isinstance(optimizer, MuonAdamW)
    return optimizer


def names_in(model: PHAForCausalLM, optimizer: torch.optim.Optimizer) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("preset", ["pha-tiny", "sequential-tiny", "pha-125m-mehta-tiny"])
def test_muon_takes_the_matrices_between_embedding_and_head(preset: str) -> None:
    model = PHAForCausalLM(PHAConfig.from_preset(preset, vocab_size=50, num_hidden_layers=2))
    optimizer = make_muon(model, weight_decay=0.3)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    muon, adamw = names_in(model, optimizer.muon), names_in(model, optimizer.adamw)
    assert set(muon) == linear - {"lm_head.weight"}
    assert sorted(muon + adamw) == sorted(name for name, _ in model.named_parameters())
    assert optimizer.muon.param_groups[0]["weight_decay"] == 0.3
    decayed = [g for g in optimizer.adamw.param_groups if g["weight_decay"] == 0.3]
    assert [len(group["params"]) for group in decayed] == [1]
    assert decayed[0]["params"][0] is model.model.embed_tokens.weight


def test_muon_has_a_rate_of_its_own_on_the_same_schedule(model: PHAForCausalLM) -> None:
    optimizer = make_muon(
        model, learning_rate=1e-3, muon_learning_rate=2e-2, state_space_learning_rate=5e-4
    )
    for rate in (1e-3, 1e-4):
        set_rate(optimizer, rate)
        assert optimizer.muon.param_groups[0]["lr"] == pytest.approx(20 * rate)
        assert {g["lr"] for g in optimizer.adamw.param_groups} == {rate, min(rate, 5e-4)}
    optimizer = make_muon(model, learning_rate=1e-3)
    set_rate(optimizer, 1e-4)
    assert optimizer.muon.param_groups[0]["lr"] == 1e-4


def take_steps(model: PHAForCausalLM, optimizers: list[torch.optim.Optimizer], n: int) -> None:
    for step in range(n):
        ids = torch.arange(24).view(2, 12) * (step + 3) % 50
        model(ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)


def assert_equal(a: PHAForCausalLM, b: PHAForCausalLM) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


def test_muon_beside_adamw_steps_as_the_two_do_alone(model: PHAForCausalLM) -> None:
    together, apart = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = make_muon(
        together, learning_rate=1e-3, muon_learning_rate=1e-2, muon_momentum=0.9, weight_decay=0.2
    )
    take_steps(together, [optimizer], 3)
    own = dict(apart.named_parameters())
    muon = Muon([{"params": [own[n] for n in names_in(together, optimizer.muon)]}], 1e-2, 0.2, 0.9)
    rest = names_in(together, optimizer.adamw)
    adamw = torch.optim.AdamW(
        [{"params": [own[n]], "weight_decay": 0.2 if "embed_tokens" in n else 0.0} for n in rest],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    take_steps(apart, [muon, adamw], 3)
    assert_equal(together, apart)


@pytest.mark.parametrize("shape", [(6, 17), (17, 6)])
def test_muon_is_torchs_but_for_rounding(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one = Muon([{"params": [ours]}], 0.1, 0.2, 0.9)
    other = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # theirs rounds to bfloat16
    assert ours.grad is not None
    u, _, v = torch.linalg.svd(ours.grad, full_matrices=False)
    values = u.T @ orthogonal(ours.grad) @ v.T
    assert (values - values.diag().diag()).abs().max() < 1e-4
    assert 0.6 < values.diag().min() <= values.diag().max() < 1.3


def test_muon_continues_from_a_saved_state(model: PHAForCausalLM) -> None:
    whole, cut = copy.deepcopy(model), copy.deepcopy(model)
    uninterrupted = make_muon(whole)
    take_steps(whole, [uninterrupted], 2)
    take_steps(whole, [uninterrupted], 2)
    before = make_muon(cut)
    take_steps(cut, [before], 2)
    after = make_muon(cut)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    set_rate(after, 1e-3)
    take_steps(cut, [after], 2)
    assert_equal(whole, cut)


def test_muon_without_a_matrix_is_refused() -> None:
    with pytest.raises(PHAError, match=r"set optimizer\.kind to adamw"):
        make_optimizer(torch.nn.Sequential(torch.nn.Embedding(5, 3)), muon_config())


def test_cosine_goes_from_warmup_to_peak_to_floor() -> None:
    schedule = Schedule(ScheduleConfig(kind="cosine", warmup_steps=10, floor=0.1), 2.0, 111)
    assert schedule.rate(0) == pytest.approx(0.2)
    assert schedule.rate(9) == schedule.rate(10) == pytest.approx(2.0)
    middle = 2.0 * (0.1 + 0.9 * 0.5)
    assert schedule.rate(60) == pytest.approx(middle)
    assert schedule.rate(110) == pytest.approx(0.2)
    rates = [schedule.rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_plateau_waits_then_reduces_and_survives_a_restart() -> None:
    config = ScheduleConfig(kind="plateau", plateau_factor=0.5, plateau_patience=1, floor=0.2)
    schedule = Schedule(config, 1.0, 100)
    for perplexity in (9.0, 8.0, 8.5):
        schedule.observe(perplexity)
    assert schedule.rate(50) == 1.0
    other = Schedule(config, 1.0, 100)
    other.load_state(schedule.state())
    for s in (schedule, other):
        s.observe(8.1)
        assert s.rate(50) == 0.5
        s.observe(7.0)
        s.observe(7.0)
        s.observe(7.0)
        assert s.rate(50) == 0.25
        for _ in range(4):
            s.observe(math.inf)
        assert s.rate(50) == 0.2


def test_fresh_state_is_plain_json() -> None:
    schedule = Schedule(ScheduleConfig(), 1.0, 10)
    assert schedule.state()["best"] is None
    schedule.load_state(schedule.state())
    assert schedule.best == math.inf


def test_warmup_stable_decay_holds_the_peak_and_then_falls_in_a_line() -> None:
    config = ScheduleConfig(
        kind="warmup-stable-decay", warmup_fraction=0.1, decay_fraction=0.2, floor=0.1
    )
    schedule = Schedule(config, 3.0, 100)
    assert schedule.rate(0) == pytest.approx(0.3)
    assert [schedule.rate(step) for step in (9, 10, 50, 79)] == [3.0] * 4
    assert schedule.rate(89) == pytest.approx(3.0 * (0.1 + 0.9 * 0.5))
    assert schedule.rate(99) == pytest.approx(0.3)
    falls = [schedule.rate(step) - schedule.rate(step + 1) for step in range(79, 99)]
    assert falls == pytest.approx([3.0 * 0.9 / 20] * 20)


def test_warmup_steps_win_over_the_fraction() -> None:
    config = ScheduleConfig(kind="constant", warmup_steps=0, warmup_fraction=0.5)
    assert Schedule(config, 1.0, 10).rate(0) == 1.0
    assert Schedule(ScheduleConfig(kind="constant", warmup_fraction=0.5), 1.0, 10).rate(0) == 0.2
