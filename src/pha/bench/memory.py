"""Peak memory of one stretch of work: of the allocator on a GPU, resident on a CPU."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from pha.utils import hardware
from pha.utils.errors import PHAError

_STATUS = Path("/proc/self/status")


def reset_peak(device: torch.device) -> bool:
    """Forget the peak so far, if that is possible.

    Of resident memory only Linux can; elsewhere the peak is that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak(device: torch.device) -> int:
    """Most bytes held since `reset_peak`."""
    if device.type != "cuda":
        with suppress(OSError):
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    return hardware.peak_memory(device)


def release(device: torch.device) -> None:
    """Leave nothing of the work so far to what this process measures next.

    Compiled graphs are among it: the code of all models is the same, and so is the limit of graphs
    for a piece of code.

    Raises:
        PHAError: a kernel has broken the GPU's context, and nothing more can run in this process.
    """
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise PHAError(
                f"the GPU no longer answers ({' '.join(str(error).split())[:100]}); run the same "
                "command again, which goes on with what is missing"
            ) from error
        torch.cuda.empty_cache()


def held(device: torch.device) -> int:
    """Bytes held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident: int = psutil.Process().memory_info().rss
    return resident
