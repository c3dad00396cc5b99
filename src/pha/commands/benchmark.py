"""The verb that measures speed and memory beside peers: bench."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from pha.commands.common import AddVerb, console_for, print_json

if TYPE_CHECKING:
    from pha.bench.runner import Request

MODEL_MODES = ("train", "prefill", "decode")
OP_MODES = ("gated-scan", "loss", "attention", "documents")
LEGEND = """\
±  half the range of the runs      ratio  against the first row      GB  peak memory
work  what of it came on top of the weights
floor  the time that the measured rates allow, over the time taken"""
LAST_COLUMN = {"train": "matmul", "prefill": "matmul", "decode": "weights"}
MEANING = {
    "matmul": "\nmatmul  FLOPs of products with weights, over the matmul rate",
    "weights": "\nweights  bytes of weights read, over the read bandwidth",
}


def add_bench(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "bench",
        bench,
        "speed and memory beside peers of the same size",
        "Each model runs in a process of its own, and they take turns. Peers are models of\n"
        "transformers with random weights, so nothing is downloaded: hf:gpt2, hf:llama,\n"
        "hf:falcon-h1, hf:mamba2, hf:recurrent-gemma. What the machine can do is measured in the\n"
        "same processes, and every row says how much of it was reached. gated-scan, loss,\n"
        "attention and documents (attention within them) time the backends of one op at the\n"
        "shapes of a preset. kernels times steps, prompts and tokens with each kernel and without.",
    )
    sub.add_argument("mode", choices=(*MODEL_MODES, *OP_MODES, "kernels"))
    sub.add_argument(
        "--models",
        type=_words,
        default=("pha-125m",),
        help="presets (PRESET+FIELD=VALUE changes one) or hf:PEER, comma-separated; ratios are "
        "against the first (pha-125m)",
    )
    sub.add_argument(
        "--lengths", type=_numbers, default=(1024,), help="tokens, comma-separated (1024)"
    )
    sub.add_argument("--batch", type=int, default=2, help="sequences; decode runs at 1 as well (2)")
    sub.add_argument("--precision", type=_words, default=("fp32",), help="fp32,bf16 (fp32)")
    sub.add_argument("--runs", type=int, default=3, help="processes for each row (3)")
    sub.add_argument("--seconds", type=float, default=2.0, help="of measuring in each (2)")
    sub.add_argument("--seconds-limit", type=float, help="for the whole benchmark (none)")
    sub.add_argument("--chunk", type=int, default=0, help="tokens of a prompt at a time (all)")
    sub.add_argument("--backends", type=_words, help="of an op (all but the oracle, naive)")
    sub.add_argument("--compile", action="store_true", help="measure under torch.compile too")
    sub.add_argument("--in-process", action="store_true", help="measure everything in this process")
    sub.add_argument("--json", action="store_true", help="print as JSON")
    sub.add_argument("--out", type=Path, help="folder for bench-MODE.json and plots")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in _words(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from None


def bench(options: Namespace) -> None:
    """`pha bench`."""
    from pha.bench.runner import Request, run_benchmark
    from pha.utils.files import write_json
    from pha.utils.hardware import default_device, provenance

    request = Request(
        mode=options.mode,
        models=options.models,
        lengths=options.lengths,
        batch=options.batch,
        precisions=options.precision,
        runs=options.runs,
        seconds=options.seconds,
        seconds_limit=options.seconds_limit,
        compiled=options.compile,
        chunk=options.chunk,
        backends=options.backends,
        in_process=options.in_process,
    )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    console = console_for(options)
    record: dict[str, Any] = {
        "kind": "bench",
        "request": vars(request),
        "rows": [],
        "provenance": provenance(default_device(), ",".join(request.precisions)),
    }

    def keep(rows: list[dict[str, Any]]) -> None:
        record["rows"] = rows
        if options.out is not None:
            write_json(options.out / f"bench-{request.mode}.json", record)

    with console.status("") as status:
        rows = run_benchmark(request, status.update, keep)
    if options.json:
        print_json(record)
    else:
        for table in _tables(request, rows):
            console.print(table)
        last = MEANING.get(LAST_COLUMN.get(request.mode, ""), "")
        console.print(
            *_notes(rows), LEGEND + last, sep="\n", highlight=False, markup=False, soft_wrap=True
        )
    if options.out is not None:
        console.print(str(options.out / f"bench-{request.mode}.json"), highlight=False)
        try:
            plots = _plots(request, rows, options.out)
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
    for (mode, model, compiled, precision, batch, length), group in groups.items():
        title = f"{mode}, {model + ', ' * kernels}{precision}, {batch} x {length:,}"
        table = Table(
            title=title + ", torch.compile" * compiled,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1),
        )
        last = LAST_COLUMN.get(mode)
        table.add_column("model" if request.mode in MODEL_MODES else "backend", no_wrap=True)
        headings = ("tok/s", "±", "ratio", "GB", "ratio", "work", "floor", last)
        for heading in headings:
            if heading is not None:
                table.add_column(heading, justify="right", no_wrap=True)
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
    elif row["mode"] in MODEL_MODES:
        cells.append(f"{row['utilisation']:.0%}")
    return cells


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The floors of each setting, how each model ran, and what failed."""
    notes = {"": None}
    for row in rows:
        where = f"{row['precision']}, {row['batch']} x {row['length']}"
        name = f"{row['model']} {row['backend']}".strip() + " compiled" * row["compiled"]
        if row["error"] is not None:
            notes[f"{name}, {where}: {row['error']}"] = None
            continue
        if row["mode"] in OP_MODES:  # the shapes, which all its backends share
            notes[f"{row['model']}, {row['precision']}: {row['setting']}"] = None
            continue
        size = f"{row['parameters'] / 1e6:.1f}M parameters"
        notes[f"{name}, {row['precision']}: {size}, {row['setting']}"] = None
    for setting, floors in _floors(rows).items():
        notes[f"floors, {setting}: {floors}"] = None
    return list(notes)


def _floors(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The median floors of each precision and length, over rows."""
    import statistics

    groups: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        if row["error"] is None:
            groups.setdefault(f"{row['precision']}, T {row['length']}", []).append(row["floors"])
    shown = {}
    for setting, floors in groups.items():
        middle = {name: statistics.median(floor[name] for floor in floors) for name in floors[0]}
        shown[setting] = (
            f"matmul {middle['matmul'] / 1e9:,.0f} GFLOP/s, SDPA {middle['sdpa'] / 1e9:,.0f} "
            f"GFLOP/s, read {middle['read'] / 1e9:,.1f} GB/s, copy {middle['copy'] / 1e9:,.1f} GB/s"
        )
    return shown


def _plots(request: Request, rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Speed and memory against length, a picture each for every precision and batch."""
    from pha.report.charts import save_speed_plots

    return save_speed_plots(request.mode, rows, out)
