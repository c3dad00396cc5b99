"""The verb that measures speed and memory beside peers: bench."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from rich.table import Table
from rich.text import Text

from pha.commands.common import DryRun, Folder, Json, answer, figures_table, progress_console
from pha.utils.errors import PHAError
from pha.utils.outputs import require_outputs, writing

if TYPE_CHECKING:
    from pha.bench.work import Job

ModelMode = Literal["train", "prefill", "decode"]
OpMode = Literal[
    "gated-scan",
    "loss",
    "attention",
    "documents",
    "short-convolution",
    "long-convolution",
    "linear-scan",
    "selective-scan",
    "linear-attention",
    "delta-rule",
]
Mode = Annotated[
    Literal["all", ModelMode, OpMode, "kernels", "sweep"],
    "MODE",
    "all; train, prefill or decode of models; kernels; an op; or sweep",
]
# Mode -> options that it does not take; any other mode takes all but the scale.
NOT_TAKEN = {
    "all": (
        *("models", "lengths", "batch", "precision", "runs"),
        *("seconds", "chunk", "backends", "compile"),
    ),
    "sweep": (
        *("runs", "seconds_limit", "chunk", "backends", "compile"),
        *("in_process", "scale", "dry_run"),
    ),
}
SAME = ("device", "torch", "transformers", "git_commit")
"""Provenance that two calls must share for their rows to stand in one file."""

LEGEND = """\
±  half the range of the runs      ratio  against the first row      GB  peak memory
work  what of it came on top of the weights
floor  the time that the measured rates allow, over the time taken"""
# The last column of a table by mode, and what it means.
MATMUL = ("matmul", "FLOPs of products with weights, over the matmul rate")
LAST_COLUMN = {
    "train": MATMUL,
    "prefill": MATMUL,
    "decode": ("weights", "bytes of weights read, over the read bandwidth"),
}


def bench(
    mode: Mode,
    *,
    models: tuple[str, ...] = ("pha-125m",),
    lengths: tuple[int, ...] = (1024,),
    batch: int = 2,
    precision: tuple[str, ...] = ("fp32",),
    runs: int = 3,
    seconds: float = 2.0,
    seconds_limit: float | None = None,
    chunk: int = 0,
    backends: tuple[str, ...] | None = None,
    compile: bool = False,
    in_process: bool | None = None,
    scale: Literal["paper", "tiny"] = "paper",
    dry_run: DryRun = False,
    json: Json = False,
    out: Folder | None = None,
) -> None:
    """Speed and memory beside peers of the same size.

    all is the standard set: Table 8, training at growing batches, decoding and ops, compiled, in
    under ten minutes on an H100. The same call with the same --out goes on where it was stopped.

    On a CPU each model runs in a process of its own, and they take turns; on a GPU all are
    measured in this process, which starts and compiles once. Peers are models of
    transformers with random weights, so nothing is downloaded: hf:gpt2, hf:llama,
    hf:falcon-h1, hf:mamba2, hf:recurrent-gemma. What the machine can do is measured in the
    same processes, and every row says how much of it was reached. sweep finds the block sizes of
    the scan's kernel for this GPU, at the shapes of presets, and keeps them. gated-scan, loss,
    attention, documents (attention within them), short-convolution, long-convolution,
    linear-scan, selective-scan, linear-attention and delta-rule time the backends of one op at the
    shapes of a preset. kernels times steps, prompts and tokens with each kernel and without.

    Args:
        mode: what is measured
        models: presets (PRESET+FIELD=VALUE changes one) or hf:PEER, comma-separated; ratios are
            against the first
        lengths: tokens, comma-separated
        batch: sequences; decode runs at 1 as well
        precision: fp32,bf16
        runs: processes for each row
        seconds: of measuring in each
        seconds_limit: for the whole benchmark (none)
        chunk: tokens of a prompt at a time; 0: all
        backends: of an op (all but the oracle, naive)
        compile: measure under torch.compile too
        in_process: measure everything in this process, as on a GPU; else in processes of their own
        scale: of all: paper, or tiny to try the commands out on a CPU
        out: folder for bench-MODE.json and plots
    """
    given = locals()
    # Kernels from the hub would come over the network, and no row would name them.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    from pha.bench.runner import Request, run_groups
    from pha.bench.standard import standard_set
    from pha.results import JSON_FORMAT
    from pha.utils.files import write_json
    from pha.utils.hardware import default_device, provenance

    for name in NOT_TAKEN.get(mode, ("scale",)):
        if given[name] != inspect.signature(bench).parameters[name].default:
            option = name.replace("_", "-")
            raise PHAError(f"{mode} takes no --{option}; leave it out, or choose another mode")
    if mode == "sweep":
        if len(precision) > 1:
            raise PHAError("sweep is for one --precision at a time")
        _sweep_scan(models, lengths, batch, precision[0], seconds, json, out)
        return
    device = default_device()
    here = device.type == "cuda" if in_process is None else in_process
    asked: dict[str, Any] = {"mode": mode, "scale": scale}
    request: Request | None = None
    if mode == "all":
        groups = standard_set(scale)
        precision = (groups[0][0].precision,)
    else:
        request = Request(
            mode=mode,
            models=models,
            lengths=lengths,
            batch=batch,
            precisions=precision,
            runs=runs,
            seconds=seconds,
            seconds_limit=seconds_limit,
            compiled=compile,
            chunk=chunk,
            backends=backends,
            in_process=here,
        )
        groups, asked = request.groups(), vars(request)
    if dry_run:
        _show_jobs(groups, json)
        return
    record: dict[str, Any] = {
        "kind": "bench",
        "format": JSON_FORMAT,
        "request": asked,
        "rows": [],
        "provenance": provenance(device, ",".join(precision)),
    }
    require_outputs(out, f"bench-{mode}.json")
    if out is not None and request is None:
        record["rows"] = _earlier_rows(out / "bench-all.json", record)
    console = progress_console()

    def keep(rows: list[dict[str, Any]]) -> None:
        record["rows"] = rows
        if out is not None:
            with writing(out):
                write_json(out / f"bench-{mode}.json", record)

    with console.status("") as status:
        turns = 1 if request is None else runs
        rows = run_groups(groups, turns, seconds_limit, here, status.update, keep, record["rows"])
        record["rows"] = rows
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    meaning = dict.fromkeys("  ".join(LAST_COLUMN[each]) for each in modes if each in LAST_COLUMN)
    answer(json, record, *_tables(mode, rows), *_notes(rows), LEGEND, *meaning)
    if out is not None:
        console.print(str(out / f"bench-{mode}.json"), highlight=False)
        try:
            from pha.report.charts import save_speed_plots

            plots = save_speed_plots(rows, out)
        except ImportError as error:
            console.print(f"no pictures: {error.name} is not installed", highlight=False)
            return
        for plot in plots:
            console.print(str(plot), highlight=False)


@dataclass(frozen=True)
class _Earlier:
    """What is read of the record of an earlier call."""

    format: int
    request: dict[str, Any]
    rows: list[dict[str, Any]]
    provenance: dict[str, Any]


def _earlier_rows(path: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier call of `all` has measured of the same set, on the same machine and code.

    Raises:
        PHAError: it is of another.
    """
    from pha.utils.formats import read_json
    from pha.utils.records import record_from
    from pha.utils.versions import check_format

    if not path.exists():
        return []
    found = record_from(_Earlier, read_json(path), f"{path}: bench")
    check_format(path, found.format, record["format"])
    given, now = (each["request"] | each["provenance"] for each in (vars(found), record))
    for name in ("scale", *SAME):
        if given.get(name) != now[name]:
            raise PHAError(f"{path} is of another {name} ({given.get(name)}); choose another --out")
    return found.rows


