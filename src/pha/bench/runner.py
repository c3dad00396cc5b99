"""A benchmark: every case in processes of its own, taking turns, gathered into rows."""

from __future__ import annotations

import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pha.bench import memory, worker
from pha.bench.op_work import OP_MODES, PASSES, op_backends
from pha.bench.peers import CHECKPOINTING, CHUNKED, model_config
from pha.bench.work import MODEL_MODES, Job
from pha.modeling import PHAConfig
from pha.ops import OPS
from pha.utils.errors import PHAError
from pha.utils.formats import read_json
from pha.utils.hardware import PRECISIONS, default_device
from pha.utils.modules import ASKED
from pha.utils.processes import Command, run_processes

KERNELS = "kernels"
OUT_OF_TIME = {"error": "not run: the time limit was reached", "out_of_time": True}
MODES = (*MODEL_MODES, *OP_MODES, KERNELS)
MEDIANS = (
    *("unit_seconds", "peak_memory", "work_memory"),
    *("floor_seconds", "of_floor", "utilisation", "weight_bandwidth"),
)
SIZES = ("parameters", "weight_bytes", "setting", "ops", "device", "threads", "seconds_in_all")
CASE = ("mode", "model", "backend", "compiled", "precision", "batch", "length", "chunk", "compiler")
"""What makes two rows the same measurement."""


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        mode: one of `MODES`.
        models: presets, or `hf:` and a peer; for an op, presets whose shapes it takes. The first
            is what the others are compared with.
        lengths: T; for decode, of the prompt.
        batch: B; decode runs at 1 as well.
        precisions: fp32, bf16.
        runs: processes for each case.
        seconds: how long each goes on measuring.
        seconds_limit: for the whole benchmark; None for no limit.
        compiled: also measure every model under torch.compile.
        chunk: tokens of a prompt read at a time; 0 reads it whole.
        backends: of an op; None for all but the oracle.
        in_process: measure here, not in processes of their own: no start for each row, and memory
            that one row leaves behind is there for the next.

    Raises:
        PHAError: a value out of range, or a name that there is not.
    """

    mode: str
    models: tuple[str, ...]
    lengths: tuple[int, ...]
    batch: int = 2
    precisions: tuple[str, ...] = ("fp32",)
    runs: int = 3
    seconds: float = 2.0
    seconds_limit: float | None = None
    compiled: bool = False
    chunk: int = 0
    backends: tuple[str, ...] | None = None
    in_process: bool = False

    def __post_init__(self) -> None:
        _require(self.mode in MODES, f"there is no mode {self.mode!r}; choose {', '.join(MODES)}")
        for name in ("models", "lengths", "precisions"):
            values = getattr(self, name)
            _require(bool(values), f"{name} is empty; give at least one")
            _require(len(set(values)) == len(values), f"{name} names one twice")
        for name, value in (("batch", self.batch), ("runs", self.runs)):
            _require(value >= 1, f"{name} is {value}; at least 1")
        shortest = min(self.lengths)
        _require(shortest >= 2, f"a length is {shortest}; at least 2 tokens")
        for precision in self.precisions:
            _require(
                precision in PRECISIONS, f"there is no precision {precision!r}; choose fp32 or bf16"
            )
        _require(0 < self.seconds < float("inf"), f"seconds is {self.seconds}; above 0 is needed")
        limit = self.seconds_limit
        _require(limit is None or limit > 0, f"the limit is {limit} seconds; above 0 is needed")
        is_op = self.mode in OP_MODES
        for model in self.models:
            config = model_config(model, max(self.lengths))
            _require(
                isinstance(config, PHAConfig) or not (is_op or self.mode == KERNELS),
                f"{self.mode} is timed at the shapes of our presets; {model} is not one",
            )
        trained = next((m for m in self.models if m.endswith((CHECKPOINTING, CHUNKED))), None)
        _require(
            trained is None or self.mode == "train",
            f"{trained} is a way to train; {self.mode} takes the name without what ends it",
        )
        _require(self.chunk >= 0, f"chunk is {self.chunk}; at least 1 token")
        _require(
            not self.chunk or self.mode in ("prefill", "decode"),
            f"{self.mode} reads no prompt; leave chunk out",
        )
        _require(
            not self.compiled or not (is_op or self.mode == KERNELS),
            f"{self.mode} has no compiled form; leave it out",
        )
        _require(is_op or self.backends is None, f"{self.mode} has no backends; leave them out")
        for backend in self.backends or ():
            known = OPS[OP_MODES[self.mode]].backends
            _require(
                backend in known,
                f"{self.mode} has no backend {backend!r}; it has {', '.join(known)}",
            )

    def groups(self) -> list[list[Job]]:
        """Jobs that are compared with each other, one list for every setting."""
        cases = [(self.mode, self.models)]
        if self.mode == KERNELS:
            cases = [(mode, (model,)) for model in self.models for mode in MODEL_MODES]
        return [
            self._group(mode, models, precision, batch, length)
            for mode, models in cases
            for precision in self.precisions
            for batch in self._batches(mode)
            for length in self.lengths
        ]

    def _batches(self, mode: str) -> list[int]:
        if self.mode == KERNELS:
            return [self.batch if mode == "train" else 1]
        return [1, self.batch] if mode == "decode" and self.batch > 1 else [self.batch]

    def _group(
        self, mode: str, models: tuple[str, ...], precision: str, batch: int, length: int
    ) -> list[Job]:
        def job(model: str, **rest: Any) -> Job:
            return Job(
                mode, model, precision, batch, length, self.seconds, chunk=self.chunk, **rest
            )

        device_type = default_device().type
        if self.mode == KERNELS:
            names = worker.kernels(device_type, mode)
            cases = {"all kernels": (), **{f"no {name}": (name,) for name in names}}
            if len(names) > 1:
                cases["plain torch"] = tuple(names)
            return [job(models[0], backend=label, without=off) for label, off in cases.items()]
        if mode in OP_MODES:
            return [
                job(model, backend=f"{name}, {passes}")
                for model in models
                for passes in PASSES
                for name in self.backends or op_backends(mode, device_type)
            ]
        kinds = (False, True) if self.compiled else (False,)
        return [job(model, compiled=compiled) for compiled in kinds for model in models]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PHAError(message)


def run_benchmark(
    request: Request,
    progress: Callable[[str], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure all that is asked for, as `run_groups` does."""
    limit = request.seconds_limit
    return run_groups(request.groups(), request.runs, limit, request.in_process, progress)


