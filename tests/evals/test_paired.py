"""Two models on the same tokens: symmetry, exact zeros, and where differences are found."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pha.data import TokenStore
from pha.data.tokenizer import load_tokenizer
from pha.evals.compare import mean_interval
from pha.evals.losses import token_losses
from pha.evals.paired import PairedComparison, compare_models
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.loading import LoadedModel
from pha.utils.errors import PHAError
from tests.modeling.common import scrambled, small_config

PROTOCOL = Protocol(32, 32)


@pytest.fixture(scope="module")
def other() -> LoadedModel:
    """Another model of bytes: the writer's shape with attention alone."""
    torch.manual_seed(5)
    config = small_config(vocab_size=257, branches=["attention"])
    return LoadedModel(Path("other"), scrambled(config), load_tokenizer("bytes"), None)


@pytest.fixture(scope="module")
def result(writer: LoadedModel, other: LoadedModel, store: TokenStore) -> PairedComparison:
    return compare_models(writer, other, store, "test", PROTOCOL, block=64)


def test_figures_are_those_of_each_model(
    result: PairedComparison, writer: LoadedModel, other: LoadedModel, store: TokenStore
) -> None:
    for loaded, found in zip((writer, other), result.evaluations, strict=True):
        expected = evaluate(loaded.model, store, sequence_length=32)
        assert dataclasses.replace(found, seconds=0, loss=0) == dataclasses.replace(
            expected,
            seconds=0,
            loss=0,
            perplexity=pytest.approx(expected.perplexity),
            word_perplexity=pytest.approx(expected.word_perplexity),
            byte_perplexity=pytest.approx(expected.byte_perplexity),
            bits_per_byte=pytest.approx(expected.bits_per_byte),
        )
    gap = result.evaluations[0].loss - result.evaluations[1].loss
    assert result.difference.mean == pytest.approx(gap, abs=1e-9)
    ratio = result.evaluations[0].perplexity / result.evaluations[1].perplexity
    assert result.perplexity_ratio[0] == pytest.approx(ratio)
    assert result.perplexity_ratio[1] < ratio < result.perplexity_ratio[2]


def test_interval_is_that_of_the_losses(
    result: PairedComparison, writer: LoadedModel, other: LoadedModel, store: TokenStore
) -> None:
    a, b = (token_losses(m.model, store, "test", PROTOCOL).nats for m in (writer, other))
    difference = a.astype(np.float64) - b
    parts = np.split(difference, range(64, len(difference) - 32, 64))
    sums = np.array([part.sum() for part in parts])
    expected = mean_interval(sums, np.array([len(part) for part in parts]))
    assert result.difference.blocks == expected.blocks == len(result.block_differences)
    assert result.difference.half_width == pytest.approx(expected.half_width)
    lower, higher = result.blocks_better
    assert (lower, higher) == pytest.approx(((sums < 0).mean(), (sums > 0).mean()))


def test_swapping_the_models_mirrors_everything(
    result: PairedComparison, writer: LoadedModel, other: LoadedModel, store: TokenStore
) -> None:
    back = compare_models(other, writer, store, "test", PROTOCOL, block=64)
    assert back.difference.mean == -result.difference.mean
    assert back.difference.half_width == result.difference.half_width
    assert back.bootstrap == pytest.approx((-result.bootstrap[1], -result.bootstrap[0]))
    assert back.blocks_better == result.blocks_better[::-1]
    assert back.evaluations[0].loss == result.evaluations[1].loss
    for name, bins in result.breakdowns.items():
        for one, two in zip(bins, back.breakdowns[name], strict=True):
            assert (one.label, one.share) == (two.label, two.share)
            assert one.difference.mean == -two.difference.mean
    swap = {"A": "B", "B": "A"}
    mirrored = {(swap[p.better], p.first_token, p.excerpt) for p in back.passages}
    assert {(p.better, p.first_token, p.excerpt) for p in result.passages} == mirrored


