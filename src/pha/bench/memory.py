"""Peak memory of one stretch of work: of the allocator on a GPU, resident on a CPU."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil
import torch

from pha.utils import hardware

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


def held(device: torch.device) -> int:
    """Bytes held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    resident: int = psutil.Process().memory_info().rss
    return resident
