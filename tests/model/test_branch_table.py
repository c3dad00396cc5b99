"""A branch of one's own: registered, given options, used, saved and loaded like the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pha.model import (
    BRANCHES,
    ArchitectureConfig,
    Backbone,
    Branch,
    GatedStateSpace,
    register_branch,
)
from pha.model.branches import Context
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.utils.errors import PHAError
from tests.model.common import scramble, small

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def average(registry: None) -> type[Branch]:
    """A causal average over the last `window` tokens, times a learned gain."""

    @register_branch("average")
    class CausalAverage(Branch):
        def __init__(
            self, config: ArchitectureConfig, layer_idx: int, *, window: int = 2, scale: float = 1.0
        ) -> None:
            super().__init__(config, layer_idx)
            self.window, self.scale = window, scale
            self.gain = torch.nn.Parameter(torch.ones(config.hidden_size))

        def forward(self, z: Tensor, context: Context) -> Tensor:
            padded = torch.nn.functional.pad(z, (0, 0, self.window - 1, 0))
            return self.scale * self.gain * padded.unfold(1, self.window, 1).mean(-1)

    return CausalAverage


@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_custom_branch_works_in_both_blocks(block: str, average: type[Branch]) -> None:
    config = small(
        block=block,
        branches=["gss", "average"],
        branch_options={"average": {"window": 3}},
    )
    model = Backbone(config)
    found: list[Any] = [layer.get_submodule("branches.average") for layer in model.layers]
    assert [type(branch) for branch in found] == [average] * 3
    assert [branch.layer_idx for branch in found] == [0, 1, 2]
    assert {branch.window for branch in found} == {3}
    assert {branch.scale for branch in found} == {1.0}
    ids = torch.randint(37, (2, 9))
    model(ids).square().sum().backward()
    assert all(bool(branch.gain.grad.any()) for branch in found)


def test_option_changes_what_the_branch_does(average: type[Branch]) -> None:
    ids = torch.randint(37, (1, 9))

    def run(**options: Any) -> Tensor:
        torch.manual_seed(0)
        config = small(branches=["average", "aux_ffn"], branch_options={"average": options})
        return Backbone(config)(ids)

    assert torch.equal(run(), run(window=2))
    assert not torch.equal(run(), run(window=3))


@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_custom_branch_is_saved_and_loaded(
    block: Literal["parallel", "sequential"], average: type[Branch], tmp_path: Path
) -> None:
    config = PHAConfig(
        vocab_size=37,
        hidden_size=24,
        num_hidden_layers=2,
        block=block,
        branches=["attention", "average"],
        branch_options={"average": {"window": 4, "scale": 0.5}},
    )
    model = scramble(PHAForCausalLM(config)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.branches == ["attention", "average"]
    assert loaded.config.branch_options == {"average": {"window": 4, "scale": 0.5}}
    assert type(loaded.model.layers[1].branches["average"]) is average
    ids = torch.randint(37, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_options_of_another_subclass_of_a_paper_branch() -> None:
    @register_branch("slow-gss")
    class SlowStateSpace(GatedStateSpace):
        def __init__(self, config: ArchitectureConfig, layer_idx: int, *, slower: float) -> None:
            super().__init__(config, layer_idx)
            with torch.no_grad():
                self.log_dt.sub_(slower)

    def log_dt(name: str, **options: Any) -> Tensor:
        config = small(branches=[name], branch_options={name: options}, dt_min=0.01, dt_max=0.01)
        return Backbone(config).get_parameter(f"layers.0.branches.{name}.log_dt")

    difference = log_dt("gss") - log_dt("slow-gss", slower=2.0)
    torch.testing.assert_close(difference, torch.full((3,), 2.0))


def test_unknown_branch_names_the_field_and_what_there_is() -> None:
    with pytest.raises(PHAError, match=r"branches names 'gsss'.*attention, aux_ffn, .*gss, "):
        Backbone(small(branches=["gsss"]))
    config = PHAConfig(vocab_size=37, hidden_size=24, branches=["gsss"])
    with pytest.raises(PHAError, match=r"branches names 'gsss'"):
        PHAForCausalLM(config)


def test_unknown_option_names_the_branch_and_what_it_takes(average: type[Branch]) -> None:
    config = small(branches=["average"], branch_options={"average": {"widow": 3}})
    with pytest.raises(PHAError, match=r"branch average .*widow.*takes scale, window"):
        Backbone(config)
    config = small(branches=["gss"], branch_options={"gss": {"window": 3}})
    with pytest.raises(PHAError, match=r"branch gss .*window.*takes none"):
        Backbone(config)
    # What the block itself passes is not an option.
    config = small(branches=["gss"], branch_options={"gss": {"layer_idx": 3}})
    with pytest.raises(PHAError, match=r"branch gss .*layer_idx"):
        Backbone(config)


def test_options_of_an_absent_branch_are_refused() -> None:
    with pytest.raises(PHAError, match=r"branch_options names aux_ffn, not in branches"):
        small(branches=["gss"], branch_options={"aux_ffn": {}})


@pytest.mark.parametrize("name", ["keys", "items", "a.b", ""])
def test_names_that_a_module_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(PHAError, match=f"a branch cannot be called '{name}'"):
        register_branch(name)(type("Other", (Branch,), {}))
    assert name not in BRANCHES


@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_two_branches_of_a_layer_cannot_both_keep_keys(block: str) -> None:
    class Keys(Branch):
        keeps_keys = True

    register_branch("shared")(Keys)
    with pytest.raises(PHAError, match=r"branches shared and attention both keep keys"):
        Backbone(small(block=block, branches=["shared", "attention", "gss"]))
    # In different layers they may.
    Backbone(small(block=block, branches=["shared", "gss"], attention_layers=[1]))


def test_a_branch_of_ones_own_may_keep_a_state() -> None:
    @register_branch("sum")
    class RunningSum(Branch):
        states = ("total", "seen")

        def __init__(self, config: ArchitectureConfig, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.gain = torch.nn.Parameter(torch.empty(config.hidden_size))
            self.reset_parameters()

        def reset_parameters(self) -> None:
            torch.nn.init.constant_(self.gain, 0.25)

        def forward(self, z: Tensor, context: Context) -> Tensor:
            before, seen = self.past(context, "total"), self.past(context, "seen")
            total = z.cumsum(1) + (0 if before is None else before.unsqueeze(1))
            seen = z.new_ones(len(z), 1) * z.shape[1] + (0 if seen is None else seen)
            self.keep(context, total=total[:, -1], seen=seen)
            return self.gain * total + seen.unsqueeze(1) * 0 + context.positions.unsqueeze(-1)

    config = PHAConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=2, branches=["gss", "sum", "attention"]
    )
    assert config.layer_types == ["hybrid"] * 2
    model = PHAForCausalLM(config).eval()
    assert model.model.layers[0].branches["sum"].gain.tolist() == [0.25] * 24
    ids = torch.randint(37, (2, 9))
    cache = model(ids[:, :4]).past_key_values
    states = [{i: tuple(x.shape) for i, x in x.recurrent_states.items()} for x in cache.layers]
    assert states == [{0: (2, 2176), 1: (2, 24), 2: (2, 1)}] * 2
    rest = model(ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 4:], rtol=0, atol=1e-5)


def test_a_name_cannot_be_taken_twice(average: type[Branch]) -> None:
    with pytest.raises(PHAError, match=r"'gss' already: GatedStateSpace"):
        register_branch("gss")(average)
    assert BRANCHES["gss"] is GatedStateSpace
    # Registering the same class again, as a reloaded notebook cell does, is fine.
    assert register_branch("average")(average) is average
