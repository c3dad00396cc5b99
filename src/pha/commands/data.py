"""The verb that turns text into a token store."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pha.commands.common import AddVerb, console_for, print_json


def add_prepare(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "prepare",
        prepare,
        "turn text into a token store",
        "SOURCE is stdlib, a UTF-8 text file, or a folder. A folder whose files are named train,\n"
        "valid and test (such as wiki.train.raw) keeps these splits; any other is split by file.",
    )
    sub.add_argument("source", metavar="SOURCE")
    sub.add_argument(
        "--tokenizer",
        required=True,
        help="gpt2:FOLDER with encoder.json and vocab.bpe, bytes, bpe:SIZE trained on the text, "
        "or the folder of a saved tokenizer",
    )
    sub.add_argument("--out", type=Path, required=True, help="folder of the store")
    sub.add_argument(
        "--separator",
        choices=("auto", "end-of-text", "none"),
        default="auto",
        help="what ends a document; auto: end-of-text where documents are separate texts",
    )
    sub.add_argument("--json", action="store_true", help="print the store's facts as JSON")


def prepare(options: Namespace) -> None:
    """`pha prepare`."""
    from pha.data import prepare as prepare_store

    console = console_for(options)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        store = prepare_store(
            options.source,
            options.tokenizer,
            options.out,
            separator=options.separator,
            progress=show,
        )
    if options.json:
        print_json(store.describe())
        return
    table = Table(title=f"{store.path}: {store.vocab_size} token vocabulary")
    for name in ("split", "documents", "tokens", "words", "lines", "bytes"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split in store.splits:
        c = store.counts(split)
        numbers = (c.documents, c.tokens, c.words, c.lines, c.bytes)
        table.add_row(split, *(f"{n:,}" for n in numbers))
    console.print(table)
