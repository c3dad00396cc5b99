"""What the machine is and how fast: facts that a run records and plans with."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from pha.utils.errors import PHAError
from pha.utils.versions import __version__, version_of

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLOW = 5e9  # FLOP/s of products, at which one of size 1,024 takes half a second


def autocast(device_type: str, precision: str) -> torch.autocast:
    """The context of matrix products in a precision; what is multiplied keeps its own type."""
    return torch.autocast(device_type, PRECISIONS[precision], enabled=precision != "fp32")


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def synchronise(device: torch.device) -> None:
    """Wait until everything queued on `device` is done (nothing to do on a CPU)."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, from an idle device to an idle device."""
    synchronise(device)
    begin = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begin


@functools.cache
def matmul_rate(device: torch.device, precision: str) -> float:
    """Measured rate of a square matrix product, in FLOP/s, the best of a few short runs."""
    if device.type != "cpu":
        return _rate_of(8192, device, precision)
    # Without instructions for it, bfloat16 is a hundred times slower: a small product tells.
    small = _rate_of(256, device, precision)
    return _rate_of(1024, device, precision) if small > SLOW else small


def _rate_of(size: int, device: torch.device, precision: str) -> float:
    # Not constant: a GPU multiplies zeros and ones faster than it ever will real weights.
    a = torch.arange(size * size, device=device).sin().view(size, size).to(PRECISIONS[precision])
    b = a.flip(0)
    return 2 * size**3 / min(seconds_of(lambda: a @ b, device) for _ in range(8))


def choose_precision(requested: str, device: torch.device) -> str:
    """`fp32` or `bf16`; `auto` takes bf16 where its matrix products are measured clearly faster.

    Raises:
        PHAError: an unknown precision.
    """
    if requested in PRECISIONS:
        return requested
    if requested != "auto":
        raise PHAError(f"precision is {requested!r}; choose auto, fp32 or bf16")
    if device.type == "mps":
        return "fp32"
    faster = matmul_rate(device, "bf16") > 1.5 * matmul_rate(device, "fp32")
    return "bf16" if faster else "fp32"


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by the allocator on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Ask glibc to give large freed blocks back at once, for memory that stays flat for hours.

    By default it keeps what is freed and raises its thresholds with use, so that a loop over
    blocks of changing size grows by fragmentation. Does nothing with other C libraries.
    """
    _mallopt(_TRIM_THRESHOLD, 128 * 1024)
    _mallopt(_MMAP_THRESHOLD, 128 * 1024)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks for the next ones, for a loop that allocates the same again.

    By default every block above 32 MB comes fresh from the system and is touched for the first
    time, page by page, which can take longer than what is computed in it. Does nothing with other
    C libraries.
    """
    _mallopt(_MMAP_MAX, 0)
    _mallopt(_TRIM_THRESHOLD, 2**31 - 1)


# Parameters of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


def _mallopt(parameter: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # in turn: none, macOS, Windows
        ctypes.CDLL(None).mallopt(parameter, value)


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        # What earlier work of this process has freed stays with its allocator, for later work.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


def device_name(device: torch.device) -> str:
    """A name that people know the device by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return cpu_name()
    return device.type


@functools.cache
def cpu_name() -> str:
    """Model of the processor with its number of usable cores."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name.*?: *(.*)$", Path("/proc/cpuinfo").read_text(), re.M):
            return f"{found[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def instruction_set() -> str:
    """Which kind of processor this is, as matrix products see it: `AMX`, `AVX-512`, `AVX2`, ..."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return {"AVX512": "AVX-512"}.get(name := torch.backends.cpu.get_cpu_capability(), name)


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether it has changes.

    Outside a checkout the commit is `$PHA_COMMIT`, for a tree that travelled without its history,
    or None.
    """
    # A package inside site-packages may sit below somebody else's repository.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return os.environ.get("PHA_COMMIT"), None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "HEAD"), None if status is None else bool(status)


def provenance(device: torch.device, precision: str) -> dict[str, Any]:
    """Everything one needs to know to repeat a measurement: versions, hardware, commit, command."""
    commit, dirty = git_state()
    program = Path(sys.argv[0]).name
    return {
        "pha": __version__,
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "python": platform.python_version(),
        "git_commit": commit,
        "git_dirty": dirty,
        "device": device_name(device),
        "cpu": cpu_name(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "precision": precision,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["pha" if program == "__main__.py" else program, *sys.argv[1:]]),
    }
