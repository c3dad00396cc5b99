"""Training on longer sequences: which stages, on what, and what is said of the model after it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pha.data import TokenStore, prepare
from pha.data.sampler import DocumentSampler, windows_in_documents
from pha.loading import load_model
from pha.modeling import PHAConfig
from pha.runs import RunFolder
from pha.train.extend import (
    Extension,
    current_base,
    extended_base,
    lengths_of_stages,
    plan_extension,
    train_stages,
)
from pha.train.gates import judge
from pha.train.recipes import load_recipe
from pha.utils.errors import PHAError, TrainingInterruptedError
from tests.conftest import synthetic_text
from tests.train.conftest import Train
from tests.train.test_runs import assert_same_weights, stop_after

QUIET = {
    "run__evaluate_tokens": 100,
    "run__sample_tokens": 0,
    "run__watch_every": 0,
    "run__evaluations": 1,
}


def plan(run: Path, to: int, **options: Any) -> Extension:
    return plan_extension(run, to, run.parent / "longer", Console(file=io.StringIO()), **options)


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


def test_a_plan_has_what_the_recipe_says(train_small: Train, tmp_path: Path) -> None:
    train_small(run__evaluate_every=8, model__num_hidden_layers=1, **QUIET)
    found = plan(tmp_path / "run", 200, share=0.5, length_scaling=True)
    rate = load_recipe(str(tmp_path / "run/config.yaml")).optimizer.learning_rate
    assert found.trained == 32
    assert [stage.length for stage in found.stages] == [128, 200]
    assert not (tmp_path / "longer").exists()
    first, second = found.stages
    # 4 x 32 tokens a step as before, where sequences are not longer; half of 8 x 128 in each.
    assert (first.config.run.global_batch, first.config.run.steps) == (1, 4)
    assert (second.config.run.global_batch, second.config.run.steps) == (1, 3)
    assert first.config.run.init_from == str(tmp_path / "run")
    assert second.config.run.init_from == str(first.out) == str(tmp_path / "longer/stage-1")
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
    assert [stage.base for stage in plan(tmp_path / "run", 200, base=3e4).stages] == [3e4, 3e4]


@pytest.fixture
def long_store(tmp_path: Path) -> TokenStore:
    """Documents of 20 to 2,000 bytes or so."""
    for name, documents in (("train", 60), ("valid", 6), ("test", 6)):
        texts = [synthetic_text(1 + 13 * (n % 5), n) for n in range(documents)]
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return prepare(str(tmp_path / "texts"), "bytes", tmp_path / "store")


def test_an_extension_goes_on_after_a_stop(
    train_small: Train, long_store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"data__store": str(long_store.path), "model__num_hidden_layers": 1}
    train_small(run__evaluate_every=8, **text, **QUIET)
    run, console = tmp_path / "run", Console(file=io.StringIO())
    extension = plan(run, 256, share=0.375)
    assert [stage.config.data.long_documents for stage in extension.stages] == [0.5, 0.5]
    assert train_stages(extension, console)
    other = plan_extension(run, 256, tmp_path / "cut", console, share=0.375)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(TrainingInterruptedError):
            train_stages(other, console)
    assert not RunFolder(other.stages[0].out).result.is_file()
    assert train_stages(other, console)
    assert_same_weights(*(RunFolder(each.stages[-1].out).model for each in (extension, other)))
    shape = load_model(extension.stages[-1].out).pha.config
    assert shape.trained_length == shape.longest_trained == 256
    assert shape.rope_theta == extension.stages[-1].base
    assert load_model(run).pha.config.trained_length is None
    # All that it was trained on counts: 8 steps of 128 tokens, then 3 of 128 and 2 of 256.
    again = plan(extension.stages[-1].out, 300, share=1.0)
    assert again.stages[0].tokens == 300 * round((8 + 3 + 4) * 128 / 300)
    verdict = judge(extension)
    before, after = verdict.losses["before"], verdict.losses["after"]
    assert list(before) == list(after) == [32, 256]
    assert all(0 < loss < math.log(300) for loss in (*before.values(), *after.values()))
    old, new, needles = verdict.gates
    assert (old.value, old.limit) == (after[32], pytest.approx(1.005 * before[32]))
    assert (new.value, new.limit) == (after[256], after[32])
    assert old.passed == (after[32] <= 1.005 * before[32])
    assert new.passed == (after[256] <= after[32])
    # Bytes are no words.
    assert needles.passed is None
    assert "words" in needles.words
    assert not verdict.passed
    [panel] = verdict.readings["after"][0].panels
    total = sum(sum(point.sums) for point in panel.points)
    assert total / sum(point.tokens for point in panel.points) == pytest.approx(after[256])
