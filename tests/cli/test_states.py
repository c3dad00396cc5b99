"""`pha generate` with a text read before, from a file or a saved state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pha.data.tokenizer import load_tokenizer
from tests.cli.conftest import Pha, Refused
from tests.conftest import synthetic_text
from tests.modeling.common import scrambled, small_config

PREFIX = synthetic_text(8, 3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    scrambled(small_config(vocab_size=257, attention_window=9)).save_pretrained("model")
    load_tokenizer("bytes").save_pretrained("model")
    Path("book.txt").write_text(PREFIX, newline="")
    return tmp_path


def test_the_command_saves_and_goes_on(folder: Path, pha: Pha) -> None:
    words = ["--prompt", " one", "--max-new-tokens", 9, "--json"]
    whole = pha("generate", "model", "--prefix", "book.txt", *words)
    kept = json.loads(
        pha("generate", "model", "--prefix", "book.txt", "--save-state", "s", "--json")
    )
    assert kept["tokens"] == len(PREFIX)
    assert kept["bytes"] == Path("s").stat().st_size
    loaded = pha("generate", "model", "--load-state", "s", *words)
    assert loaded == whole
    assert "prompts: 4 tokens" in loaded.err
    assert f"prompts: {len(PREFIX) + 4} tokens" in whole.err
    Path("next.txt").write_text("and something else")
    further = ["--load-state", "s", "--prefix", "next.txt"]
    assert f"s: {len(PREFIX) + 18:,} tokens" in pha(
        "generate", "model", *further, "--save-state", "s"
    )
    assert pha("generate", "model", "--load-state", "s", *words) != whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save-state", "s"], "no state to save; give the text to read with --prefix"),
        (["--prefix", "book.txt"], "--prompt"),
        (["--load-state", "absent", "--prompt", "x"], "there is no file absent"),
        (["--load-state", "book.txt", "--prompt", "x"], "is damaged or no state"),
        (["--prefix", "absent", "--prompt", "x"], "there is no file absent"),
        (["--prefix", "book.txt", "--save-state", "book.txt"], "would be lost"),
        (["--prefix", "book.txt", "--save-state", "model"], "is a folder"),
        (["--prefix", "book.txt", "--prompt", "x", "--out", "book.txt"], "choose another --out"),
        (["--prompts", "book.txt", "--out", "book.txt"], "choose another --out"),
        (["--prefix", "book.txt", "--prompt", "x", "--attention", "window=1"], "attention_window"),
    ],
)
def test_mistakes_end_in_one_line(
    folder: Path, refused: Refused, words: list[str], message: str
) -> None:
    assert message in refused("generate", "model", *words)
    assert Path("book.txt").read_bytes().decode() == PREFIX
