"""What is asked of the allocator: flat memory, or freed memory at hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
