"""Documents of any length, scored in pieces."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pha.cli import main
from pha.data.tokenizer import load_tokenizer
from pha.evals.score import score, stream
from pha.loading import LoadedModel
from pha.report.surprise import Collector, words
from pha.utils.errors import PHAError
from tests.conftest import synthetic_text
from tests.modeling.common import scrambled, small_config

TEXT = synthetic_text(40, 5) + "a café\r\nof 中文 and 😀 and\n\n  two  blanks \n"


def load(
    window: int | None = None, branches: tuple[str, ...] = ("gss", "attention", "aux_ffn")
) -> LoadedModel:
    config = small_config(vocab_size=257, attention_window=window, branches=list(branches))
    model = scrambled(config).requires_grad_(False)
    return LoadedModel(Path("model"), model, load_tokenizer("bytes"), None)


def cut(text: str, sizes: list[int]) -> Iterator[str]:
    done = 0
    for size in sizes:
        if done < len(text):
            yield text[done : done + size]
        done += size
    if done < len(text):
        yield text[done:]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("branches", [("gss", "attention", "aux_ffn"), ("attention",), ("gss",)])
@pytest.mark.parametrize("piece", [1, 64, 100_000])
def test_pieces_give_what_one_pass_gives(
    window: int | None, branches: tuple[str, ...], piece: int
) -> None:
    loaded = load(window, branches)
    text = TEXT[:300]
    ids = torch.tensor(list(text.encode()))
    log_p = loaded.model(ids[None]).logits[0].double().log_softmax(-1)
    expected = -log_p[:-1].gather(1, ids[1:, None])[:, 0]
    pieces = list(stream(loaded, iter([text]), piece))
    nats = np.concatenate([p.nats for p in pieces])
    assert math.isnan(nats[0])
    np.testing.assert_allclose(nats[1:], expected.numpy(), atol=3e-5)
    hits = np.concatenate([p.hits for p in pieces])
    assert hits[1:].tolist() == (log_p[:-1].argmax(-1) == ids[1:]).tolist()
    assert np.concatenate([p.ids for p in pieces]).tolist() == ids.tolist()

    summary = score(loaded, "x", iter([text]), piece=piece)
    total = float(expected.sum())
    assert summary.tokens == len(ids) - 1
    assert summary.loss == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    counted = len(text.split()) + text.count("\n")
    assert summary.word_perplexity == pytest.approx(math.exp(total / counted), rel=1e-4)
    assert summary.bits_per_byte == pytest.approx(total / len(ids) / math.log(2), rel=1e-5)
    assert summary.accuracy == pytest.approx(float(hits[1:].mean()))
    assert summary.protocol["attention_window"] == window


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), max_size=12))
def test_words_across_parts_count_once(sizes: list[int]) -> None:
    loaded = load()
    result = score(loaded, "x", cut(TEXT[:200], sizes))
    assert result.words == len(TEXT[:200].split()) + TEXT[:200].count("\n")
    assert result.bytes == len(TEXT[:200].encode())


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(PHAError, match="has 1 tokens"):
        score(load(), "x", iter(["a"]))
    with pytest.raises(PHAError, match="at least 1"):
        list(stream(load(), iter(["abc"]), piece=0))


def test_words_join_to_the_text_and_carry_all_surprise() -> None:
    loaded = load()
    collected = Collector(shown=150)
    score(loaded, "x", iter([TEXT]), piece=32, each=collected)
    nats = collected.all_nats()
    assert len(nats) == len(TEXT.encode())
    assert len(collected.ids) == 150
    found = list(words(collected.ids, nats, loaded.tokenizer))
    joined = "".join(word.space + word.text for word in found)
    assert joined == TEXT.encode()[:150].decode(errors="replace")
    assert all(not any(c.isspace() for c in word.text) for word in found)
    bits = sum(word.bits or 0.0 for word in found)
    assert bits == pytest.approx(float(nats[1:150].sum()) / math.log(2), rel=1e-5)


def test_the_command_writes_table_page_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load()
    model = tmp_path / "model"
    loaded.model.save_pretrained(model)
    loaded.tokenizer.save_pretrained(model)
    capsys.readouterr()
    document = tmp_path / "story.txt"
    document.write_text(TEXT + "<script>alert(1)</script>\n")
    out = tmp_path / "out"
    main(["score", str(model), str(document), "--out", str(out), "--attention", "window=9"])
    assert "story.txt" in capsys.readouterr().out
    content = json.loads((out / "story.json").read_text())
    assert content["protocol"]["attention_window"] == 9
    known = content["nats"][1:]
    assert content["nats"][0] is None
    assert len(known) == content["tokens"]
    assert sum(known) / len(known) == pytest.approx(content["loss"], abs=1e-4)
    page = (out / "story.html").read_text()
    assert "<script" not in page
    assert "café" in page
    main(["score", str(model), str(document), "--attention", "window=9", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["documents"][0]["loss"] == pytest.approx(content["loss"])


@pytest.mark.parametrize(
    ("change", "words_"),
    [
        (["absent.txt"], "there is no file"),
        (["a.txt", "b/a.txt", "--out", "o"], "same name"),
        (["a.txt", "--attention", "window=1"], "attention_window"),
        (["a.txt", "--piece", "0"], "at least 1"),
    ],
)
def test_mistakes_end_in_one_line(
    change: list[str],
    words_: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load()
    loaded.model.save_pretrained("model")
    loaded.tokenizer.save_pretrained("model")
    (tmp_path / "b").mkdir()
    for name in ("a.txt", "b/a.txt"):
        (tmp_path / name).write_text("some text")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["score", "model", *change])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words_ in error
    assert error.count("\n") == 1
