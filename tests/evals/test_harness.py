"""The harness's loglikelihoods against ours, and a task on a local file.

Skipped without lm_eval; run them after `pip install -c constraints.txt -e '.[dev,harness]'`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pha.cli import main
from pha.data import TokenStore
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.loading import LoadedModel
from pha.sharing.serving import harness_command

SHARING = Path(__file__).parents[2] / "docs" / "sharing.md"
LINES = ["a cat sat on the mat", "one two three four", 'she said "no" to Ann', "\u00e9 is a letter"]


@pytest.fixture
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def saved(writer: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "a, b=c"  # what lm_eval splits its words at
    writer.model.save_pretrained(folder)
    writer.tokenizer.save_pretrained(folder)
    return folder


def rolling(
    loaded: LoadedModel, text: str, length: int, batch_size: int = 1, prefix: int | None = None
) -> float:
    """The harness's log-likelihood of a whole text, in nats."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(loaded.model, tokenizer=loaded.tokenizer, max_length=length, batch_size=batch_size)
    model.custom_prefix_token_id = prefix
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    [result] = model.loglikelihood_rolling([request], disable_tqdm=True)
    return result


def nats(loaded: LoadedModel, tokens: list[int], count: int) -> list[float]:
    """Log-probabilities of the last `count` tokens, each given all before it."""
    with torch.no_grad():
        log = loaded.model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
    return log.gather(-1, torch.tensor(tokens[1:])[:, None])[-count:, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rolling_loglikelihood_is_that_of_our_evaluation(
    lm_eval: Any, writer: LoadedModel, store: TokenStore, batch_size: int
) -> None:
    length, count = 16, 5
    tokens = store.tokens("test")[: length * count + 1].tolist()
    ours = evaluate(
        writer.model, store, "test", Protocol(length, length), max_tokens=length * count
    )
    # The first token is context in ours; in the harness a token put before the text is.
    text = writer.tokenizer.decode(tokens[1:])
    theirs = rolling(writer, text, length, batch_size, tokens[0])
    assert -theirs / (length * count) == pytest.approx(ours.loss, rel=1e-6)


def test_the_last_window_of_the_harness_is_as_long_as_the_others(
    lm_eval: Any, writer: LoadedModel
) -> None:
    text, length = "counting one two three four five and six", 16
    ids = [writer.tokenizer.eos_token_id, *writer.tokenizer(text)["input_ids"]]
    whole = nats(writer, ids[:17], 16) + nats(writer, ids[16:33], 16)
    expected = sum(whole + nats(writer, ids[-17:], 8))
    assert rolling(writer, text, length) == pytest.approx(expected, rel=1e-6)
    assert abs(sum(whole + nats(writer, ids[-9:], 8)) - expected) > 0.01


@pytest.mark.slow
def test_the_task_of_the_docs_agrees_with_a_count_by_hand(
    lm_eval: Any,
    writer: LoadedModel,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    [task] = re.findall(r"```yaml\n(task: lambada_local\n.*?)```", SHARING.read_text(), re.DOTALL)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "lambada_local.yaml").write_text(task)
    lines = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    (tmp_path / "lambada_test.jsonl").write_text(lines)
    words = ["--tasks", "lambada_local", "--include_path", "tasks", "--output_path", "out"]
    main(["harness", str(saved), *words, "--batch_size", "3"])
    assert "lambada_local" in capsys.readouterr().out
    [path] = (tmp_path / "out").rglob("results*.json")
    record = json.loads(path.read_text())
    totals, hits = [], []
    for line in LINES:
        ids = writer.tokenizer(line)["input_ids"]
        start = len(writer.tokenizer(line.rpartition(" ")[0])["input_ids"])
        totals.append(sum(nats(writer, ids, len(ids) - start)))
        best = writer.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        hits.append(best[start - 1 : -1] == ids[start:])
    scores = record["results"]["lambada_local"]
    assert scores["perplexity,none"] == pytest.approx(math.exp(-np.mean(totals)), rel=1e-5)
    assert scores["acc,none"] == np.mean(hits)
    assert record["config"]["model_args"]["max_length"] == 1024

    # It cuts texts as the harness's own task does.
    from lm_eval.utils import apply_template

    folder = Path(lm_eval.__file__).parent / "tasks" / "lambada"
    theirs, ours = (
        yaml.safe_load((folder / "lambada_openai.yaml").read_text()),
        yaml.safe_load(task),
    )
    for part in ("doc_to_text", "doc_to_target"):
        for line in LINES:
            assert apply_template(ours[part], {"text": line}) == apply_template(
                theirs[part], {"text": line}
            )
    assert ours["metric_list"] == theirs["metric_list"]
    assert ours["output_type"] == theirs["output_type"]


def test_the_command_names_model_and_length(saved: Path) -> None:
    *start, ours, last = harness_command(saved, ["--limit=2"])
    assert start == ["lm_eval", "run", "--model", "hf", "--model_args"]
    assert json.loads(ours)["pretrained"] == str(saved)
    assert json.loads(ours)["max_length"] == 1024  # of a configuration that says nothing else
    assert last == "--limit=2"


def test_the_length_is_that_of_training(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    content = "data: {sequence_length: 48, packed_documents: false}\n"
    (tmp_path / "config.yaml").write_text(content)
    assert json.loads(harness_command(tmp_path, [])[5])["max_length"] == 48
    config = json.loads((saved / "config.json").read_text()) | {"max_position_embeddings": 96}
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert json.loads(harness_command(tmp_path / "model", [])[5])["max_length"] == 96
