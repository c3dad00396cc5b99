"""Which kernels of a GPU one training step, prompt or token takes, by device time.

    python -m scripts.kernel_times OUT.json train:pha-125m:32x1024:compiled prefill:pha-180m:1x2048

Each piece of work is one of `pha bench`, in bf16. It is done three times to warm up, five times by
the clock (the least counts), and once under torch.profiler.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pha.bench.work import MODEL_MODES, Job
from pha.utils.files import write_json
from pha.utils.hardware import default_device, provenance, seconds_of

LEAST = 20.0  # microseconds of a kernel that is worth a line


def read_job(text: str) -> Job:
    """A job from `MODE:MODEL:BATCHxLENGTH[:compiled]`, where MODEL may have a colon."""
    mode, _, rest = text.partition(":")
    model, _, size = rest.removesuffix(":compiled").rpartition(":")
    batch, length = map(int, size.split("x"))
    return Job(mode, model, "bf16", batch, length, compiled=text.endswith(":compiled"))


def measure(job: Job, device: torch.device) -> dict[str, Any]:
    """Seconds of one unit of the work, and its kernels, the longest first."""
    work = MODEL_MODES[job.mode](job, device)
    for _ in range(3):
        work.unit()
    wall = min(seconds_of(work.unit, device) for _ in range(5))
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work.unit()
        torch.accelerator.synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA
    events = [x for x in seen.key_averages() if x.device_type == on_device]
    rows = [
        {"name": x.key[:120], "microseconds": x.self_device_time_total, "launches": x.count}
        for x in sorted(events, key=lambda x: -x.self_device_time_total)
    ]
    return {
        "setting": work.setting,
        "wall_seconds": wall,
        "tokens_per_second": work.tokens / wall,
        "kernel_seconds": sum(row["microseconds"] for row in rows) / 1e6,
        "launches": sum(row["launches"] for row in rows),
        "kernels": [row for row in rows if row["microseconds"] >= LEAST],
    }


def main(out: Path, *jobs: str) -> None:
    """Measure each of `MODE:MODEL:BATCHxLENGTH[:compiled]`, and write and print what was found."""
    device, found = default_device(), []
    if device.type != "cuda":
        sys.exit("kernel_times: there is no CUDA device here")
    for text in jobs:
        job = read_job(text)
        found.append({"job": text} | measure(job, device))
        print(f"{text}: {found[-1]['wall_seconds'] * 1e3:.2f} ms, {found[-1]['setting']}")
        for row in found[-1]["kernels"][:20]:
            print(f"{row['microseconds'] / 1e3:9.3f} ms  {row['launches']:5d}  {row['name']}")
        write_json(
            out, {"kind": "kernels", "work": found, "provenance": provenance(device, "bf16")}
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