def run_groups(
    groups: Sequence[Sequence[Job]],
    runs: int,
    seconds_limit: float | None,
    in_process: bool,
    progress: Callable[[str], object],
    keep: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
    known: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Measure jobs, a group for each setting.

    Within a setting the cases take turns (A B A B), so that a machine that slows down slows all of
    them. A case that fails is not tried again; the others go on.

    Args:
        groups: of jobs that are compared with each other.
        runs: of each job.
        seconds_limit: for all of them.
        in_process: see `Request`.
        progress: called with a line before each run.
        keep: called with all rows so far, in order, after each run.
        known: rows of an earlier call, failed ones too, which would fail again.

    Returns:
        A row for each case, in order; see `make_row`.
    """
    end = None if seconds_limit is None else time.monotonic() + seconds_limit
    found = {_case(row): row for row in known if "time limit" not in (row["error"] or "")}

    def rows() -> list[dict[str, Any]]:
        cases = [[_case(vars(job)) for job in group] for group in groups]
        done = [[found[case] for case in group if case in found] for group in cases]
        for each in done:
            add_ratios(each)
        return list(chain.from_iterable(done))

    for group in groups:
        missing = [job for job in group if _case(vars(job)) not in found]
        results: list[list[dict[str, Any]]] = [[] for _ in missing]
        for turn in range(runs):
            for job, so_far in zip(missing, results, strict=True):
                if so_far and "error" in so_far[-1]:
                    continue
                progress(f"{describe(job)}, run {turn + 1} of {runs}")
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    result = OUT_OF_TIME
                elif in_process:  # where a limit is only heeded between jobs
                    result = worker.attempt(job)
                else:
                    result = run_worker(job, left)
                if not (so_far and result.get("out_of_time")):  # the runs so far count
                    so_far.append(result)
                found[_case(vars(job))] = make_row(job, so_far)
                keep(rows())
                if in_process:
                    memory.release(default_device())
    return rows()


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in CASE)


def describe(job: Job) -> str:
    """A job in a line."""
    name = f"{job.model} {job.backend}".strip() + (" compiled" if job.compiled else "")
    return f"{job.mode} of {name}, {job.precision}, {job.batch} x {job.length}"


def run_worker(job: Job, seconds: float | None = None) -> dict[str, Any]:
    """Measure a job in a process of its own, which never outlives this call nor `seconds`.

    Returns:
        What `pha.bench.worker.measure` returns, or `{"error": why}`, with `out_of_time` where the
        limit is why.
    """
    codes: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        words = [sys.executable, "-m", "pha.bench.worker", json.dumps(asdict(job)), str(answer)]
        words += ASKED
        try:
            run_processes(
                [Command(words, log)],
                seconds=seconds,
                kill=True,
                ended=lambda _, code: codes.append(code),
            )
        except TimeoutError:
            return {"error": "stopped: the time limit was reached", "out_of_time": True}
        if answer.is_file():
            result: dict[str, Any] = read_json(answer)
            return result
        return {"error": _failure(codes[0], log.read_text(encoding="utf-8", errors="replace"))}


def _failure(code: int, said: str) -> str:
    if code == -9:  # SIGKILL, which Windows does not name
        return "killed, most likely out of memory"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    last = ([line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"])[-1]
    return f"ended with exit code {code}: {last[:200]}"


def make_row(job: Job, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the benchmark.

    Returns:
        What the case is (`CASE`) and either `error`, or medians over runs: `tokens_per_second`
        (with `low`, `high` and `values`), `runs`, `MEDIANS` as `pha.bench.worker.measure` has them,
        `floors`; and the `SIZES` of the first run.
    """
    row = {name: value for name, value in asdict(job).items() if name != "seconds"}
    row["error"] = next((run["error"] for run in runs if "error" in run), None)
    if row["error"] is not None:
        return row
    speeds = [run["tokens_per_second"] for run in runs]
    row["tokens_per_second"] = {
        "median": statistics.median(speeds),
        "low": min(speeds),
        "high": max(speeds),
        "values": speeds,
    }
    row["runs"] = len(runs)
    for name in MEDIANS:
        row[name] = statistics.median(run[name] for run in runs)
    first = runs[0]
    row["floors"] = {
        name: statistics.median(run["floors"][name] for run in runs) for name in first["floors"]
    }
    row |= {name: first[name] for name in ("units", *SIZES)}
    return row


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add `speed_ratio` and `memory_ratio` to rows of one setting: against the first of a kind.

    Compiled rows are compared among themselves, and so are forward and forward+backward. Where
    that first one failed there are no ratios.
    """
    first: dict[Any, dict[str, Any]] = {}
    for row in rows:
        kind = (row["compiled"], row["backend"].partition(", ")[2])
        reference = first.setdefault(kind, row)
        measured = row["error"] is None and reference["error"] is None
        row["speed_ratio"] = row["memory_ratio"] = None
        if measured:
            speeds = [each["tokens_per_second"]["median"] for each in (row, reference)]
            row["speed_ratio"] = speeds[0] / speeds[1]
            row["memory_ratio"] = row["peak_memory"] / reference["peak_memory"]
