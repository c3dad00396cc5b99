"""What the verbs share: what values are called in the help, and where output goes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from pha.utils.errors import PHAError

Folder = Annotated[Path, "DIR"]
File = Annotated[Path, "FILE"]
Model = Annotated[Path, "RUN_OR_MODEL"]
Store = Annotated[Path, "STORE"]
Dtype = Literal["fp32", "bf16"]
Precision = Literal["auto", "fp32", "bf16"]


def console_for(as_json: bool) -> Console:
    """Progress and tables; on standard error where standard output is for JSON."""
    return Console(stderr=as_json)


def print_json(value: Any) -> None:
    """Write `value` to standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    print()


def figures_table(title: str, first: str, *others: str, gap: int = 1) -> Table:
    """An empty table whose first column holds names and the others figures, `gap` + 1 apart."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0))
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def require_file_name(path: Path | None) -> None:
    """An output that is to be a file is refused early where there is a folder of that name."""
    if path is not None and path.is_dir():
        raise PHAError(f"{path} is a folder: name the file to write")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in a line why `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise PHAError(f"{path} cannot be written ({error.strerror or error})") from error
