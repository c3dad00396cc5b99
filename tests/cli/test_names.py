"""Names and texts of any kind, and output that goes anywhere, as the command line meets them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pha.cli import main
from pha.commands.common import print_json
from pha.data import TokenStore
from pha.report.tables import Section, TextTable
from pha.utils.progress import make_console
from tests.cli.conftest import Pha, Refused
from tests.conftest import synthetic_text

NAMES = [
    "[/red] [bold] :smile: %d",
    "-x",
    "two\nlines \x1b[31m",
    os.fsdecode(b"caf\xe9"),
    "a" * 200,
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_text_and_a_store_of_any_name(
    name: str, pha: Pha, refused: Refused, tmp_path: Path
) -> None:
    book, out = tmp_path / f"{name}.txt", tmp_path / name
    book.parent.mkdir(exist_ok=True)
    book.write_text(synthetic_text(300, 1))
    if not name.isascii():  # which libraries of weights and tokenizers cannot write to
        assert "not UTF-8" in refused("prepare", book, "--tokenizer", "bytes", "--out", out)
        out = tmp_path / "store"
    printed = pha("prepare", book, "--tokenizer", "bytes", "--out", out)
    assert "\x1b" not in printed
    if "[/" in name:
        assert name in " ".join(printed.split())
    record = pha("prepare", book, "--tokenizer", "bytes", "--out", out, "--json")
    assert json.loads(record)["source"] == str(book)
    assert TokenStore.open(out).describe()["source"] == str(book)


def test_tables_take_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    make_console(width=120).print(TextTable(NAMES[0], ["[/a]"], [Section("[b]", "", [["[/c]"]])]))
    printed = capsys.readouterr().out
    assert all(text in printed for text in (NAMES[0], "[/a]", "[b]", "[/c]"))


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_in_an_error_is_one_visible_line(
    name: str, refused: Refused, tmp_path: Path
) -> None:
    line = refused("eval", tmp_path / name, "--data", tmp_path)
    assert "does not exist" in line
    assert "\x1b" not in line
    line.encode()


@pytest.mark.parametrize("words", [("--out", "a" * 300), ("--out=a/" + "b" * 5000,)])
def test_names_that_are_too_long(
    words: tuple[str, ...], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(synthetic_text(300, 1))
    assert "too long" in refused("prepare", "book.txt", "--tokenizer", "bytes", *words)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_on_an_output_of_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"caf\u00e9 \u4e2d \u2028": os.fsdecode(b"\xe9"), "most": float("inf")}
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    print_json(record)
    assert json.loads(raw.getvalue().decode(encoding)) == record | {"most": None}


def test_help_and_mistakes_on_an_output_that_shows_no_accents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr("pha.cli.ABOUT", "caf\u00e9 \udce9")
    main(["--help"])
    sys.stdout.flush()
    assert b"caf\\xe9 \\udce9" in raw.getvalue()


@pytest.mark.parametrize(
    "output",
    ["full", *(pytest.param(each, marks=pytest.mark.slow) for each in ("closed", "closed pipe"))],
)
def test_an_output_that_takes_nothing(output: str) -> None:
    words = [sys.executable, "-m", "pha", "recipes"]
    if output == "closed":
        done = subprocess.run(
            ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *words], stderr=subprocess.PIPE
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return
    if output == "full":
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 2
        assert done.stderr == b"pha recipes: error: No space left on device\n"
        return
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode in (1, 141)
    assert done.stderr == b""