def _show_jobs(groups: Sequence[Sequence[Job]], as_json: bool) -> None:
    """What would be measured, in order, and how long it should take."""
    from pha.bench.runner import describe
    from pha.bench.standard import expected_seconds

    jobs = [(describe(job), expected_seconds(job)) for group in groups for job in group]
    total = sum(seconds for _, seconds in jobs)
    title = "one run of each job: seconds on an H100, predicted, at the sizes of the paper"
    table = figures_table(title, "job", "seconds", "ends at")
    end = 0.0
    for job, seconds in jobs:
        end += seconds
        table.add_row(job, f"{seconds:.0f}", f"{end:.0f}")
    record = [{"job": job, "predicted_seconds": seconds} for job, seconds in jobs]
    answer(as_json, record, table, f"{len(jobs)} jobs, {total / 60:.1f} minutes predicted")


def _tables(mode: str, rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """A table for each setting, compiled rows apart; for each mode where there are all of them."""
    together, kernels = mode == "all", mode == "kernels"
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["compiled"], row["precision"], row["batch"], row["length"]) * (not together)
        groups.setdefault((row["mode"], row["model"] * kernels, *key), []).append(row)
    columns = ("tok/s", "±", "ratio", "GB", "ratio", "work", "floor")
    for (part, model, *_), group in groups.items():
        title = part if together else f"{part}, {model + ', ' * kernels}{_setting(group[0])}"
        first = "model" if part in get_args(ModelMode) and not kernels else "backend"
        table = figures_table(title, first, *columns, *LAST_COLUMN.get(part, ())[:1])
        several = len({row["model"] for row in group}) > 1
        for row in group:
            name, *figures = _cells(row, several)
            table.add_row(f"{name}, {_setting(row)}" if together else name, *figures)
        yield table


def _setting(row: dict[str, Any]) -> str:
    sizes = f"{row['precision']}, {row['batch']} x {row['length']:,}"
    return sizes + ", torch.compile" * row["compiled"]


