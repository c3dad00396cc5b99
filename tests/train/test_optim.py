from __future__ import annotations

import math

import pytest

from pha.modeling import PHAConfig, PHAForCausalLM
from pha.train.config import OptimizerConfig, ScheduleConfig
from pha.train.optim import Schedule, make_optimizer, set_rate


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
