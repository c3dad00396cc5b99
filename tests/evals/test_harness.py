"""The harness's loglikelihoods against ours, and its tasks on local files.

Skipped without lm_eval; run them after `pip install -c constraints.txt -e '.[dev,harness]'`.
"""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pha.data import TokenStore
from pha.evals.harness import harness_model, lambada_task, require_harness, run_harness
from pha.evals.perplexity import evaluate
from pha.loading import LoadedModel
from pha.utils.errors import PHAError


@pytest.fixture
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lambada") / "some.jsonl"
    lines = ["a cat sat on the mat", "one two three four", 'she said "no" to Ann', "é is a letter"]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def rolling(loaded: LoadedModel, text: str, prefix: int | None = None, **settings: Any) -> float:
    """The harness's log-likelihood of a whole text, in nats."""
    from lm_eval.api.instance import Instance

    model = harness_model(loaded, **settings)
    model.custom_prefix_token_id = prefix
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    [result] = model.loglikelihood_rolling([request], disable_tqdm=True)
    return result


def windows_by_hand(loaded: LoadedModel, windows: list[tuple[list[int], int]]) -> float:
    """Sum of log-probabilities of the last so many tokens of each window, given those before."""
    total = 0.0
    for tokens, count in windows:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            log = loaded.model(ids[:, :-1]).logits[0].double().log_softmax(-1)
        total += float(log.gather(-1, ids[0, 1:, None])[-count:].sum())
    return total


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rolling_loglikelihood_is_that_of_our_evaluation(
    lm_eval: Any, writer: LoadedModel, store: TokenStore, batch_size: int
) -> None:
    length, count = 16, 5
    tokens = store.tokens("test")[: length * count + 1].tolist()
    ours = evaluate(
        writer.model, store, sequence_length=length, max_tokens=length * count, precision="fp32"
    )
    assert ours.tokens == length * count
    # The first token is context in ours; in the harness a token put before the text is.
    text = writer.tokenizer.decode(tokens[1:])
    theirs = rolling(writer, text, tokens[0], max_length=length, batch_size=batch_size)
    assert -theirs / (length * count) == pytest.approx(ours.loss, rel=1e-6)


def test_rolling_loglikelihood_of_a_text_that_fills_no_whole_windows(
    lm_eval: Any, writer: LoadedModel
) -> None:
    text, length = "counting one two three four five and six", 16
    ids = [writer.tokenizer.eos_token_id, *writer.tokenizer(text)["input_ids"]]
    assert (len(ids) - 1) % length == 8
    whole = [(ids[start : start + length + 1], length) for start in (0, 16)]
    # The last window is as long as the others and scores what they left.
    expected = windows_by_hand(writer, [*whole, (ids[-length - 1 :], 8)])
    assert rolling(writer, text, max_length=length) == pytest.approx(expected, rel=1e-6)
    ours = windows_by_hand(writer, [*whole, (ids[-9:], 8)])
    assert abs(ours - expected) > 0.01


def test_lambada_agrees_with_a_count_by_hand(
    lm_eval: Any, offline: None, writer: LoadedModel, passages: Path
) -> None:
    result = run_harness(writer, [], lambada=passages, batch_size=3)
    scores = result["tasks"]["lambada_openai"]
    nats, hits = [], []
    for line in passages.read_text(encoding="utf-8").splitlines():
        context, _, word = json.loads(line)["text"].rpartition(" ")
        start = len(writer.tokenizer(context)["input_ids"])
        ids = writer.tokenizer(f"{context} {word}")["input_ids"]
        with torch.no_grad():
            log = writer.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        pairs = [(log[i - 1], ids[i]) for i in range(start, len(ids))]
        nats.append(sum(float(row[token]) for row, token in pairs))
        hits.append(all(int(row.argmax()) == token for row, token in pairs))
    assert scores["perplexity,none"] == pytest.approx(math.exp(-np.mean(nats)), rel=1e-5)
    assert scores["acc,none"] == np.mean(hits)
    assert result["documents"] == {"lambada_openai": 4}


