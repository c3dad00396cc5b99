"""What is installed, what the machine offers, and whether every backend agrees with its oracle."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from pha.ops import OPS
from pha.utils.hardware import (
    choose_precision,
    cpu_name,
    default_device,
    device_name,
    free_memory,
    git_state,
    matmul_rate,
)
from pha.utils.versions import own_version, version_of

# Relative to the oracle in float64, a float32 backend is right to a few units in the last place
# of sums over tens of terms.
TOLERANCE = 1e-5


def examine() -> dict[str, Any]:
    """Look at everything.

    Returns:
        `environment`: facts by name; `backends`: one record per op, backend and device with its
        largest relative error and whether it is the one in use; `healthy`: all of them are right.
    """
    device = default_device()
    commit, dirty = git_state()
    environment: dict[str, Any] = {"pha": own_version()} | {
        name: version_of(name)
        for name in ("torch", "transformers", "accelerate", "tokenizers", "triton", "numba")
    }
    environment |= {
        "python": platform.python_version(),
        "commit": None if commit is None else commit[:12] + (" with changes" if dirty else ""),
        "cpu": cpu_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "device": device_name(device),
        "free memory": f"{free_memory(device) / 1e9:.1f} GB",
    }
    for precision in ("fp32", "bf16"):
        rate = matmul_rate(device, precision)
        environment[f"matmul {precision}"] = f"{rate / 1e9:,.0f} GFLOP/s measured"
    environment["precision auto"] = choose_precision("auto", device)
    devices = ["cpu"] if device.type == "cpu" else ["cpu", device.type]
    backends = []
    for op in OPS.values():
        for where in devices:
            for name in (name for name in op.backends if op.runs_on(name, where)):
                error = op.self_check(name, where)
                backends.append(
                    {
                        "op": op.name,
                        "device": where,
                        "backend": name,
                        "used": op.choice(where) == name,
                        "error": error,
                        "ok": error < TOLERANCE,
                    }
                )
    healthy = all(check["ok"] for check in backends)
    return {"environment": environment, "backends": backends, "healthy": healthy}
