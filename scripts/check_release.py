"""Hold what names a version against the version of the package, and print its changes.

    python scripts/check_release.py            # before a release: what the next one would say
    python scripts/check_release.py v1.2.3     # of this tag: its own heading must be there

Needs Python alone. The heading of a version is `## 1.2.3 - 2026-01-31`, as in keepachangelog.com.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def found(pattern: str, name: str, root: Path) -> str:
    """What the group of `pattern` matches in a file; leaves where nothing does."""
    match = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.M | re.S)
    if match is None:
        sys.exit(f"{name} has nothing like {pattern}")
    return match[1]


def release_notes(tag: str | None = None, root: Path = ROOT) -> str:
    """The changes of a tag's version, or, without a tag, of what is not released.

    Raises:
        SystemExit: the tag, CITATION.cff or the headings of CHANGELOG.md name another version.
    """
    version = found(r'^__version__ = "([^"]+)"', "src/pha/utils/versions.py", root)
    cited = found(r"^version: (\S+)$", "CITATION.cff", root)
    if cited != version:
        sys.exit(f"CITATION.cff has version {cited}, the package {version}")
    if tag not in (None, f"v{version}"):
        sys.exit(f"the tag is {tag}, but the package has version {version}: tag v{version}")
    heading = "Unreleased" if tag is None else rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d"
    return found(rf"^## {heading}\n(.*?)(?=^## |\Z)", "CHANGELOG.md", root).strip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(release_notes(sys.argv[1] if sys.argv[1:] else None))
