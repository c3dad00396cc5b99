"""The code in the documentation runs as printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pha.model import BRANCHES
from scripts.include_source import QUOTE, included

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture(autouse=True)
def same_branches() -> Iterator[None]:
    known = dict(BRANCHES)
    yield
    BRANCHES.clear()
    BRANCHES.update(known)


def blocks(page: Path) -> list[str]:
    """The page's Python, but what it quotes from the source."""
    text = QUOTE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


def test_some_page_has_code() -> None:
    assert any(blocks(page) for page in PAGES)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The corpus that docs/data.md speaks of; its own test compares what is printed.
    (tmp_path / "corpus.jsonl").write_text('{"text": "one document"}\n', encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_quotations_are_the_source(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert included(text) == text, "run `python scripts/include_source.py`"


def test_every_equation_is_quoted() -> None:
    text = (ROOT / "docs" / "how-pha-works.md").read_text(encoding="utf-8")
    assert len(QUOTE.findall(text)) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    for target in targets:
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
