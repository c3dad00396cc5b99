"""Two models on the same tokens: which is better, by how much, and where.

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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from pha.data.store import TokenStore
from pha.data.tokenizer import tokenizer_hashes
from pha.evals.nats import KeptNats
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.evals.where import Bins, Passage, divisions, passages
from pha.loading import LoadedModel
from pha.results import Evaluation
from pha.utils.errors import PHAError

BLOCK_TOKENS = 2048
MIN_BLOCKS = 20

_RESAMPLES = 9999
_RESAMPLED_VALUES = 1 << 22  # drawn at a time, 8 bytes each


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
        """Minus infinity where there is no interval."""
        return -math.inf if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        """Infinity where there is no interval."""
        return math.inf if self.half_width is None else self.mean + self.half_width

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval leaves zero on one side, else 0."""
        return int(self.low > 0) - int(self.high < 0)


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


@dataclass(frozen=True)
class PairedComparison:
    """Losses of A and B on the same tokens. Differences are A - B: below zero, A is better.

    Attributes:
        a: name of A.
        b: name of B.
        evaluations: what `pha eval` would say of A and of B.
        difference: mean difference in loss with its interval.
        bootstrap: the interval by drawing blocks with replacement, a check of the other.
        block_tokens: tokens per block.
        block_differences: (blocks,) mean difference of each, in the order of the text.
        breakdowns: by what divides the tokens, the difference in each bin.
        passages: the blocks that differ most, each way.
    """

    a: str
    b: str
    evaluations: tuple[Evaluation, Evaluation]
    difference: Interval
    bootstrap: tuple[float, float]
    block_tokens: int
    block_differences: np.ndarray
    breakdowns: dict[str, list[BinDifference]]
    passages: list[Passage]

    @property
    def perplexity_ratio(self) -> tuple[float, float, float]:
        """Perplexity of A over that of B, and the ends of its interval."""
        d = self.difference
        return math.exp(d.mean), math.exp(d.low), math.exp(d.high)

    @property
    def blocks_better(self) -> tuple[float, float]:
        """Fractions of blocks in which A, and in which B, has the lower loss."""
        signs = self.block_differences
        return float((signs < 0).mean()), float((signs > 0).mean())

    def caution(self) -> str | None:
        """Why the interval may be too narrow, if so."""
        if not are_alike(self.block_differences):
            return None
        correlation = neighbour_correlation(self.block_differences)
        return (
            f"neighbouring blocks of {self.block_tokens:,} tokens are alike (correlation "
            f"{correlation:.2f}), so the interval is too narrow: take larger blocks or more text"
        )

    def verdict(self) -> str:
        """The result in a sentence."""
        one, two = (evaluation.perplexity for evaluation in self.evaluations)
        if not self.block_differences.any():
            return f"A and B do not differ: every block has the same loss (perplexity {one:,.2f})"
        gap, width = self.difference.mean, self.difference.half_width
        shown = f"{_digits(gap, width)} nats per token (95%)"
        if self.difference.sign:
            winner, first, second = ("A", one, two) if gap < 0 else ("B", two, one)
            return (
                f"{winner} is better by {shown.removeprefix('-')}; "
                f"perplexity {first:,.2f} against {second:,.2f}"
            )
        return (
            f"the data do not decide: the loss of A less that of B is {shown}; "
            f"perplexity {one:,.2f} against {two:,.2f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        ratio, low, high = self.perplexity_ratio
        a_better, b_better = self.blocks_better
        return {
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict(),
            "covers": "the choice of text, not the seeds of training",
            "caution": self.caution(),
            "difference": asdict(self.difference),
            "bootstrap": {"low": self.bootstrap[0], "high": self.bootstrap[1]},
            "perplexity_ratio": {"ratio": ratio, "low": low, "high": high},
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "blocks": {
                "tokens": self.block_tokens,
                "neighbour_correlation": neighbour_correlation(self.block_differences),
                "a_better": a_better,
                "b_better": b_better,
                "differences": self.block_differences.tolist(),
            },
            "breakdowns": [
                {"by": name, "bins": [asdict(entry) for entry in bins]}
                for name, bins in self.breakdowns.items()
            ],
            "passages": [asdict(passage) for passage in self.passages],
        }


def compare_models(
    a: LoadedModel,
    b: LoadedModel,
    store: TokenStore,
    split: str,
    protocol: Protocol,
    *,
    precision: str = "fp32",
    block: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> PairedComparison:
    """Score the same windows with both models, and compare token by token.

    Memory: 8 bytes a token for the losses, and some 60 while tokens are put into bins.

    Args:
        a: one model.
        b: the other.
        store: tokens made by the tokenizer of both.
        split: of the store.
        protocol: the windows.
        precision: fp32, or bf16 for autocast.
        block: tokens per block of the intervals; as many as `grown_block` finds when absent.
        progress: called with (A or B, windows done, windows in all).

    Raises:
        PHAError: different tokenizers, too little text, or losses that are not finite.
    """
    mine, other = (set(tokenizer_hashes(model.tokenizer)) for model in (a, b))
    if not mine & other:
        raise PHAError(
            f"{a.path} and {b.path} have different tokenizers, so their tokens differ: compare "
            "perplexities per word or byte (`pha eval`)"
        )
    store.require_tokenizer(a.tokenizer)
    first_block(store.counts(split).tokens - 1, protocol.stride, block)
    kept = []
    for name, loaded in (("A", a), ("B", b)):
        shown = None if progress is None else partial(progress, name)
        kept.append(keep_nats(loaded, store, split, protocol, precision, shown))
    return compare_nats(kept[0], kept[1], store, block=block)


def keep_nats(
    loaded: LoadedModel,
    store: TokenStore,
    split: str,
    protocol: Protocol,
    precision: str = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> KeptNats:
    """Score a split, and keep the loss of every token.

    Raises:
        PHAError: no such split, too few tokens, or losses that are not finite.
    """
    nats = np.empty(max(0, store.counts(split).tokens - 1), dtype=np.float32)
    evaluation = evaluate(
        *(loaded.model, store, split, protocol),
        precision=precision,
        progress=progress,
        losses=nats,
    )
    if not np.isfinite(nats).all():
        raise PHAError(f"{loaded.path} has losses that are not finite; its weights are unfit")
    return KeptNats(str(loaded.path), evaluation, protocol, nats)


def compare_nats(
    a: KeptNats, b: KeptNats, store: TokenStore, *, block: int | None = None
) -> PairedComparison:
    """Compare token by token what two models made of the same windows of a split.

    Raises:
        PHAError: other windows or another precision, or too little text.
    """
    one, two = (
        {**asdict(each.protocol), "precision": each.evaluation.protocol["precision"]}
        for each in (a, b)
    )
    for key in one:
        if key != "name" and one[key] != two[key]:
            raise PHAError(
                f"A was scored with {key} {one[key]} and B with {two[key]}; score both alike"
            )
    split = a.evaluation.split
    size = first_block(len(a.nats), a.protocol.stride, block)
    difference = a.nats.astype(np.float64) - b.nats
    if block is None:
        size = grown_block(difference, size)
    blocks = block_numbers(len(difference), size)
    sums, counts = block_sums(difference, blocks)
    return PairedComparison(
        a.model,
        b.model,
        (a.evaluation, b.evaluation),
        mean_interval(sums, counts),
        bootstrap_interval(sums, counts),
        size,
        sums / counts,
        {
            bins.name: break_down(a.nats, b.nats, blocks, bins)
            for bins in divisions(store, split, a.protocol)
        },
        passages(store.tokens(split), difference, counts, store.tokenizer()),
    )


def first_block(tokens: int, stride: int, requested: int | None = None) -> int:
    """Tokens per block: as requested, else as many whole windows as have `BLOCK_TOKENS`.

    Raises:
        PHAError: a size below 1, or one that gives fewer than `MIN_BLOCKS` blocks.
    """
    size = -(-BLOCK_TOKENS // stride) * stride if requested is None else requested
    if size < 1:
        raise PHAError(f"a block has {size} tokens; give at least 1")
    if (count := tokens // size) < MIN_BLOCKS:
        advice = f", or --block {tokens // MIN_BLOCKS}" if tokens >= MIN_BLOCKS else ""
        raise PHAError(
            f"{tokens:,} tokens make {count} blocks of {size:,}, and an interval needs "
            f"{MIN_BLOCKS}: take more text{advice}"
        )
    return size


def grown_block(difference: np.ndarray, size: int) -> int:
    """`size` tokens, doubled while neighbouring blocks are alike and `MIN_BLOCKS` would remain.

    `difference` is that of the losses, (N,), in the order of the text.
    """
    while len(difference) // (2 * size) >= MIN_BLOCKS:
        sums, counts = block_sums(difference, block_numbers(len(difference), size))
        if not are_alike(sums / counts):
            break
        size *= 2
    return size


def block_numbers(tokens: int, size: int) -> np.ndarray:
    """(tokens,) int64: the block of each; a rest below half a block belongs to the last one."""
    count = max(1, (tokens + size // 2) // size)
    return np.minimum(np.arange(tokens) // size, count - 1)


def block_sums(values: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum (float64) and number of the values of each block that has any."""
    sums, counts = np.bincount(blocks, weights=values), np.bincount(blocks)
    return sums[counts > 0], counts[counts > 0]


def neighbour_correlation(means: np.ndarray) -> float:
    """Correlation of blocks with those after them (lag 1), 0 where all are equal."""
    deviations = means - means.mean()
    variance = float((deviations**2).sum())
    return float((deviations[1:] * deviations[:-1]).sum()) / variance if variance else 0.0


def are_alike(means: np.ndarray) -> bool:
    """Whether neighbours correlate by more than two standard errors of independent blocks."""
    return neighbour_correlation(means) > 2 / math.sqrt(len(means))


def mean_interval(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """Mean and interval from the sums and counts of blocks; see the top of this module."""
    from scipy import stats

    blocks, tokens = len(sums), int(counts.sum())
    mean = math.fsum(sums) / tokens
    if blocks < MIN_BLOCKS:
        return Interval(mean, None, blocks, tokens)
    error = stats.sem((sums - mean * counts) * (blocks / tokens))
    return Interval(mean, float(stats.t.ppf(0.975, blocks - 1) * error), blocks, tokens)


def bootstrap_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of the mean over blocks drawn with replacement."""
    from scipy import stats

    low, high = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _RESAMPLED_VALUES // len(sums)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(low), float(high)


def break_down(a: np.ndarray, b: np.ndarray, blocks: np.ndarray, bins: Bins) -> list[BinDifference]:
    """The difference A - B in each bin that has tokens.

    `a` and `b` are (N,) losses, and `blocks` (N,) is from `block_numbers`.
    """
    found = []
    for number, label in enumerate(bins.labels):
        here = bins.members == number
        if here.any():
            one, two = a[here].astype(np.float64), b[here].astype(np.float64)
            interval = mean_interval(*block_sums(one - two, blocks[here]))
            found.append(
                BinDifference(
                    label, float(here.mean()), float(one.mean()), float(two.mean()), interval
                )
            )
    return found


def _digits(gap: float, width: float | None) -> str:
    """`0.0312 ± 0.0061`: two significant figures of the width, and the gap to the same place."""
    if not width:
        return f"{gap:.3g}"
    decimals = min(8, max(0, 1 - math.floor(math.log10(width))))
    return f"{gap:.{decimals}f} ± {width:.{decimals}f}"
