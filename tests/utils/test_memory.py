"""What is asked of allocators: flat memory, freed memory at hand, how much there is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pha.utils.hardware import free_memory

PROGRAM = """
import psutil, torch
from pha.utils.hardware import {function}
{function}()
def resident():
    return psutil.Process().memory_info().rss / 1e6
block = torch.ones(25_000_000)
held = resident()
del block
print(held - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize("function", ["return_freed_memory", "keep_freed_memory"])
def test_freed_memory_is_returned_or_kept(function: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(function=function)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    returned = float(done.stdout)
    assert returned > 90 if function == "return_freed_memory" else returned < 10


def test_what_the_allocator_of_a_gpu_holds_for_later_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("memory_reserved", 50), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 80))
    assert free_memory(torch.device("cuda")) == 40
