"""Versions of installed packages and of files."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from pha.utils.errors import PHAError
from pha.utils.text import shorten

__version__ = "0.1.0"  # of this package; its metadata are made from this line


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_format(where: Path | str, found: Any, newest: int, oldest: int = 0) -> None:
    """Refuse a file whose format this version of pha does not read.

    Formats are counted, and a file without a number is of format 0. One that can be read now stays
    readable: see tests/samples.

    Raises:
        PHAError: it is newer than `newest` or older than `oldest`.
    """
    if type(found) is int and oldest <= found <= newest:
        return
    if type(found) is int and found > newest:
        raise PHAError(
            f"{where} was written by a newer pha, format {found}; this one reads up to {newest}: "
            "update pha"
        )
    raise PHAError(
        f"{where} has format {shorten(repr(found), 40)}; this pha reads {oldest} to {newest}"
    )
