"""Modules of a user's own, imported first as they register things; and those not installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pha.utils.errors import PHAError

ASKED: list[str] = []
"""What this command was told to import; its configurations name it, and its children import it."""

EXTRAS = {
    "train": ("accelerate", "filelock", "jsonargparse", "psutil", "rich", "shtab", "yaml"),
    "report": ("jinja2", "matplotlib", "scipy"),
    "data": ("datasets", "pyarrow", "zstandard"),
    "cpu": ("numba",),
    "harness": ("lm_eval",),
    "serve": ("fastapi", "openai", "uvicorn"),
    "cluster": ("submitit",),
}
"""Extra of this package -> what it brings."""


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
        except (ModuleNotFoundError, SyntaxError, TypeError, ValueError) as error:
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


def remedy(error: ModuleNotFoundError) -> str | None:
    """What to install where a package of an extra is missing; None for any other module."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            todo = f"run `pip install 'pha-lm[{extra}]'`"
            return f"this needs {package}, which is not installed; {todo}"
    return None