def _cells(row: dict[str, Any], several: bool) -> list[str | Text]:
    name = row["model"]
    if row["backend"]:
        name = f"{row['model']} {row['backend']}" if several else row["backend"]
    if row["error"] is not None:
        return [name, Text("failed", style="red")]
    speed = row["tokens_per_second"]
    spread = (speed["high"] - speed["low"]) / 2 / speed["median"]
    cells: list[str | Text] = [
        name,
        f"{speed['median']:,.{0 if speed['median'] >= 100 else 1}f}",
        f"{spread:.0%}" if row["runs"] > 1 else "-",
        _ratio(row["speed_ratio"]),
        f"{row['peak_memory'] / 1e9:.2f}",
        _ratio(row["memory_ratio"]),
        f"{row['work_memory'] / 1e9:.2f}",
        f"{row['of_floor']:.0%}",
    ]
    if row["mode"] == "decode":
        cells.append(f"{row['weight_bandwidth'] / row['floors']['read']:.0%}")
    elif row["mode"] in get_args(ModelMode):
        cells.append(f"{row['utilisation']:.0%}")
    return cells


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How each model ran, what failed, and the median floors of each precision and length."""
    notes = [""]
    floors: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        name = f"{row['model']} {row['backend']}".strip() + " compiled" * row["compiled"]
        if row["error"] is not None:
            where = f"{row['precision']}, {row['batch']} x {row['length']}"
            notes.append(f"{name}, {where}: {row['error']}")
            continue
        if row["mode"] in get_args(OpMode):  # the shapes, which all its backends share
            notes.append(f"{row['model']}, {row['precision']}: {row['setting']}")
        else:
            size = f"{row['parameters'] / 1e6:.1f}M parameters"
            notes.append(f"{name}, {row['precision']}: {size}, {row['setting']}")
        floors.setdefault(f"{row['precision']}, T {row['length']}", []).append(row["floors"])
    for setting, each in floors.items():
        rates = (median(f[name] for f in each) / 1e9 for name in ("matmul", "sdpa", "read", "copy"))
        shown = "matmul {:,.0f} GFLOP/s, SDPA {:,.0f} GFLOP/s, read {:,.1f} GB/s, copy {:,.1f} GB/s"
        notes.append(f"floors, {setting}: {shown.format(*rates)}")
    return list(dict.fromkeys(notes))


def _sweep_scan(
    models: Sequence[str],
    lengths: Sequence[int],
    batch: int,
    precision: str,
    seconds: float,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure all block sizes of the scan on one GPU and keep the best, where the scan finds them.

    Raises:
        PHAError: no GPU, a model that is no preset, or no size that works.
    """
    import torch

    from pha.bench.peers import model_config
    from pha.modeling import PHAConfig
    from pha.ops.gated_scan.sizes import write_tuned
    from pha.ops.gated_scan.tuning import sweep
    from pha.results import JSON_FORMAT
    from pha.utils.files import write_json
    from pha.utils.hardware import PRECISIONS, default_device, provenance

    device = default_device()
    if device.type != "cuda":
        raise PHAError("sweep tries sizes of a kernel that needs a CUDA device; there is none here")
    configs = [model_config(name, max(lengths)) for name in models]
    if not all(isinstance(config, PHAConfig) for config in configs):
        raise PHAError("sweep takes the shapes of our presets; leave hf:PEER out")
    require_outputs(out, "bench-sweep.json")
    shapes = [(batch, length, config.state_size) for config in configs for length in lengths]
    with progress_console().status("") as status:
        rows, best = sweep(shapes, PRECISIONS[precision], seconds, progress=status.update)
    path = write_tuned(device, best)
    record: dict[str, Any] = {
        "kind": "sweep",
        "format": JSON_FORMAT,
        "best": asdict(best),
        "rows": rows,
        "provenance": provenance(device, precision),
    }
    if out is not None:
        with writing(out):
            write_json(out / "bench-sweep.json", record)
    table = figures_table(
        f"gated scan, forward and backward, {torch.cuda.get_device_name(device)}",
        "block, unroll, stages, wanted, enough",
        "ms",
        "over the best",
    )
    times: dict[str, list[float | None]] = {}
    for row in rows:
        sizes = ", ".join(str(value) for value in list(row["sizes"].values())[:5])
        times.setdefault(sizes, []).append(row["seconds"])
    whole = {sizes: fmean(t for t in each if t) for sizes, each in times.items() if all(each)}
    for sizes in times:
        shown = "failed", "-"
        if sizes in whole:
            shown = f"{whole[sizes] * 1e3:.3f}", f"{whole[sizes] / min(whole.values()):.2f}"
        table.add_row(sizes, *shown)
    answer(as_json, record, table, f"the best is kept in {path}")
