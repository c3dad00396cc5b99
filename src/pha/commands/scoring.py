"""The verb that reads documents of any length: score."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from pha.commands.common import AddVerb, console_for, print_json
from pha.utils.errors import PHAError


def add_score(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "score",
        score,
        "how well a model predicts documents of any length, word by word",
        "Reads each FILE in pieces with the model's state carried along: the numbers are those of\n"
        "one pass over the whole document. With --attention-window memory does not grow with its\n"
        "length. --out writes, for each file, a page that shows which words surprised the model.",
    )
    sub.add_argument("model", metavar="RUN_OR_MODEL", type=Path)
    sub.add_argument("files", metavar="FILE", nargs="+", type=Path)
    sub.add_argument("--out", metavar="DIR", type=Path, help="write NAME.html and NAME.json here")
    sub.add_argument("--piece", type=int, default=2048, help="tokens per forward pass (2048)")
    sub.add_argument(
        "--attention-window", type=int, help="keys that a query sees (as the model was trained)"
    )
    sub.add_argument(
        "--shown", type=int, default=20_000, help="tokens shown as text in the page (20000)"
    )
    sub.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="fp32")
    sub.add_argument("--json", action="store_true", help="print as JSON")


def score(options: Namespace) -> None:
    """`pha score`."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from pha.evals.score import read_text
    from pha.evals.score import score as score_text
    from pha.loading import load_model
    from pha.report.surprise import Collector, write_page
    from pha.utils.files import write_json
    from pha.utils.hardware import choose_precision, default_device, provenance, return_freed_memory

    for path in options.files:
        if not path.is_file():
            raise PHAError(f"there is no file {path}")
    names = [path.stem for path in options.files]
    if options.out is not None and len(set(names)) < len(names):
        raise PHAError("two files have the same name; score them into different --out folders")
    return_freed_memory()
    device = default_device()
    loaded = load_model(options.model, device)
    if options.attention_window is not None:
        loaded.model.config.attention_window = options.attention_window
        loaded.model.config.check()
    precision = choose_precision(options.precision, device)
    console = console_for(options)
    results: list[dict[str, Any]] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        for path in options.files:
            collected = Collector(options.shown)
            seen = 0

            def each(piece: Any, collected: Collector = collected, path: Path = path) -> None:
                nonlocal seen
                collected(piece)
                seen += len(piece.ids)
                progress.update(task, description=f"{path.name}: {seen:,} tokens")

            result = score_text(
                loaded,
                path.name,
                read_text(path),
                piece=options.piece,
                precision=precision,
                each=each,
            )
            results.append(result.to_dict())
            if options.out is not None:
                page = options.out / f"{path.stem}.html"
                write_page(
                    page,
                    options.model.name or str(options.model),
                    result,
                    collected,
                    loaded.tokenizer,
                )
                nats = [None, *(round(float(x), 4) for x in collected.all_nats()[1:])]
                content = result.to_dict() | {"nats": nats}
                write_json(
                    options.out / f"{path.stem}.json",
                    content | {"provenance": provenance(device, precision)},
                )
    if options.json:
        print_json(
            {
                "model": str(options.model),
                "documents": results,
                "provenance": provenance(device, precision),
            }
        )
        return
    console.print(_table(results, str(options.model)))
    if options.out is not None:
        console.print(f"pages and JSON: {options.out}", highlight=False)


def _table(results: list[dict[str, Any]], model: str) -> Any:
    from rich import box
    from rich.table import Table

    title = f"perplexity of {model}, state carried through each document"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("document", overflow="fold")
    for heading in (
        "tokens",
        "per token",
        "per word",
        "per byte",
        "tok/s",
        "memory",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result["name"],
            f"{result['tokens']:,}",
            f"{result['perplexity']:,.2f}",
            f"{result['word_perplexity']:,.1f}",
            f"{result['byte_perplexity']:.4f}",
            f"{result['tokens_per_second']:,.0f}",
            f"{result['memory_end'] / 1e9:.2f} GB",
        )
    return table
