"""Statistics of paired losses: mean differences with intervals, over blocks of running text.

Tokens near each other are easy or hard together, so their differences are correlated, and an
interval that took them for independent would be too narrow. The unit here is a block of
consecutive tokens. With sum S_j of the differences and n_j tokens in block j of k, the mean and its
standard error are those of a ratio estimator (Cochran, Sampling Techniques, 1977, chapter 6):

    m = sum S_j / sum n_j,    se^2 = k/(k-1) sum (S_j - m n_j)^2 / (sum n_j)^2,

with Student's t of k - 1 degrees of freedom. For blocks of equal size this is the ordinary
t interval of the mean of block means; for a kind of token, n_j counts those of the kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pha.utils.errors import PHAError

BLOCK_TOKENS = 2048
MIN_BLOCKS = 20
RECENT_TOKENS = 64
POSITION_BINS = 8
RANK_BOUNDS = (10, 100, 1000, 10_000)

_RESAMPLES = 9999
_BOOTSTRAP_VALUES = 1 << 22  # drawn at a time, 8 bytes each


@dataclass(frozen=True)
class Interval:
    """A mean difference in nats per token, and its 95% interval.

    Attributes:
        mean: over all tokens.
        half_width: of the interval, in nats per token; None with fewer than `MIN_BLOCKS` blocks.
        blocks: blocks that have such tokens.
        tokens: how many there are.
    """

    mean: float
    half_width: float | None
    blocks: int
    tokens: int

    @property
    def low(self) -> float:
        """Lower end; minus infinity where there is no interval."""
        return -math.inf if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end; infinity where there is no interval."""
        return math.inf if self.half_width is None else self.mean + self.half_width

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval leaves zero on one side, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Bins:
    """A division of tokens into kinds.

    Attributes:
        name: what divides them.
        labels: of the bins, in order.
        index: (N,) which bin each token is in.
    """

    name: str
    labels: Sequence[str]
    index: np.ndarray


@dataclass(frozen=True)
class BinDifference:
    """The losses of two models on one kind of token.

    Attributes:
        label: of the bin.
        share: of all tokens.
        loss_a: mean loss of A, nats per token.
        loss_b: mean loss of B.
        difference: of A - B.
    """

    label: str
    share: float
    loss_a: float
    loss_b: float
    difference: Interval

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return asdict(self)