def test_our_lambada_cuts_texts_as_the_harness_does(lm_eval: Any, passages: Path) -> None:
    from lm_eval.utils import apply_template

    folder = Path(lm_eval.__file__).parent / "tasks" / "lambada"
    theirs = yaml.safe_load((folder / "lambada_openai.yaml").read_text())
    ours = lambada_task(passages)
    for line in passages.read_text(encoding="utf-8").splitlines():
        for part in ("doc_to_text", "doc_to_target"):
            document = json.loads(line)
            assert apply_template(ours[part], document) == apply_template(theirs[part], document)
    assert ours["metric_list"] == theirs["metric_list"]
    assert ours["output_type"] == theirs["output_type"]


@pytest.mark.shared_data
def test_a_task_of_ones_own_with_local_data(
    lm_eval: Any, offline: None, writer: LoadedModel, shared_data: Path, tmp_path: Path
) -> None:
    lines = (shared_data / "lambada" / "lambada_test.jsonl").read_text().splitlines()[:3]
    data = tmp_path / "three.jsonl"
    data.write_text("\n".join(lines) + "\n")
    task = lambada_task(data) | {"task": "three_passages"}
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "three.yaml").write_text(yaml.safe_dump(task))
    own = run_harness(writer, ["three_passages"], include_path=folder, limit=2)
    same = run_harness(writer, [], lambada=data, limit=2)
    assert own["documents"] == {"three_passages": 2}
    key = "perplexity,none"
    assert own["tasks"]["three_passages"][key] == same["tasks"]["lambada_openai"][key]
    assert own["limit"] == 2


def test_a_long_context_loses_its_beginning(lm_eval: Any, writer: LoadedModel) -> None:
    from lm_eval.api.instance import Instance

    def score(context: str, length: int) -> float:
        request = Instance("loglikelihood", {}, (context, " end"), 0)
        model = harness_model(writer, max_length=length)
        [(found, _)] = model.loglikelihood([request], disable_tqdm=True)
        return found

    assert score("x" * 30 + "abcd", 7) == pytest.approx(score("abcd", 7), abs=1e-5)
    assert abs(score("x" * 30 + "abcd", 64) - score("abcd", 64)) > 1e-3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tasks": []}, "no task"),
        ({"tasks": ["x"], "include_path": Path("no-such-folder")}, "is not a folder"),
        ({"tasks": ["x"], "limit": 0}, "limit is 0"),
        ({"tasks": [], "lambada": Path("no-such-file")}, "cannot be read"),
    ],
)
def test_mistakes(
    lm_eval: Any, writer: LoadedModel, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(PHAError, match=expected):
        run_harness(writer, **settings)


@pytest.mark.slow
def test_an_unknown_task_is_named_with_the_nearest(lm_eval: Any, writer: LoadedModel) -> None:
    with pytest.raises(PHAError, match="no task lambada_opena; did you mean lambada_openai"):
        run_harness(writer, ["lambada_opena"])


def test_a_task_without_its_data_is_one_line(
    lm_eval: Any, writer: LoadedModel, passages: Path, tmp_path: Path
) -> None:
    task = lambada_task(passages) | {"task": "lost"}
    task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "gone.jsonl")}}
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(PHAError, match=r"task lost cannot be loaded \(FileNotFoundError") as caught:
        run_harness(writer, ["lost"], include_path=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [{"max_length": 0}, {"batch_size": 0}])
def test_impossible_sizes(lm_eval: Any, writer: LoadedModel, sizes: dict[str, int]) -> None:
    with pytest.raises(PHAError, match="at least 1"):
        harness_model(writer, **sizes)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        ("{", "line 1, is no JSON object"),
        ('{"text": "a b"}\n\n["text"]', "line 3, is no JSON object"),
        ('{"words": "a b"}', "with a field text"),
        ('{"text": "alone"}', "fewer than two words"),
        ('{"text": 3}', "fewer than two words"),
    ],
)
def test_bad_lambada_files(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(PHAError, match=expected):
        lambada_task(path)


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pha.evals.harness.find_spec", lambda name: None)
    with pytest.raises(PHAError, match=r"pip install 'pha\[harness\]'"):
        require_harness()
