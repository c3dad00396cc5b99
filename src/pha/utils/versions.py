"""Versions of installed packages, and of this one where it runs from a source tree."""

from __future__ import annotations

from importlib import metadata


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def own_version() -> str:
    """The version of `pha`; `0+source` where its source is on the path without being installed."""
    return version_of("pha") or "0+source"
