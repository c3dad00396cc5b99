"""Training on longer sequences: which stages, on what, and what is said of the model after it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pha.commands.extension import extend
from pha.data import TokenStore, prepare
from pha.data.sampler import DocumentSampler, windows_in_documents
from pha.loading import load_model
from pha.modeling import PHAConfig
from pha.train.extend import (
    Extension,
    current_base,
    extended_base,
    lengths_of_stages,
    plan_extension,
    train_stages,
)
from pha.train.recipes import load_recipe
from pha.train.run import run_training
from pha.utils.errors import PHAError, TrainingInterruptedError
from tests.conftest import synthetic_text
from tests.train.conftest import arguments
from tests.train.test_runs import assert_same_weights, stop_after

CONSOLE = Console(file=io.StringIO())
QUIET = {
    "run__evaluate_every": "null",
    "run__evaluate_tokens": 100,
    "run__sample_tokens": 0,
    "run__watch_every": 0,
    "run__evaluations": 1,
}


def plan(run: Path, to: int, **options: Any) -> Extension:
    return plan_extension(run, to, run.parent / "longer", CONSOLE, **options)


@pytest.mark.parametrize(
    ("trained", "to", "lengths"),
    [
        (256, 300, [300]),
        (256, 1024, [1024]),
        (256, 1025, [1024, 1025]),
        (512, 16384, [2048, 8192, 16384]),
    ],
)
def test_a_stage_is_at_most_four_times_as_long(trained: int, to: int, lengths: list[int]) -> None:
    assert lengths_of_stages(trained, to) == lengths


def test_the_base_is_the_largest_of_three() -> None:
    # 10,000 x 4^(24/22), with 4^(12/11) = 2^(24/11) = 4.5372.
    assert extended_base(1e4, 24, 256, 1024) == pytest.approx(45372, rel=1e-4)
    # At 4,096 tokens: 0.0424 x 2^(12 x 1.628) = 0.0424 x 761,200, far above 100 x 4^(12/11).
    assert extended_base(100.0, 24, 1024, 4096) == pytest.approx(0.0424 * 2**19.536)
    # No head has a pair that turns slower than the first.
    assert extended_base(1e6, 2, 256, 1024) == 1e6


def test_bases_matter_where_positions_are_rotary_and_seen_from_afar() -> None:
    def base(**fields: Any) -> float | None:
        return current_base(PHAConfig.from_preset("pha-tiny", **fields))

    assert base(rope_theta=500.0) == 500.0
    assert base(attention_window=64) is None
    assert base(branch_options={"attention": {"positions": "none"}}) is None
    assert base(branches=["gss", "aux_ffn"]) is None
    layers = [[{"attention": {"window": 16}}], [{"attention": {"theta": 7e4}}]]
    assert base(layer_pattern=layers) == 7e4


def test_windows_in_documents_hold_their_targets_too() -> None:
    found = windows_in_documents(np.array([0, 9, 10, 14]), 27, 4)
    # 9 tokens have two windows, 1 and 4 tokens none, 13 three.
    assert found.tolist() == [0, 4, 14, 18, 22]
    assert windows_in_documents(np.array([0, 4, 8]), 12, 4).tolist() == []


def test_a_share_of_the_rows_lies_in_long_documents() -> None:
    starts = np.array([0, 3, 6, 27, 29, 33])  # only [6, 27) and [33, 61) have 11 tokens

    def sampler(seed: int = 1, share: float = 0.5) -> DocumentSampler:
        return DocumentSampler(np.arange(61), 10, 3, seed, documents=starts, share=share)

    rows = np.stack([sampler().batch(step).inputs[:, 0].numpy() for step in range(8)])
    long = np.isin(rows, [6, 16, 33, 43])
    assert long.sum(1).tolist() == [1, 2, 1, 2, 1, 2, 1, 2]
    drawn = rows[long].reshape(3, 4)  # rounds of all four windows, each in an order of its own
    assert all(sorted(each) == [6, 16, 33, 43] for each in drawn.tolist())
    assert len({tuple(each) for each in drawn.tolist()}) > 1
    used = sampler()
    used.batch(7), used.batch(0)
    assert used.batch(5, 1, 3).inputs.equal(sampler().batch(5).inputs[1:3])
    assert sampler(share=1.0).batch(3).inputs[:, 0].tolist() != rows[3].tolist()
    with pytest.raises(PHAError, match="no document has more than 30 tokens"):
        DocumentSampler(np.arange(61), 30, 1, 0, documents=starts, share=0.5)


@pytest.fixture(scope="module")
def short(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps of 4 sequences of 32 tokens."""
    words = arguments(store, run__epochs="null", model__num_hidden_layers=1, **QUIET)
    out = tmp_path_factory.mktemp("extend") / "run"
    run_training(load_recipe("pha-tiny.text", words), out, CONSOLE)
    return out


