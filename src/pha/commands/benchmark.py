"""The verb that measures speed and memory beside peers: bench."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from rich.table import Table
from rich.text import Text

from pha.commands.common import Folder, Json, answer, console_for, figures_table
from pha.utils.outputs import require_folder, require_own, writing

if TYPE_CHECKING:
    from pha.bench.runner import Request

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
    Literal[ModelMode, OpMode, "kernels"],
    "MODE",
    "train, prefill or decode of models; kernels; or an op",
]

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
    in_process: bool = False,
    json: Json = False,
    out: Folder | None = None,
) -> None:
    """Speed and memory beside peers of the same size.

    Each model runs in a process of its own, and they take turns. Peers are models of
    transformers with random weights, so nothing is downloaded: hf:gpt2, hf:llama,
    hf:falcon-h1, hf:mamba2, hf:recurrent-gemma. What the machine can do is measured in the
    same processes, and every row says how much of it was reached. gated-scan, loss,
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
        in_process: measure everything in this process
        out: folder for bench-MODE.json and plots
    """
    from pha.bench.runner import Request, run_benchmark
    from pha.results import JSON_FORMAT
    from pha.utils.files import write_json
    from pha.utils.hardware import default_device, provenance

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
        in_process=in_process,
    )
    if out is not None:
        require_folder(out)
        require_own(out / f"bench-{mode}.json")
    console = console_for(json)
    record: dict[str, Any] = {
        "kind": "bench",
        "format": JSON_FORMAT,
        "request": vars(request),
        "rows": [],
        "provenance": provenance(default_device(), ",".join(precision)),
    }

    def keep(rows: list[dict[str, Any]]) -> None:
        record["rows"] = rows
        if out is not None:
            with writing(out):
                write_json(out / f"bench-{mode}.json", record)

    with console.status("") as status:
        rows = run_benchmark(request, status.update, keep)
    meaning = ["  ".join(LAST_COLUMN[mode])] if mode in LAST_COLUMN else []
    answer(json, record, *_tables(request, rows), *_notes(rows), LEGEND, *meaning)
    if out is not None:
        console.print(str(out / f"bench-{mode}.json"), highlight=False)
        try:
            from pha.report.charts import save_speed_plots

            plots = save_speed_plots(mode, rows, out)
        except ImportError as error:
            console.print(f"no pictures: {error.name} is not installed", highlight=False)
            return
        for plot in plots:
            console.print(str(plot), highlight=False)


def _tables(request: Request, rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """A table for each setting; compiled rows have theirs apart."""
    kernels = request.mode == "kernels"
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["compiled"], row["precision"], row["batch"], row["length"])
        groups.setdefault((row["mode"], row["model"] * kernels, *key), []).append(row)
    first = "model" if request.mode in get_args(ModelMode) else "backend"
    columns = ("tok/s", "±", "ratio", "GB", "ratio", "work", "floor")
    for (mode, model, compiled, precision, batch, length), group in groups.items():
        title = f"{mode}, {model + ', ' * kernels}{precision}, {batch} x {length:,}"
        title += ", torch.compile" * compiled
        table = figures_table(title, first, *columns, *LAST_COLUMN.get(mode, ())[:1])
        for row in group:
            table.add_row(*_cells(row, len(request.models) > 1 and not kernels))
        yield table


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