def test_a_model_against_itself_is_exactly_zero(writer: LoadedModel, store: TokenStore) -> None:
    same = compare_models(writer, writer, store, "test", PROTOCOL, block=64)
    assert same.identical
    assert (same.difference.mean, same.difference.half_width) == (0, 0)
    assert same.bootstrap == (0, 0)
    assert same.perplexity_ratio == (1, 1, 1)
    assert same.passages == []
    assert same.caution() is None
    assert all(b.difference.mean == 0 for bins in same.breakdowns.values() for b in bins)
    assert same.verdict().startswith("A and B do not differ")


def test_bins_hold_every_token(result: PairedComparison, store: TokenStore) -> None:
    names = ["context (tokens)", "token rank (train split)", "token in its context"]
    assert list(result.breakdowns) == names
    for bins in result.breakdowns.values():
        assert sum(b.difference.tokens for b in bins) == store.counts("test").tokens - 1
        total = math.fsum(b.share * b.difference.mean for b in bins)
        assert total == pytest.approx(result.difference.mean, abs=1e-9)


def test_passages_are_where_the_text_says(result: PairedComparison, store: TokenStore) -> None:
    assert {p.better for p in result.passages} <= {"A", "B"}
    assert result.passages
    tokens = store.tokens("test")
    for passage in result.passages:
        sign = -1 if passage.better == "A" else 1
        assert sign * passage.difference > 0
        assert sign * passage.excerpt_difference >= sign * passage.difference - 1e-9
        last = passage.first_token + passage.tokens
        text = bytes(tokens[passage.first_token : last].tolist()).decode()
        assert passage.excerpt in text
        assert passage.excerpt
    for name, sign in (("A", 1), ("B", -1)):
        gaps = [sign * p.difference for p in result.passages if p.better == name]
        assert gaps == sorted(gaps)


def with_interval(result: PairedComparison, mean: float, width: float) -> PairedComparison:
    interval = dataclasses.replace(result.difference, mean=mean, half_width=width)
    a, b = result.evaluations
    shown = dataclasses.replace(a, perplexity=58.5), dataclasses.replace(b, perplexity=60.3)
    return dataclasses.replace(result, difference=interval, evaluations=shown)


def test_the_verdict_in_words(result: PairedComparison) -> None:
    assert with_interval(result, -0.0312, 0.0061).verdict() == (
        "A is better by 0.0312 ± 0.0061 nats per token (95%); perplexity 58.50 against 60.30"
    )
    assert with_interval(result, 0.31, 0.12).verdict() == (
        "B is better by 0.31 ± 0.12 nats per token (95%); perplexity 60.30 against 58.50"
    )
    assert with_interval(result, -0.0012, 0.0061).verdict() == (
        "the data do not decide: the loss of A less that of B is -0.0012 ± 0.0061 nats per token "
        "(95%); perplexity 58.50 against 60.30"
    )


def test_alike_blocks_are_cautioned_against(result: PairedComparison) -> None:
    drift = dataclasses.replace(result, block_differences=np.linspace(-1, 1, 40))
    caution = drift.caution()
    assert caution is not None
    assert "correlation 0.9" in caution
    steady = np.random.default_rng(0).standard_normal(4000)
    assert dataclasses.replace(result, block_differences=steady).caution() is None


def test_what_cannot_be_compared(
    writer: LoadedModel, other: LoadedModel, store: TokenStore, text_folder: Path
) -> None:
    with pytest.raises(PHAError, match=r"blocks of 2,048, and an interval needs 20.*--block"):
        compare_models(writer, other, store, "test", PROTOCOL)
    corpus = [(text_folder / "train.txt").read_text(encoding="utf-8")]
    strange = dataclasses.replace(other, tokenizer=load_tokenizer("bpe:280", corpus))
    with pytest.raises(PHAError, match="have different tokenizers"):
        compare_models(writer, strange, store, "test", PROTOCOL, block=64)
    with pytest.raises(PHAError, match="prepare a store with the model's tokenizer"):
        compare_models(strange, strange, store, "test", PROTOCOL, block=64)
    broken = scrambled(small_config(vocab_size=257))
    with torch.no_grad():
        broken.model.embed_tokens.weight[101] = math.nan
    with pytest.raises(PHAError, match="other has losses that are not finite"):
        compare_models(
            writer, dataclasses.replace(other, model=broken), store, "test", PROTOCOL, block=64
        )
