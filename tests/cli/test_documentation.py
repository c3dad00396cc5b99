"""Every command in the documentation is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pha.cli import read_verb
from pha.train.recipes import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:sh|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?pha ((?:.*\\\n)*.*)", re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    text = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))
    words = (shlex.split(line.replace("\\\n", ""), comments=True) for line in COMMAND.findall(text))
    return [line[2 if line[0] == "--import" else 0 :] for line in words]


def test_there_are_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_taken(page: Path) -> None:
    for verb, *words in commands(page):
        if verb == "--help":
            continue
        call = read_verb(verb, words)
        if verb == "train" and not call.args[0].endswith(".yaml"):
            recipe, *overrides = call.args
            load_recipe(recipe.replace("PRESET", "pha-tiny"), [*overrides, "--data.store", "STORE"])
