"""How Triton's scan is cut into programs: the same for all devices, or what a sweep found best."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import torch

from pha.utils.errors import PHAError
from pha.utils.files import cache_folder, write_json
from pha.utils.records import record_from


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the kernels' work.

    The defaults are worked out. About 29 kB in flight on each SM of an H200 (4.8 TB/s for some
    800 ns) keep its memory busy. A program in bf16 has 4 kB, so 8 programs are wanted.
    With fewer the time of the sequential form grows in proportion; the chunked one moves 5/3 of the
    bytes.

    Attributes:
        block: states of a program, by one warp: two neighbours a thread, a transaction of bf16.
        unroll: steps whose loads are issued together.
        stages: of the pipeline of loads: those of `stages` - 1 more groups of steps are under way.
        wanted: programs per SM that the chunked form aims at.
        enough: programs per SM from which on the sequential form is taken.
        shortest: steps of a chunk, at least.
    """

    block: int = 64
    unroll: int = 8
    stages: int = 3
    wanted: int = 8
    enough: int = 5
    shortest: int = 64


# By CUDA's name of the device: what `pha bench sweep` found, 4% faster than the default there
# (results/gpu/sweep.json).
TUNED = {"NVIDIA H200": Sizes(unroll=16, stages=2, wanted=16)}


@functools.cache
def sizes_of(device: torch.device) -> Sizes:
    """What is best on a device: a user's own finding, else ours, else the default."""
    if device.type != "cuda":
        return Sizes()
    return (TUNED | read_tuned()).get(torch.cuda.get_device_name(device), Sizes())


def tuned_file() -> Path:
    """Where a user's findings are kept: `$PHA_TUNED`, else a file in our cache folder."""
    return Path(os.environ.get("PHA_TUNED") or cache_folder() / "gated-scan.json")


def read_tuned() -> dict[str, Sizes]:
    """The user's findings, by CUDA's name of a device; nothing where there is no such file.

    Raises:
        PHAError: the file does not hold sizes.
    """
    try:
        path = tuned_file()
        text = path.read_text(encoding="utf-8")
    except (OSError, PHAError):  # the latter: no home folder
        return {}
    try:
        found = json.loads(text).items()
    except (ValueError, AttributeError) as error:
        raise PHAError(f"{path} holds no sizes of the scan; remove it, or sweep again") from error
    return {name: record_from(Sizes, value, f"{path}: {name}") for name, value in found}


def write_tuned(device: torch.device, sizes: Sizes) -> Path:
    """Keep what a sweep found best on `device`, beside what is known of others."""
    found = read_tuned() | {torch.cuda.get_device_name(device): sizes}
    path = tuned_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {name: dataclasses.asdict(each) for name, each in found.items()})
    sizes_of.cache_clear()
    return path