def default_block(stride: int) -> int:
    """The fewest whole windows, of `stride` scored tokens each, that have `BLOCK_TOKENS`."""
    return -(-BLOCK_TOKENS // stride) * stride


def choose_block(difference: np.ndarray, stride: int, requested: int | None = None) -> int:
    """Tokens per block: as requested, else enough for blocks to be independent.

    The search begins with `default_block`, and doubles it while neighbouring blocks are alike and
    `MIN_BLOCKS` remain.

    Args:
        difference: (N,) differences in loss, in the order of the text.
        stride: tokens that a window scores.
        requested: a size of one's own.

    Raises:
        PHAError: a size below 1, or one that gives fewer than `MIN_BLOCKS` blocks.
    """
    tokens = len(difference)
    size = default_block(stride) if requested is None else requested
    require_blocks(tokens, size)
    if requested is not None:
        return size
    while tokens // (2 * size) >= MIN_BLOCKS:
        sums, counts = block_sums(difference, block_numbers(tokens, size))
        if not are_alike(sums / counts):
            break
        size *= 2
    return size


def require_blocks(tokens: int, size: int) -> None:
    """Check that so many tokens make `MIN_BLOCKS` blocks of a size.

    Raises:
        PHAError: they do not, or the size is below 1.
    """
    if size < 1:
        raise PHAError(f"a block has {size} tokens; give at least 1")
    if (count := tokens // size) < MIN_BLOCKS:
        advice = f", or --block {tokens // MIN_BLOCKS}" if tokens >= MIN_BLOCKS else ""
        raise PHAError(
            f"{tokens:,} tokens make {count} blocks of {size:,}, and an interval needs "
            f"{MIN_BLOCKS}: take more text{advice}"
        )


def neighbour_correlation(means: np.ndarray) -> float:
    """Correlation of blocks with those after them (lag 1), 0 where all are equal."""
    deviations = means - means.mean()
    variance = float((deviations**2).sum())
    return float((deviations[1:] * deviations[:-1]).sum()) / variance if variance else 0.0


def are_alike(means: np.ndarray) -> bool:
    """Whether neighbours correlate by more than two standard errors of independent blocks."""
    return neighbour_correlation(means) > 2 / math.sqrt(len(means))


def block_numbers(tokens: int, size: int) -> np.ndarray:
    """(tokens,) int64: the block of each; a rest below half a block belongs to the last one."""
    count = max(1, (tokens + size // 2) // size)
    return np.minimum(np.arange(tokens) // size, count - 1)


def block_sums(values: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum (float64) and number of the values of each block that has any."""
    sums = np.bincount(blocks, weights=values)
    counts = np.bincount(blocks)
    return sums[counts > 0], counts[counts > 0]


def mean_interval(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """Mean and interval from the sums and counts of blocks; see the top of this module."""
    from scipy import stats

    blocks, tokens = len(sums), int(counts.sum())
    mean = math.fsum(sums) / tokens
    if blocks < MIN_BLOCKS:
        return Interval(mean, None, blocks, tokens)
    deviations = sums - mean * counts
    error = math.sqrt(blocks / (blocks - 1) * math.fsum(deviations**2)) / tokens
    return Interval(mean, float(stats.t.ppf(0.975, blocks - 1)) * error, blocks, tokens)


def bootstrap_interval(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of the mean over blocks drawn with replacement."""
    from scipy import stats

    def mean(s: np.ndarray, n: np.ndarray, axis: int) -> np.ndarray:
        result: np.ndarray = s.sum(axis=axis) / n.sum(axis=axis)
        return result

    interval = stats.bootstrap(
        (sums, counts),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _BOOTSTRAP_VALUES // len(sums)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def break_down(a: np.ndarray, b: np.ndarray, blocks: np.ndarray, bins: Bins) -> list[BinDifference]:
    """The difference A - B in each bin that has tokens.

    Args:
        a: (N,) losses of A.
        b: (N,) losses of B.
        blocks: (N,) from `block_numbers`.
        bins: a division of the tokens.
    """
    difference = a.astype(np.float64) - b
    found = []
    for number, label in enumerate(bins.labels):
        here = bins.index == number
        if not here.any():
            continue
        found.append(
            BinDifference(
                label,
                float(here.mean()),
                float(a[here].mean(dtype=np.float64)),
                float(b[here].mean(dtype=np.float64)),
                mean_interval(*block_sums(difference[here], blocks[here])),
            )
        )
    return found


def context_bins(lengths: np.ndarray, longest: int) -> Bins:
    """Eight equal bins (fewer below eight tokens) of 1 to `longest` tokens of context.

    Args:
        lengths: (N,) tokens that each prediction sees.
        longest: the sequence length.
    """
    count = min(POSITION_BINS, longest)
    edges = np.arange(1, count + 1) * longest // count  # last length of each bin
    firsts = [1, *(int(edge) + 1 for edge in edges[:-1])]
    labels = [_range(first, int(last)) for first, last in zip(firsts, edges, strict=True)]
    return Bins("context (tokens)", labels, np.searchsorted(edges, lengths))


def frequency_bins(targets: np.ndarray, counts: np.ndarray, split: str) -> Bins:
    """Bins by the rank of a token among all, the commonest first; ties in the order of ids.

    Args:
        targets: (N,) token ids.
        counts: (V,) how often each id occurs.
        split: where they were counted, for the name.
    """
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    known = int((counts > 0).sum())
    bounds = [*(bound for bound in RANK_BOUNDS if bound < known), known]
    firsts = [1, *(bound + 1 for bound in bounds[:-1])]
    labels = [_range(first, last) for first, last in zip(firsts, bounds, strict=True)]
    # Ids that do not occur have the ranks after all others.
    index = np.searchsorted(bounds, ranks[targets])
    return Bins(f"token rank ({split} split)", [*labels, "not in it"], index)


def recall_bins(tokens: np.ndarray, contexts: np.ndarray) -> Bins:
    """Bins by where a token last occurred in the context it is predicted from.

    Args:
        tokens: (N,) token ids.
        contexts: (N - 1,) the first token that the prediction of token i + 1 sees.
    """
    targets = np.arange(1, len(tokens))
    previous = previous_occurrences(tokens)[1:]
    distance = targets - previous
    index = np.where(previous < contexts, 0, np.where(distance <= RECENT_TOKENS, 1, 2))
    labels = ("new", f"seen ≤ {RECENT_TOKENS} back", f"seen > {RECENT_TOKENS} back")
    return Bins("token in its context", labels, index)


def previous_occurrences(tokens: np.ndarray) -> np.ndarray:
    """(N,) int64: where each token occurred last before, or -1."""
    order = np.argsort(tokens, kind="stable")
    same = tokens[order[1:]] == tokens[order[:-1]]
    previous = np.full(len(tokens), -1, dtype=np.int64)
    previous[order[1:][same]] = order[:-1][same]
    return previous


def steepest(values: np.ndarray, width: int) -> int:
    """Start of the stretch of `width` values (or all, if fewer) with the largest sum."""
    cumulative = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    width = min(width, len(values))
    return int(np.argmax(cumulative[width:] - cumulative[:-width]))


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}\u2013{last:,}"
