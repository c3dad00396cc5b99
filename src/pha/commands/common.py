"""What the verbs share: what values are called in the help, and where output goes."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import Progress
from rich.table import Table

from pha.utils.errors import PHAError
from pha.utils.formats import to_json
from pha.utils.progress import make_console
from pha.utils.text import printable

# What several verbs take: its type, its name in the help, and what the help says of it where the
# docstring of a verb does not.
Folder = Annotated[Path, "DIR"]
File = Annotated[Path, "FILE"]
Model = Annotated[
    Path,
    "RUN_OR_MODEL",
    "a run, a checkpoint or a saved model; hf:FOLDER or hf:NAME of transformers",
]
Store = Annotated[Path, "STORE", "token store made by `pha prepare`"]
Recipe = Annotated[str, "RECIPE", "PRESET.PROTOCOL, or a path that ends in .yaml"]
Dtype = Annotated[Literal["fp32", "bf16"], None, "type of the weights"]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"], None, "of the products; auto: bf16 where they are faster in it"
]
DryRun = Annotated[bool, None, "say what it takes, do nothing"]
Json = Annotated[bool, None, "print as JSON"]
Attention = Annotated[
    str,
    "NAME=VALUE",
    "attend otherwise than in training: window, theta, length_scaling or positions; again for more",
]


def read_attention(words: Sequence[str]) -> dict[str, Any]:
    """Options of attention that words such as `window=64` and `positions=none` give.

    Raises:
        PHAError: a word of another form.
    """
    options = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in ("window", "theta", "length_scaling", "positions"):
            raise PHAError(
                f"--attention {word}: write window=N, theta=X, length_scaling=N or positions=none"
            )
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options


def progress_console() -> Console:
    """For progress, on standard error."""
    return make_console(stderr=True)


def outcome_console(as_json: bool) -> Console:
    """For what a verb found: on standard error where standard output is for JSON."""
    # A file or pipe has no width at which a table would have to be cut.
    stream = sys.stderr if as_json else sys.stdout
    return make_console(stderr=as_json, width=None if stream.isatty() else 200)


def require_tokens(**options: int | None) -> None:
    """Refuse options that count tokens and are below 1; None is one that is not given.

    Raises:
        PHAError: naming the option.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise PHAError(f"--{name.replace('_', '-')} {value}: at least 1 token")


def answer(as_json: bool, record: Any, *shown: RenderableType) -> None:
    """Write what a verb found to standard output: `record` as JSON, or what is shown of it."""
    if as_json:
        print_json(record, indent=2)
        return
    console = outcome_console(as_json)
    for each in shown:
        if isinstance(each, str):
            print(printable(each))
        else:
            print_table(console, each)


def print_table(console: Console, shown: RenderableType) -> None:
    """Print a table, or every row of it as lines where its columns do not fit side by side."""
    room = console.options.update(max_width=1000)
    needed = Measurement.get(console, room, shown).minimum
    if not isinstance(shown, Table) or needed <= console.width:
        console.print(shown)
        return
    headings = [str(column.header) for column in shown.columns]
    console.print(f"{shown.title}\n" if shown.title else "", style="italic", soft_wrap=True)
    for cells in zip(*(column.cells for column in shown.columns), strict=True):
        console.print(cells[0], style="bold")
        for heading, cell in zip(headings[1:], cells[1:], strict=True):
            if cell != "":
                console.print(f"  {heading}: ", cell, sep="", soft_wrap=True)


def print_json(record: Any, indent: int | None = None) -> None:
    """Write a record to standard output as JSON, in escapes where that is not UTF-8."""
    ascii_only = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    print(to_json(record, indent, ascii_only), flush=True)


def figures_table(title: str, first: str, *others: str, gap: int = 1) -> Table:
    """An empty table whose first column holds names and the others figures, `gap` + 1 apart."""
    table = Table(
        title=printable(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0)
    )
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields what shows how many of a named walk's steps are done; nothing outside a terminal."""
    console = progress_console()
    if not console.is_terminal:  # where rich would leave an empty line
        yield lambda *_: None
        return
    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"scoring {name}".rstrip())
            bars.update(tasks[name], completed=done, total=total)

        yield show
