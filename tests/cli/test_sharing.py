"""`pha generate`, `pha export` and `pha harness` as a user meets them."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from pha.data.tokenizer import load_tokenizer
from tests.cli.conftest import Pha, Refused
from tests.modeling.common import scrambled, small_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of bytes."""
    folder = tmp_path_factory.mktemp("sharing") / "model"
    scrambled(small_config(vocab_size=257)).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def test_one_text_is_the_same_streamed_or_not(pha: Pha, model: Path) -> None:
    words = ["generate", model, "--prompt", "one two", "--max-new-tokens", 12, "--seed", 2]
    streamed = pha(*words)
    record = pha(*words, "--json")
    assert record.count("\n") == 1
    text = json.loads(record)["text"]
    assert streamed == f"one two{text}\n"
    assert streamed.err.count("\n") == 1
    for part in ("prompts: 7 tokens", "decoding: 11 tokens", "tokens/s", "GB/s"):
        assert part in streamed.err


def test_one_token_has_no_decoding_to_time(pha: Pha, model: Path) -> None:
    printed = pha("generate", model, "--prompt", "one", "--max-new-tokens", 1)
    assert "decoding" not in printed.err


def test_standard_input(pha: Pha, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", model, "--max-new-tokens", 6, "--prompt"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo\n")))
    assert pha(*words, "-") == pha(*words, "one\ntwo")


def test_a_file_of_prompts(pha: Pha, model: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\r\n\n  two three\n", encoding="utf-8")
    records = tmp_path / "prompts.jsonl"
    records.write_text('{"prompt": "one"}\n{"text": "  two three", "n": 1}\n', encoding="utf-8")
    words = ["--max-new-tokens", 5, "--num-samples", 2, "--batch-size", 3]
    first = pha("generate", model, "--prompts", lines, *words, "--json")
    found = [json.loads(line) for line in first.splitlines()]
    assert [(r["prompt"], r["sample"]) for r in found] == [
        ("one", 0),
        ("one", 1),
        ("  two three", 0),
        ("  two three", 1),
    ]
    assert pha("generate", model, "--prompts", records, *words, "--json") == first
    out = tmp_path / "new" / "texts.jsonl"
    assert pha("generate", model, "--prompts", lines, *words, "--out", out) == ""
    assert out.read_text(encoding="utf-8") == first
    shown = pha("generate", model, "--prompts", lines, *words)
    assert f"=== prompt 2, sample 1 ===\n  two three{found[2]['text']}\n" in shown


def test_stop_strings_are_cut_off(pha: Pha, model: Path) -> None:
    words = ["generate", model, "--prompt", "x", "--max-new-tokens", 30, "--json"]
    whole = json.loads(pha(*words))["text"]
    result = json.loads(pha(*words, "--stop", whole[4], "--stop", "nowhere"))
    assert result["text"] == whole[: whole.index(whole[4])]
    assert result["finish"] == "stop"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no prompts"),
        (b" \n\n", "has no prompts"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"prompt": "x"}\n{"prompt"', "line 2 of"),
        (b'{"prompt": 3}', "has no text"),
        (b'["prompt"]', "is not a JSON object"),
        (b'{"text": "so \\ud83d"}', "half a surrogate pair"),
    ],
)
def test_bad_prompt_files(
    refused: Refused, model: Path, tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert expected in refused("generate", model, "--prompts", path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give a text with --prompt"),
        (["--prompt", "x", "--prompts", "y"], "or a file of them with --prompts"),
        (["--prompts", "no-such-file"], "does not exist"),
        (["--prompt", "caf\udce9"], "not UTF-8"),
        (["--prompt", "x", "--stop", "caf\udce9"], "not UTF-8"),
        (["--prompt", "x", "--batch-size", "0"], "at a time is 0"),
        (["--prompt", "x", "--num-samples", "2", "--temperature", "0"], "temperature 0"),
        (["--prompt", "x", "--stop", ""], "stop string is empty"),
        (["--prompt", "x", "--dtype", "fp8"], "fp8"),
        (["--prompt", "x", "--out", "."], "is a folder"),
    ],
)
def test_mistakes_in_generating(
    refused: Refused, model: Path, words: list[str], expected: str
) -> None:
    assert expected in refused("generate", model, *words)


def test_export_and_generate_from_it(
    pha: Pha, refused: Refused, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shared"
    printed = pha("export", model, out, "--license", "mit", "--dataset", "me/texts")
    assert printed.startswith(f"{out}\n")
    assert "without results" in printed
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert "- me/texts" in card
    words = ["--prompt", "one", "--max-new-tokens", 8, "--temperature", 0]
    assert pha("generate", out, *words) == pha("generate", model, *words)
    assert "--force" in refused("export", model, out)
    facts = json.loads(pha("export", model, out, "--force", "--dtype", "bf16", "--json"))
    assert facts == {"path": str(out), "results": 0, "note": facts["note"]}
    assert '"dtype": "bfloat16"' in (out / "config.json").read_text()


def test_mistakes_in_exporting(refused: Refused, model: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused("export", tmp_path / "nothing", tmp_path / "out")
    assert "no earlier export" in refused("export", model, model)
    assert not (tmp_path / "out").exists()


def test_mistakes_in_the_harness(refused: Refused, model: Path, tmp_path: Path) -> None:
    if find_spec("lm_eval") is None:
        assert "pip install 'pha-lm[harness]'" in refused("harness", model, "--tasks", "x")
    else:
        assert "does not exist" in refused("harness", tmp_path / "none", "--tasks", "x")
