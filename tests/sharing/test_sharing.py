"""The model card against the run it is of, and the folder it goes into."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from pha.data.tokenizer import load_tokenizer
from pha.loading import load_model
from pha.modeling import PHAConfig
from pha.runs import RunFolder
from pha.sharing import export_model
from pha.sharing.card import model_card
from pha.utils.errors import PHAError
from tests.modeling.common import FLOAT32_PARAMETERS, scrambled, small_config
from tests.report.conftest import MakeRun

KINDS = ["perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "accuracy"]


def save_model(folder: Path, seed: int = 0) -> None:
    model = scrambled(small_config(vocab_size=257), seed)
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)


def card_of(run: Path | None, name: str = "pha-small", **settings: Any) -> ModelCard:
    folder = None if run is None else RunFolder(run)
    result = folder.read_result() if folder and folder.result.is_file() else None
    return model_card(
        name, small_config(), result, folder.read_config() if folder else {}, **settings
    )


def header(card: ModelCard) -> dict[str, Any]:
    _, text, _ = card.content.split("---\n", 2)
    return yaml.safe_load(text)


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    folder = make_run("pha")
    save_model(folder / "model")
    return folder


def test_header_holds_every_metric_with_its_protocol(make_run: MakeRun) -> None:
    run = make_run("pha")
    [evaluation] = json.loads((run / "result.json").read_text())["evaluations"]
    found = header(card_of(run, license_id="apache-2.0", datasets=["me/texts"]))
    assert found["library_name"] == "pha"
    assert found["pipeline_tag"] == "text-generation"
    assert found["license"] == "apache-2.0"
    assert found["datasets"] == ["me/texts"]
    [index] = found["model-index"]
    assert index["name"] == "pha-small"
    [result] = index["results"]
    assert result["task"]["type"] == "text-generation"
    assert result["dataset"]["split"] == "test"
    assert result["dataset"]["type"] == "me/texts"
    assert result["dataset"]["name"] == "source text of the Python standard library"
    assert [m["type"] for m in result["metrics"]] == KINDS
    for metric in result["metrics"]:
        assert metric["value"] == evaluation[metric["type"]]
        assert "non-overlapping windows of 256 tokens" in metric["name"]
        assert "286,220 tokens scored" in metric["name"]


def test_body_tells_how_to_load_and_to_repeat(make_run: MakeRun) -> None:
    run = make_run("pha")
    result = json.loads((run / "result.json").read_text())
    text = card_of(run).text
    for fact in (
        "import pha",
        "trust_remote_code=True",
        'folder = "pha-small"',
        f"| tokens seen | {result['tokens_seen']:,} |",
        "| seed | 1234 |",
        "| hardware | cpu |",
        f"| commit | {result['provenance']['git_commit']} |",
        f"| SHA-256 of the tokens | {result['data']['sha256']} |",
        "torch 2.13.0",
        "a gated state space, attention and a feed-forward network in parallel",
        f"| perplexity per token | {result['evaluations'][0]['perplexity']:.2f} |",
    ):
        assert fact in text
    assert "without" not in text
    assert "rounded" not in text
    assert "rounded to bf16" in card_of(run, weights="bf16").text


def test_several_evaluations_and_values_that_are_no_numbers(make_run: MakeRun) -> None:
    def change(result: dict[str, Any]) -> None:
        first = result["evaluations"][0]
        first["word_perplexity"] = float("inf")
        sliding = first["protocol"] | {"stride": 64, "windows": "sliding", "precision": "bf16"}
        result["evaluations"].append(
            first | {"split": "validation", "protocol": sliding, "accuracy": 0.5}
        )
        result["provenance"]["git_dirty"] = True

    card = card_of(make_run("pha", change=change))
    results = header(card)["model-index"][0]["results"]
    assert [r["dataset"]["split"] for r in results] == ["test", "validation"]
    for result in results:
        assert [m["type"] for m in result["metrics"]] == [k for k in KINDS if k[0] != "w"]
    name = results[1]["metrics"][0]["name"]
    assert "sliding windows of 256 tokens, advancing by 64" in name
    assert name.endswith("bf16")
    assert "next-token accuracy | 50.00%" in card.text
    assert "with changes that were not committed" in card.text


def test_strings_from_a_run_stay_in_their_place(make_run: MakeRun) -> None:
    def change(result: dict[str, Any]) -> None:
        result["data"]["description"] = "folder /home/me/my texts | <b>*bold*</b>\n# heading: 'x'"
        result["data"]["tokenizer"] = "gpt2:/home/me/gpt2"
        result["recipe"] = "/home/me/recipes/mine.yaml"

    card = card_of(make_run("pha", change=change), name="a: 'name' --- x")
    assert "/home" not in card.content
    assert header(card)["model-index"][0]["name"] == "a: 'name' --- x"
    text = card.text
    assert "| tokenizer | gpt2:gpt2 |" in text
    assert "| recipe | mine.yaml |" in text
    assert "\n# heading" not in text
    assert "<b>" not in text.replace(r"\<b", "")
    assert r"\| \<b\>\*bold\*" in text


@pytest.mark.parametrize("finished", [True, False])
def test_a_card_without_results_says_why(make_run: MakeRun, finished: bool) -> None:
    run = make_run("pha", finished=finished)
    reason = None if finished else "The run had not finished."
    if finished:
        result = json.loads((run / "result.json").read_text()) | {"evaluations": []}
        (run / "result.json").write_text(json.dumps(result))
    card = card_of(run, no_results=reason)
    assert "model-index" not in header(card)
    assert (reason or "The run measured nothing") in card.text
    assert "perplexity" not in card.text


def test_a_card_of_a_model_alone() -> None:
    card = card_of(None, no_results="Unknown.")
    assert header(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "## Training" not in card.text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"branches": ["attention"]}, "each with attention."),
        ({"branches": ["gss", "attention"], "block": "sequential"}, "attention in turn."),
        ({}, "in parallel, mixed with learned weights."),
        (
            {"branches": ["mehta_gss"], "attention_layers": [1, 7]},
            "each with a gated state space (Mehta et al. 2022), but attention alone in layers 1, 7 "
            "(counted from 0).",
        ),
    ],
)
def test_architecture_in_words(config: dict[str, Any], expected: str) -> None:
    card = model_card("x", PHAConfig(**config), None, {}, no_results="None.")
    assert expected in card.text


def test_an_export_loads_as_the_card_says(run: Path, tmp_path: Path) -> None:
    code = "import json, torch\n"
    dtypes = {"full": torch.float32, "half": torch.bfloat16}
    for folder, dtype in dtypes.items():
        out = tmp_path / folder
        exported = export_model(run, out, dtype=dtype, license_id="apache-2.0")
        assert (exported.results, exported.note) == (1, None)
        for name, weight in load_file(out / "model.safetensors").items():
            kept = name.rpartition(".")[2] in FLOAT32_PARAMETERS
            assert weight.dtype == (torch.float32 if kept else dtype)
        code += ModelCard.load(out / "README.md").text.split("```python\n")[1].split("```")[0]
        code += "logits = model(torch.tensor([[1, 2, 3]])).logits.float().tolist()\n"
        code += "print('\\n' + json.dumps([model.config.eos_token_id, logits]))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[256, ")]
    for (_, logits), dtype in zip(found, dtypes.values(), strict=True):
        ours = load_model(run, dtype=dtype).model(torch.tensor([[1, 2, 3]])).logits.float()
        torch.testing.assert_close(torch.tensor(logits), ours, rtol=0, atol=1e-6)
    again = load_model(out)
    assert again.tokenizer("é")["input_ids"] == [195, 169]
    assert again.model.generation_config.eos_token_id == 256


def test_everybody_may_read_what_the_owner_may(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_results_are_only_those_of_these_weights(run: Path, tmp_path: Path) -> None:
    save_model(run / "checkpoints" / "step-9", seed=1)
    assert export_model(run / "model", tmp_path / "chosen").results == 1
    other = export_model(run / "checkpoints" / "step-9", tmp_path / "other")
    assert other.results == 0
    assert "other weights" in str(other.note)
    assert "| tokens seen |" in (tmp_path / "other" / "README.md").read_text()
    shutil.copytree(run / "model", tmp_path / "alone")
    assert "outside a training run" in str(export_model(tmp_path / "alone", tmp_path / "a").note)
    (run / "result.json").unlink()
    assert "had not finished" in str(export_model(run, tmp_path / "early").note)


def test_nothing_but_an_earlier_export_is_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_model(run, out)
    with pytest.raises(PHAError, match="--force"):
        export_model(run, out)
    export_model(run, out, license_id="mit", force=True)
    assert "license: mit" in (out / "README.md").read_text()
    (out / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(PHAError, match="no earlier export"):
            export_model(run, out, force=force)
        with pytest.raises(PHAError, match="no earlier export"):
            export_model(run, run / "model", force=force)
    assert (out / "notes.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(PHAError, match="is a file"):
        export_model(run, file)


def test_a_failed_export_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pha.modeling.PHAForCausalLM.save_pretrained", full)
    with pytest.raises(PHAError, match="No space left"):
        export_model(run, tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []
