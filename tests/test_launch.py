"""The files of launch/ are what Accelerate reads, or recipes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from pha.model.parameters import count_parameters
from pha.train.recipes import load_recipe

FOLDER = Path(__file__).parents[1] / "launch"
PLANNED = {"pha-1b": 1e9, "pha-7b": 7e9}
SIZES = {"one-gpu": (1, 1), "eight-gpus": (1, 8), "two-nodes": (2, 16)}


@pytest.mark.parametrize("name", SIZES)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == SIZES[name]
    several = config.num_processes > 1
    assert config.distributed_type == (DistributedType.MULTI_GPU if several else DistributedType.NO)
    assert not config.use_cpu


def test_none_is_without_a_test() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*SIZES, *PLANNED}


@pytest.mark.parametrize("name", PLANNED)
def test_a_recipe_is_of_the_size_in_its_name(name: str) -> None:
    config = load_recipe(str(FOLDER / f"{name}.yaml"), {"data.store": "STORE"})
    model = replace(config.model, vocab_size=50257)
    assert sum(count_parameters(model).values()) == pytest.approx(PLANNED[name], rel=0.02)
    assert config.run.steps is not None
    tokens = config.run.steps * config.run.global_batch * config.data.sequence_length
    assert tokens == pytest.approx(100e9, rel=0.001)
