"""The verb that reads documents of any length: score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from pha.commands.common import (
    File,
    Folder,
    Model,
    Precision,
    console_for,
    figures_table,
    print_json,
)
from pha.utils.errors import PHAError


def score(
    model: Model,
    files: Sequence[File],
    *,
    out: Folder | None = None,
    piece: int = 2048,
    attention_window: int | None = None,
    shown: int = 20_000,
    precision: Precision = "fp32",
    json: bool = False,
) -> None:
    """How well a model predicts documents of any length, word by word.

    Reads each FILE in pieces with the model's state carried along: the numbers are those of
    one pass over the whole document. With --attention-window memory does not grow with its
    length. --out writes, for each file, a page that shows which words surprised the model.

    Args:
        model: a run, a checkpoint or a saved model
        files: UTF-8 texts
        out: write NAME.html and NAME.json here
        piece: tokens per forward pass
        attention_window: keys that a query sees (as the model was trained)
        shown: tokens shown as text in the page
        precision: of the products; auto: bf16 where they are clearly faster in it
        json: print as JSON
    """
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from pha.evals.score import read_text
    from pha.evals.score import score as score_text
    from pha.loading import load_model
    from pha.report.surprise import Collector, write_page
    from pha.utils.files import write_json
    from pha.utils.hardware import choose_precision, default_device, provenance, return_freed_memory

    for path in files:
        if not path.is_file():
            raise PHAError(f"there is no file {path}")
    if out is not None and len({path.stem for path in files}) < len(files):
        raise PHAError("two files have the same name; score them into different --out folders")
    return_freed_memory()
    device = default_device()
    loaded = load_model(model, device)
    if attention_window is not None:
        loaded.model.config.attention_window = attention_window
        loaded.model.config.check()
    chosen = choose_precision(precision, device)
    console = console_for(json)
    facts = {"provenance": provenance(device, chosen)}
    results: list[dict[str, Any]] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        for path in files:
            collected = Collector(shown)
            seen = 0

            def each(piece: Any, collected: Collector = collected, name: str = path.name) -> None:
                nonlocal seen
                collected(piece)
                seen += len(piece.ids)
                progress.update(task, description=f"{name}: {seen:,} tokens")

            text = read_text(path)
            result = score_text(loaded, path.name, text, piece=piece, precision=chosen, each=each)
            results.append(result.to_dict())
            if out is not None:
                page, name = out / f"{path.stem}.html", model.name or str(model)
                write_page(page, name, result, collected, loaded.tokenizer)
                nats = [None, *(round(float(x), 4) for x in collected.all_nats()[1:])]
                write_json(page.with_suffix(".json"), result.to_dict() | {"nats": nats} | facts)
    if json:
        print_json({"model": str(model), "documents": results} | facts)
        return
    console.print(_table(results, str(model)))
    if out is not None:
        console.print(f"pages and JSON: {out}", highlight=False)


def _table(results: list[dict[str, Any]], model: str) -> Table:
    title = f"perplexity of {model}, state carried through each document"
    columns = ("tokens", "per token", "per word", "per byte", "tok/s", "memory")
    table = figures_table(title, "document", *columns)
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
