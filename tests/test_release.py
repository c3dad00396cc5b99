"""One name and one version, wherever they stand, and notes that a release can use."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

import pha
from pha.utils.modules import EXTRAS
from scripts.check_release import ROOT, release_notes
from tests.conftest import POSIX

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMES = ("src/pha/utils/versions.py", "CITATION.cff", "CHANGELOG.md")


def test_the_next_release_has_notes() -> None:
    assert release_notes().startswith(("**", "-", "#"))


def test_suites_that_windows_skips_exist() -> None:
    assert all((ROOT / "tests" / name).is_file() for name in POSIX)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A tree whose version has its heading in the changelog."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = f"# Changes\n\n## Unreleased\n\n## {pha.__version__} - 2026-01-31\n\n- One.\n\n## 0.0.9"
    (tmp_path / "CHANGELOG.md").write_text(text, encoding="utf-8")
    return tmp_path


def test_notes_are_those_of_the_tag(released: Path) -> None:
    assert release_notes(f"v{pha.__version__}", released) == "- One.\n"


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (NAMES[0], f'"{pha.__version__}"', '"9.9.9"', "the package 9.9.9"),
        (NAMES[1], f"version: {pha.__version__}", "version: 9.9.9", "CITATION.cff has version 9.9"),
        (NAMES[2], " - 2026-01-31", "", "CHANGELOG.md has nothing"),
    ],
)
def test_a_version_that_differs_stops_it(
    name: str, old: str, new: str, said: str, released: Path
) -> None:
    path = released / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(SystemExit, match=said):
        release_notes(f"v{pha.__version__}", released)


def test_a_tag_of_another_version_stops_it(released: Path) -> None:
    with pytest.raises(SystemExit, match="the tag is v9"):
        release_notes("v9.9.9", released)


def test_what_we_tell_people_to_install_is_ours() -> None:
    """`pha` on the package index is somebody else's."""
    assert PROJECT["name"] == "pha-lm"
    files = [path for folder in ("src", "docs") for path in (ROOT / folder).rglob("*.*")]
    texts = [path for path in files if path.suffix in {".py", ".md", ".yaml"}]
    texts += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml")]
    told = re.compile(r"pip install[^`\n]*?[ '\"](pha(?:-lm)?)(?:\[([\w,{}]+)\])?(?=['\"\s`,)]|$)")
    extras = set()
    for path in texts:
        for name, extra in told.findall(path.read_text(encoding="utf-8")):
            assert name == "pha-lm", path
            extras |= set(filter(None, extra.split(",")))
    assert "data" in extras
    known = PROJECT["optional-dependencies"].keys() | {"{tracker}", "{extra}"}
    assert extras <= known
    assert EXTRAS.keys() <= known
    own = re.findall(r"\b(pha[\w-]*)\[", str(PROJECT["optional-dependencies"]))
    assert set(own) == {"pha-lm"}
