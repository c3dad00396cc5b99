"""What is installed, what the machine offers, and whether every backend agrees with its oracle."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from rich.console import Console

from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops import OPS, Op
from pha.utils.errors import PHAError
from pha.utils.hardware import (
    choose_precision,
    cpu_name,
    default_device,
    device_name,
    free_memory,
    git_state,
    instruction_set,
    matmul_rate,
)
from pha.utils.progress import ProgressLine
from pha.utils.versions import __version__, version_of

# Relative to the oracle in float64, a float32 backend is right to a few units in the last place
# of sums over tens of terms.
TOLERANCE = 1e-5


def examine(device_type: str | None = None, console: Console | None = None) -> dict[str, Any]:
    """Look at everything, or only at the backends of one type of device.

    On a GPU kernels are compiled, for a minute or two: what is being checked goes to `console`.

    Returns:
        `environment`: facts by name; `backends`: one record per op, backend and device with its
        largest relative error, whether it is the one in use, and the reason where it cannot run
        and is not checked; `healthy`: all that are meant for a device here run and are right.

    Raises:
        PHAError: there is no such device here.
    """
    device = default_device()
    devices = list(dict.fromkeys(["cpu", device.type]))
    if device_type is not None:
        if device_type not in devices:
            raise PHAError(f"there is no {device_type} here; choose {' or '.join(devices)}")
        devices = [device_type]
    commit, dirty = git_state()
    environment: dict[str, Any] = {"pha": __version__} | {
        name: version_of(name)
        for name in ("torch", "transformers", "accelerate", "tokenizers", "triton", "numba")
    }
    environment |= {
        "python": platform.python_version(),
        "commit": None if commit is None else commit[:12] + (" with changes" if dirty else ""),
        "cpu": f"{cpu_name()}, {instruction_set()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "device": device_name(device),
        "free memory": f"{free_memory(device) / 1e9:.1f} GB",
    }
    for precision in ("fp32", "bf16"):
        rate = matmul_rate(device, precision)
        environment[f"matmul {precision}"] = f"{rate / 1e9:,.0f} GFLOP/s measured"
    environment["precision auto"] = choose_precision("auto", device)
    checks = [
        (op, name, where)
        for op in OPS.values()
        for where in devices
        for name in op.backends
        if op.runs_on(name, where) or op.only_on[name] not in devices
    ]
    backends = []
    with ProgressLine(console or Console(quiet=True)) as line:
        for number, (op, name, where) in enumerate(checks):
            what = f"{op.name}, {name} on {where}"
            line.show("checking", what, number / len(checks), is_last=where != "cpu")
            backends.append(_check(op, name, where))
    if "cpu" in devices:  # the one device that it is for
        backends.append(_decoder())
    healthy = all(check["ok"] is not False for check in backends)
    return {"environment": environment, "backends": backends, "healthy": healthy}


def _check(op: Op, name: str, where: str) -> dict[str, Any]:
    """The record of a backend on a type of device; `ok` is None for one of another type."""
    record = {
        "op": op.name,
        "device": where,
        "backend": name,
        "used": op.choice(where) == name,
        "error": None,
        "ok": None,
        "reason": None,
        "limits": op.limits.get(name),
    }
    if not op.runs_on(name, where):
        return record | {"reason": f"not usable here: runs on {op.only_on[name]}"}
    if not op.is_at_hand(name, where):
        return record | {"reason": f"not asked for: PHA_BACKENDS={op.name}={name}"}
    if (reason := op.fault(name, where)) is not None:
        return record | {"ok": False, "reason": f"cannot run: {reason}"}
    error = op.self_check(name, where)
    return record | {"error": error, "ok": error < TOLERANCE}


def _decoder() -> dict[str, Any]:
    """The record of the compiled decoder: its logits beside those of the layers."""
    record = {"op": "decoder", "device": "cpu", "backend": "numba", "used": False, "error": None}
    try:
        from pha import decoder
        from pha.decoder import runtime
    except ImportError as missing:
        return record | {"ok": None, "reason": f"not usable here: {missing}"}
    torch.manual_seed(0)
    model = PHAForCausalLM(PHAConfig.from_preset("pha-tiny", vocab_size=257)).eval()
    ids = torch.arange(12).view(1, -1)
    logits = []
    with torch.no_grad():
        for enabled in (True, False):
            decoder.enabled = enabled
            try:
                cache = model(ids[:, :-1]).past_key_values
                logits.append(model(ids[:, -1:], past_key_values=cache).logits)
            finally:
                decoder.enabled = True
    if reason := runtime.fault():
        return record | {"ok": False, "reason": f"cannot run: {reason}"}
    error = float((logits[0] - logits[1]).abs().max() / logits[1].abs().max())
    return record | {"used": True, "error": error, "ok": error < TOLERANCE, "reason": None}
