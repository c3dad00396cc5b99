"""Statistics of paired losses: against scipy, against loops, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import signal, stats

from pha.evals.compare import (
    MIN_BLOCKS,
    Bins,
    are_alike,
    block_numbers,
    block_sums,
    bootstrap_interval,
    break_down,
    choose_block,
    context_bins,
    frequency_bins,
    mean_interval,
    neighbour_correlation,
    previous_occurrences,
    recall_bins,
    require_blocks,
    steepest,
)
from pha.utils.errors import PHAError


def noise(rng: np.random.Generator, tokens: int, memory: float) -> np.ndarray:
    """A stationary autoregression of unit variance and correlation memory**lag."""
    steps = rng.standard_normal(tokens) * math.sqrt(1 - memory**2)
    start = rng.standard_normal(1) * memory
    return signal.lfilter([1.0], [1.0, -memory], steps, zi=start)[0]


def interval_of(values: np.ndarray, size: int):
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
    assert choose_block(short, 256) == 2048
    long = noise(rng, tokens, 0.9998)
    size = choose_block(long, 256)
    assert size > 2048
    assert tokens // size >= MIN_BLOCKS
    widths = [interval_of(long, block).half_width for block in (2048, size)]
    assert widths[1] > 1.5 * widths[0]


def test_whole_windows_make_a_block() -> None:
    flat = np.zeros(100_000)
    assert choose_block(flat, 1024) == 2048
    assert choose_block(flat, 1000) == 3000
    assert choose_block(flat, 3000) == 3000
    assert choose_block(flat, 256, 100) == 100


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
        require_blocks(tokens, size)
    with pytest.raises(PHAError, match=expected):
        choose_block(np.zeros(tokens), 1, size)


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
    assert low == pytest.approx(interval.low, abs=0.1 * interval.half_width)
    assert high == pytest.approx(interval.high, abs=0.1 * interval.half_width)
    assert bootstrap_interval(sums, counts) == (low, high)
    assert bootstrap_interval(-sums, counts) == pytest.approx((-high, -low), rel=1e-9)


def test_no_difference_is_exactly_nothing() -> None:
    sums, counts = block_sums(np.zeros(1000), block_numbers(1000, 40))
    interval = mean_interval(sums, counts)
    assert (interval.mean, interval.half_width, interval.sign) == (0, 0, 0)
    assert bootstrap_interval(sums, counts) == (0, 0)


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


def test_context_bins_are_equal_and_complete() -> None:
    lengths = np.arange(1, 257)
    bins = context_bins(lengths, 256)
    assert bins.labels[0] == "1–32"
    assert bins.labels[-1] == "225–256"
    assert np.bincount(bins.index).tolist() == [32] * 8
    few = context_bins(np.arange(1, 4), 3)
    assert list(few.labels) == ["1", "2", "3"]
    assert few.index.tolist() == [0, 1, 2]
    odd = context_bins(np.arange(1, 14), 13)
    assert sum(np.bincount(odd.index)) == 13
    for length, number in zip(range(1, 14), odd.index, strict=True):
        first, _, last = odd.labels[number].partition("–")
        assert int(first) <= length <= int(last or first)


def test_frequency_bins_are_ranks() -> None:
    counts = np.zeros(300, dtype=np.int64)
    order = np.random.default_rng(8).permutation(300)[:150]
    counts[order] = np.arange(1000, 850, -1)
    bins = frequency_bins(np.arange(300), counts, "train")
    assert list(bins.labels) == ["1–10", "11–100", "101–150", "not in it"]
    for rank, token in enumerate(order, start=1):
        assert bins.index[token] == (0 if rank <= 10 else 1 if rank <= 100 else 2)
    assert (bins.index[counts == 0] == 3).all()


def test_previous_occurrences_and_recall_by_loops() -> None:
    rng = np.random.default_rng(9)
    tokens = rng.integers(0, 120, 2000).astype(np.uint16)
    expected = [
        max((j for j in range(i) if tokens[j] == tokens[i]), default=-1) for i in range(400)
    ]
    assert previous_occurrences(tokens)[:400].tolist() == expected
    contexts = np.arange(1999) // 150 * 150
    bins = recall_bins(tokens, contexts)
    for entry, target in enumerate(range(1, 2000)):
        seen = tokens[contexts[entry] : target].tolist()[::-1]
        back = seen.index(tokens[target]) + 1 if tokens[target] in seen else 0
        assert bins.index[entry] == (0 if back == 0 else 1 if back <= 64 else 2)
    assert set(bins.index.tolist()) == {0, 1, 2}


def test_steepest_stretch_by_a_loop() -> None:
    values = np.random.default_rng(10).standard_normal(200)
    sums = [values[i : i + 16].sum() for i in range(185)]
    assert steepest(values, 16) == int(np.argmax(sums))
    assert steepest(values[:5], 16) == 0
