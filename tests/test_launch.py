"""The files of launch/ are what Accelerate reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[1] / "launch"
SIZES = {"one-gpu": (1, 1), "eight-gpus": (1, 8), "two-nodes": (2, 16)}


@pytest.mark.parametrize("name", SIZES)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == SIZES[name]
    several = config.num_processes > 1
    assert config.distributed_type == (DistributedType.MULTI_GPU if several else DistributedType.NO)
    assert not config.use_cpu


def test_none_is_without_a_test() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SIZES)