def test_a_plan_has_what_the_recipe_says(short: Path) -> None:
    found = plan(short, 200, share=0.5, length_scaling=True)
    rate = load_recipe(str(short / "config.yaml")).optimizer.learning_rate
    assert found.trained == 32
    assert [stage.length for stage in found.stages] == [128, 200]
    assert not (short.parent / "longer").exists()
    first, second = found.stages
    # 4 x 32 tokens a step as before, where sequences are not longer; half of 8 x 128 in each.
    assert (first.config.run.global_batch, first.config.run.steps) == (1, 4)
    assert (second.config.run.global_batch, second.config.run.steps) == (1, 3)
    assert first.config.run.init_from == str(short)
    assert second.config.run.init_from == str(first.out) == str(short.parent / "longer/stage-1")
    bases = [1e4 * 4 ** (8 / 6), 1e4 * (200 / 32) ** (8 / 6)]
    for stage, base in zip(found.stages, bases, strict=True):
        assert stage.base == pytest.approx(base)
        assert stage.config.run.init_attention == {"theta": stage.base, "length_scaling": 32}
        assert stage.config.optimizer.learning_rate == pytest.approx(0.2 * rate)
        assert (stage.config.data.carry, stage.config.data.carry_share) == ("states", 0.5)
        assert stage.config.schedule.floor == 0.0
    assert found.notes == [
        f"{n} tokens: plain windows of the text, which has no documents of more tokens"
        for n in (128, 200)
    ]
    assert [stage.base for stage in plan(short, 200, base=3e4).stages] == [3e4, 3e4]


@pytest.fixture
def long_store(tmp_path: Path) -> TokenStore:
    """Documents of 20 to 2,000 bytes or so."""
    for name, documents in (("train", 60), ("valid", 6), ("test", 6)):
        texts = [synthetic_text(1 + 13 * (n % 5), n) for n in range(documents)]
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return prepare(str(tmp_path / "texts"), "bytes", tmp_path / "store")


def test_an_extension_is_trained_judged_and_told(
    short: Path, long_store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    extend(short, out=whole, to=256, data=long_store.path, share=0.375, json=True)
    record = json.loads(capsys.readouterr().out)
    assert json.loads((whole / "extend.json").read_text(encoding="utf-8")) == record
    assert (whole / "extend.png").is_file()
    assert [stage["long_documents"] for stage in record["stages"]] == [0.5, 0.5]

    shape = load_model(whole / "stage-2").pha.config
    assert shape.trained_length == shape.longest_trained == 256
    assert shape.rope_theta == record["stages"][1]["base"]
    assert load_model(short).pha.config.trained_length is None
    # All that it was trained on counts: 8 steps of 128 tokens, then 3 of 128 and 3 of 128 or 256.
    tokens = 8 * 128 + sum(stage["tokens"] for stage in record["stages"])
    assert plan(whole / "stage-2", 300, share=1.0).stages[0].tokens == 300 * round(tokens / 300)

    before, after = record["losses"]["before"], record["losses"]["after"]
    assert list(before) == list(after) == ["32", "256"]
    old, new, needles = record["gates"]
    assert (old["value"], old["limit"]) == (after["32"], pytest.approx(1.005 * before["32"]))
    assert (new["value"], new["limit"]) == (after["256"], after["32"])
    assert old["passed"] == (after["32"] <= 1.005 * before["32"])
    assert new["passed"] == (after["256"] <= after["32"])
    assert needles["passed"] is None
    assert "words" in needles["words"]  # which bytes are not
    assert record["passed"] is False
    octaves = record["by_position"][0]["means"]["after"].values()
    total = sum(each["mean"] * each["tokens"] for each in octaves)
    assert total / sum(each["tokens"] for each in octaves) == pytest.approx(after["256"])


@pytest.mark.slow
def test_an_extension_goes_on_after_a_stop(
    short: Path, long_store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (
        plan_extension(short, 256, tmp_path / name, CONSOLE, data=long_store.path, share=0.375)
        for name in ("whole", "cut")
    )
    assert train_stages(whole, CONSOLE)
    for stage in (0, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(TrainingInterruptedError):
                train_stages(cut, CONSOLE)
        assert (cut.stages[0].out / "result.json").exists() == (stage == 1)
        assert not (cut.stages[1].out / "result.json").exists()
    assert train_stages(cut, CONSOLE)
    for one, other in zip(whole.stages, cut.stages, strict=True):
        assert_same_weights(one.out / "model", other.out / "model")


def test_what_cannot_be_extended_is_said_in_a_line(
    short: Path, store: TokenStore, text_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(short / "model", model)
    other = prepare(str(text_folder), "bpe:290", tmp_path / "other")
    refusals: list[tuple[Path, int, dict[str, Any], str]] = [
        (short, 32, {}, "--to 32: .* was trained on 32 tokens; give more"),
        (short, 10**6, {}, "--to 1000000: the test split of .* has .* tokens after the first"),
        (short, 64, {"share": 0.0}, "--share 0: above 0"),
        (short, 64, {"base": -1.0}, "--base -1: a number above 0, or auto"),
        (short, 64, {"data": tmp_path}, "is not a token store"),
        (short, 64, {"data": other.path}, "was made with the tokenizer bpe:290"),
        (model, 64, {}, "is no run, whose settings this needs"),
        (Path("hf:gpt2"), 64, {}, "is a model of transformers"),
        (tmp_path / "none", 64, {}, "does not exist"),
    ]
    for run, to, options, expected in refusals:
        with pytest.raises(PHAError, match=expected):
            plan(run, to, **options)
    with pytest.raises(PHAError, match="--base ten: write a number, or auto"):
        extend(short, to=64, base="ten", out=tmp_path / "new")
    config = short / "config.yaml"
    kept = config.read_text(encoding="utf-8")
    try:
        config.write_text(kept.replace(str(store.path), str(tmp_path / "gone")), encoding="utf-8")
        with pytest.raises(PHAError, match="are not here; give --data"):
            extend(short, to=64, out=tmp_path / "new")
    finally:
        config.write_text(kept, encoding="utf-8")
    assert not (tmp_path / "new").exists()
    assert not (short.parent / "longer").exists()
