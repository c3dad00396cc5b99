"""One measurement in a process of its own: `python -m pha.bench.worker JOB ANSWER [MODULE ...]`.

JOB is JSON, ANSWER the file for the result or `{"error": ...}`. None outlives its parent.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pha.bench import memory
from pha.bench.floors import measure_floors
from pha.bench.op_work import OpWork
from pha.bench.work import MODEL_MODES, Job, Work
from pha.ops import OPS, in_use
from pha.utils.errors import PHAError, is_out_of_memory
from pha.utils.files import write_json
from pha.utils.hardware import default_device, device_name, keep_freed_memory, seconds_of
from pha.utils.modules import import_modules
from pha.utils.processes import leave_with_parent

DECODER = "decoder"


def measure(job: Job) -> dict[str, Any]:
    """Do the work of a job and describe it.

    Returns:
        `unit_seconds` (the median of `units`), `tokens_per_second`; `peak_memory`, `work_memory`
        (above what was held before); `floors`, `floor_seconds`, `of_floor` (the time they allow
        over the time taken), `utilisation` (FLOPs of products with weights per second, over the
        matmul rate), `weight_bandwidth` (bytes/s, decode only); sizes, `setting`, `device`;
        `seconds_in_all`, with building and compiling.

    Raises:
        PHAError: the model cannot do this.
        RuntimeWarning: something slower would have computed in place of a kernel.
        RuntimeError: it would have computed eagerly what is to be compiled.
    """
    begin = time.perf_counter()
    device = default_device()
    if device.type == "cpu":
        keep_freed_memory()  # as training does; for every model alike
    with _strict(compiling=job.compiled or device.type == "cuda"), without(job.without):
        make = MODEL_MODES.get(job.mode, OpWork)
        work: Work = make(job, device)
        held = memory.held(device)
        memory.reset_peak(device)
        times = time_units(work, device, job.seconds)
        peak = memory.peak(device)
    seconds = statistics.median(times)
    floors = measure_floors(device, job.precision, job.length)
    floor = floors.seconds(work.need)
    return {
        "unit_seconds": seconds,
        "units": len(times),
        "tokens_per_second": work.tokens / seconds,
        "peak_memory": peak,
        "work_memory": max(0, peak - held),
        "parameters": work.parameters,
        "weight_bytes": work.weight_bytes,
        "floors": vars(floors),
        "floor_seconds": floor,
        "of_floor": floor / seconds,
        "utilisation": work.need.matmul_flops / seconds / floors.matmul,
        "weight_bandwidth": work.weight_reads * work.weight_bytes / seconds,
        "setting": work.setting,
        "ops": in_use(device.type),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "seconds_in_all": time.perf_counter() - begin,
    }


def kernels(device_type: str, mode: str) -> list[str]:
    """The kernels that take part in a mode of `MODEL_MODES` on a device.

    They are the ops whose chosen backend is not the one in plain torch, and the compiled decoder.
    """
    if mode == "decode":
        return [DECODER] if device_type == "cpu" and find_spec("numba") else []
    return [
        op.name
        for op in OPS.values()
        if op.choice(device_type) != op.plain
        and (op.name != "linear_cross_entropy" or mode == "train")
    ]


@contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """Compute in plain torch inside the block what these kernels would."""
    with ExitStack() as stack:
        for name in names:
            if name == DECODER:
                from pha import decoder

                decoder.enabled = False
                stack.callback(setattr, decoder, "enabled", True)
            else:
                stack.enter_context(OPS[name].force(OPS[name].plain))
        yield


@contextmanager
def _strict(compiling: bool) -> Iterator[None]:
    """Whatever would quietly be slower is an error: PyTorch only logs that it compiles no more."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        if not compiling:
            yield
            return
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield


def time_units(work: Work, device: torch.device, seconds: float) -> list[float]:
    """Seconds of every unit: at least one, for as long as `seconds`; a quarter more to warm up."""
    for limit in (seconds / 4, seconds):
        times: list[float] = []
        while not times or (sum(times) < limit and len(times) < work.most_units):
            times.append(seconds_of(work.unit, device))
    return times


def attempt(job: Job) -> dict[str, Any]:
    """What `measure` returns, or `{"error": ...}` in one line, whatever a model does."""
    try:
        return measure(job)
    except Exception as error:
        return {"error": _one_line(error)}


def main() -> None:
    """Measure the job of the first argument into the file of the second; then come modules."""
    job, answer, *modules = sys.argv[1:]
    with suppress(OSError):  # where memory runs out, this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("1000")
    leave_with_parent()
    import_modules(modules)
    write_json(Path(answer), attempt(Job(**json.loads(job))))


def _one_line(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    text = " ".join(str(error).split())
    name = "" if isinstance(error, PHAError) else f"{type(error).__name__}: "
    return f"{name}{text}"[:200]


if __name__ == "__main__":
    main()
