"""Two models on the same tokens: statistics against scipy and by simulation, exact zeros, words."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import signal, stats

from pha.data import TokenStore
from pha.data.tokenizer import load_tokenizer
from pha.evals.compare import (
    MIN_BLOCKS,
    Interval,
    PairedComparison,
    are_alike,
    block_numbers,
    block_sums,
    bootstrap_interval,
    break_down,
    compare_models,
    first_block,
    grown_block,
    mean_interval,
    neighbour_correlation,
)
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.evals.where import Bins
from pha.loading import LoadedModel
from pha.utils.errors import PHAError
from tests.modeling.common import scrambled, small_config

PROTOCOL = Protocol(32, 32)


def noise(rng: np.random.Generator, tokens: int, memory: float) -> np.ndarray:
    """A stationary autoregression of unit variance and correlation memory**lag."""
    steps = rng.standard_normal(tokens) * math.sqrt(1 - memory**2)
    start = rng.standard_normal(1) * memory
    return signal.lfilter([1.0], [1.0, -memory], steps, zi=start)[0]


def interval_of(values: np.ndarray, size: int) -> Interval:
    return mean_interval(*block_sums(values, block_numbers(len(values), size)))


def test_equal_blocks_give_scipys_t_interval() -> None:
    values = np.random.default_rng(0).standard_normal(25 * 40) + 0.1
    found = interval_of(values, 40)
    expected = stats.ttest_1samp(values.reshape(25, 40).mean(1), 0).confidence_interval(0.95)
    assert (found.blocks, found.tokens) == (25, 1000)
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(expected.low, rel=1e-12)
    assert found.high == pytest.approx(expected.high, rel=1e-12)


def test_unequal_blocks_by_hand() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 30, 37)
    blocks = np.repeat(np.arange(37), sizes)
    values = rng.standard_normal(len(blocks))
    found = mean_interval(*block_sums(values, blocks))
    mean = values.mean()
    squares = sum((values[blocks == j] - mean).sum() ** 2 for j in range(37))
    error = math.sqrt(37 / 36 * squares) / len(values)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 36) * error, rel=1e-12)


def test_coverage_where_neighbours_are_alike() -> None:
    """95% intervals hold the true mean about 95% of the time; per-token ones seldom do."""
    rng = np.random.default_rng(2026)
    trials, tokens, size, truth = 600, 40 * 512, 512, 0.03
    held = naive = 0
    for _ in range(trials):
        values = truth + noise(rng, tokens, 0.95)
        interval = interval_of(values, size)
        held += interval.low <= truth <= interval.high
        width = 1.96 * values.std(ddof=1) / math.sqrt(tokens)
        naive += abs(values.mean() - truth) <= width
    # Binomial: 0.95 +- 0.027 is three standard errors of 600 trials.
    assert 0.923 <= held / trials <= 0.977
    # The variance of the mean is (1 + r)/(1 - r) = 39 times that of independent tokens.
    assert naive / trials == pytest.approx(math.erf(1.96 / math.sqrt(39 * 2)), abs=0.06)


def test_blocks_grow_until_they_are_independent() -> None:
    rng = np.random.default_rng(3)
    tokens = 2048 * 400
    short = noise(rng, tokens, 0.9)
    assert grown_block(short, 2048) == 2048
    long = noise(rng, tokens, 0.9998)
    size = grown_block(long, 2048)
    assert size > 2048
    assert tokens // size >= MIN_BLOCKS
    narrow, wide = (interval_of(long, block).half_width for block in (2048, size))
    assert narrow is not None
    assert wide is not None
    assert wide > 1.5 * narrow


def test_whole_windows_make_a_block() -> None:
    for stride, size in ((1024, 2048), (1000, 3000), (3000, 3000)):
        assert first_block(100_000, stride) == size
    assert first_block(100_000, 256, 100) == 100


@pytest.mark.parametrize(
    ("tokens", "size", "expected"),
    [
        (2048 * 19, 2048, "make 19 blocks of 2,048.*20: take more text, or --block 1945"),
        (5, 2048, "5 tokens make 0 blocks.*take more text$"),
        (100, 0, "a block has 0 tokens"),
    ],
)
def test_too_few_blocks_are_refused(tokens: int, size: int, expected: str) -> None:
    with pytest.raises(PHAError, match=expected):
        first_block(tokens, 1, size)


@pytest.mark.parametrize(
    ("tokens", "size", "counts"),
    [(10, 5, [5, 5]), (12, 5, [5, 7]), (13, 5, [5, 5, 3]), (3, 5, [3]), (1, 5, [1])],
)
def test_blocks(tokens: int, size: int, counts: list[int]) -> None:
    assert np.bincount(block_numbers(tokens, size)).tolist() == counts


def test_neighbour_correlation() -> None:
    rng = np.random.default_rng(4)
    values = noise(rng, 20_000, 0.6)
    assert neighbour_correlation(values) == pytest.approx(0.6, abs=0.02)
    assert are_alike(values)
    assert not are_alike(rng.standard_normal(20_000))
    assert neighbour_correlation(np.zeros(30)) == 0


def test_bootstrap_agrees_repeats_and_mirrors() -> None:
    values = np.random.default_rng(5).standard_normal(200 * 30) + 0.2
    sums, counts = block_sums(values, block_numbers(len(values), 30))
    interval = mean_interval(sums, counts)
    low, high = bootstrap_interval(sums, counts)
    assert interval.half_width is not None
    assert low == pytest.approx(interval.low, abs=0.1 * interval.half_width)
    assert high == pytest.approx(interval.high, abs=0.1 * interval.half_width)
    assert bootstrap_interval(sums, counts) == (low, high)
    assert bootstrap_interval(-sums, counts) == pytest.approx((-high, -low), rel=1e-9)


def test_sign_of_an_interval() -> None:
    rng = np.random.default_rng(6)
    values = rng.standard_normal(4000)
    assert interval_of(values - 1, 100).sign == -1
    assert interval_of(values + 1, 100).sign == 1
    assert interval_of(values - values.mean(), 100).sign == 0
    few = interval_of(values + 1, 1000)
    assert (few.half_width, few.sign, few.blocks) == (None, 0, 4)


def test_break_down_by_loops() -> None:
    rng = np.random.default_rng(7)
    a, b = (rng.gamma(2, 1, 6000).astype(np.float32) for _ in range(2))
    index = rng.choice(4, 6000, p=[0.6, 0.3, 0.0999, 0.0001])
    index[index == 3] = 2
    index[:5] = 3  # in one block only
    blocks = block_numbers(6000, 200)
    bins = Bins("kind", ("p", "q", "r", "s", "empty"), index)
    found = break_down(a, b, blocks, bins)
    assert [entry.label for entry in found] == ["p", "q", "r", "s"]
    assert math.fsum(entry.share for entry in found) == pytest.approx(1)
    total = math.fsum(entry.share * entry.difference.mean for entry in found)
    assert total == pytest.approx((a.astype(float) - b).mean(), abs=1e-12)
    for number, entry in enumerate(found):
        here = index == number
        assert entry.loss_a == pytest.approx(a[here].mean(dtype=float))
        assert entry.loss_b == pytest.approx(b[here].mean(dtype=float))
        assert entry.difference.tokens == here.sum()
        assert entry.difference.blocks == len(set(blocks[here].tolist()))
    assert found[3].difference.half_width is None


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
    losses = np.empty((2, store.counts("test").tokens - 1), dtype=np.float32)
    for loaded, nats, found in zip((writer, other), losses, result.evaluations, strict=True):
        expected = evaluate(loaded.model, store, "test", PROTOCOL, losses=nats)
        assert found == dataclasses.replace(expected, seconds=found.seconds)
    gap = result.evaluations[0].loss - result.evaluations[1].loss
    assert result.difference.mean == pytest.approx(gap, abs=1e-9)
    ratio = result.evaluations[0].perplexity / result.evaluations[1].perplexity
    assert result.perplexity_ratio[0] == pytest.approx(ratio)
    assert result.perplexity_ratio[1] < ratio < result.perplexity_ratio[2]
    difference = losses[0].astype(np.float64) - losses[1]
    parts = np.split(difference, range(64, len(difference) - 32, 64))
    sums = np.array([part.sum() for part in parts])
    interval = mean_interval(sums, np.array([len(part) for part in parts]))
    assert result.difference.blocks == interval.blocks == len(result.block_differences)
    assert result.difference.half_width == pytest.approx(interval.half_width)
    assert result.blocks_better == pytest.approx(((sums < 0).mean(), (sums > 0).mean()))


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
    assert (same.difference.mean, same.difference.half_width) == (0, 0)
    assert same.bootstrap == (0, 0)
    assert same.perplexity_ratio == (1, 1, 1)
    assert same.passages == []
    assert same.caution() is None
    assert all(b.difference.mean == 0 for bins in same.breakdowns.values() for b in bins)
    assert same.verdict().startswith("A and B do not differ")


def test_bins_hold_every_token(result: PairedComparison, store: TokenStore) -> None:
    names = ["context (tokens)", "context (octaves)", "token rank (train split)"]
    names += ["token in its context", "repeated n-gram"]
    assert list(result.breakdowns) == names
    for bins in result.breakdowns.values():
        assert sum(b.difference.tokens for b in bins) == store.counts("test").tokens - 1
        total = math.fsum(b.share * b.difference.mean for b in bins)
        assert total == pytest.approx(result.difference.mean, abs=1e-9)


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
