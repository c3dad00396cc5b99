"""Modules of a user's own, imported first because they register branches, tasks or ops."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pha.utils.errors import PHAError

ASKED: list[str] = []
"""What this command was told to import; its configurations name it, and its children import it."""


def import_modules(names: Iterable[str], key: str = "--import") -> None:
    """Import modules, from the current folder too.

    Args:
        names: of modules.
        key: what named them, for messages.

    Raises:
        PHAError: there is no such module, or it is no Python.
    """
    for name in names:
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(name)
        except (ModuleNotFoundError, SyntaxError, ValueError) as error:
            hint = "" if isinstance(error, SyntaxError) else "; start in the folder that holds it"
            raise PHAError(f"{key} {name}: {error}{hint}") from error


@contextmanager
def asked_for(names: Iterable[str]) -> Iterator[None]:
    """Import modules for a command, whose configurations and children then know of them.

    Raises:
        PHAError: as of `import_modules`.
    """
    ASKED[:] = names
    try:
        import_modules(ASKED)
        yield
    finally:
        ASKED.clear()
