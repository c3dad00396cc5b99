"""Two models on the same tokens: which is better, by how much, and where."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pha.data.store import TokenStore
from pha.data.tokenizer import tokenizer_sha256
from pha.evals.compare import (
    BinDifference,
    Interval,
    are_alike,
    block_numbers,
    block_sums,
    bootstrap_interval,
    break_down,
    choose_block,
    context_bins,
    default_block,
    frequency_bins,
    mean_interval,
    neighbour_correlation,
    recall_bins,
    require_blocks,
    steepest,
)
from pha.evals.losses import context_starts, split_windows, token_losses
from pha.evals.perplexity import Evaluation, Totals, summarise
from pha.evals.protocols import Protocol
from pha.loading import LoadedModel
from pha.utils.errors import PHAError

PASSAGES = 5
EXCERPT_TOKENS = 64
_COUNT_TOKENS = 1 << 22


@dataclass(frozen=True)
class Passage:
    """A block where the models differ much, with its most telling stretch.

    Attributes:
        better: `A` or `B`.
        first_token: of the block, its place in the split.
        tokens: of the block.
        difference: mean of A - B over the block, nats per token.
        excerpt: text of the stretch in it with the largest difference.
        excerpt_difference: mean of A - B over that stretch.
    """

    better: str
    first_token: int
    tokens: int
    difference: float
    excerpt: str
    excerpt_difference: float


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
    def identical(self) -> bool:
        """Whether no block differs at all."""
        return not self.block_differences.any()

    @property
    def perplexity_ratio(self) -> tuple[float, float, float]:
        """Perplexity of A over that of B, and the ends of its interval."""
        d = self.difference
        return math.exp(d.mean), math.exp(d.low), math.exp(d.high)

    def caution(self) -> str | None:
        """Why the interval may be too narrow, if so."""
        if not are_alike(self.block_differences):
            return None
        correlation = neighbour_correlation(self.block_differences)
        return (
            f"neighbouring blocks of {self.block_tokens:,} tokens are alike (correlation "
            f"{correlation:.2f}), so the interval is too narrow: take larger blocks or more text"
        )

    @property
    def blocks_better(self) -> tuple[float, float]:
        """Fractions of blocks in which A, and in which B, has the lower loss."""
        signs = self.block_differences
        return float((signs < 0).mean()), float((signs > 0).mean())

    def verdict(self) -> str:
        """The result in a sentence."""
        one, two = (evaluation.perplexity for evaluation in self.evaluations)
        if self.identical:
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
            "difference": self.difference.to_dict(),
            "bootstrap": {"low": self.bootstrap[0], "high": self.bootstrap[1]},
            "perplexity_ratio": {"ratio": ratio, "low": low, "high": high},
            "evaluations": [evaluation.to_dict() for evaluation in self.evaluations],
            "blocks": {
                "tokens": self.block_tokens,
                "neighbour_correlation": neighbour_correlation(self.block_differences),
                "a_better": a_better,
                "b_better": b_better,
                "differences": self.block_differences.tolist(),
            },
            "breakdowns": [
                {"by": name, "bins": [entry.to_dict() for entry in bins]}
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

    Args:
        a: first model.
        b: second model, with the same tokenizer.
        store: tokens made by that tokenizer.
        split: which split.
        protocol: the windows, the same for both.
        precision: fp32, or bf16 for autocast.
        block: tokens per block of the intervals; see `choose_block`.
        progress: called with (A or B, windows done, windows in all).

    Raises:
        PHAError: different tokenizers, too little text, or losses that are not finite.
    """
    hashes = [tokenizer_sha256(model.tokenizer) for model in (a, b)]
    if hashes[0] != hashes[1]:
        raise PHAError(
            f"{a.path} and {b.path} have different tokenizers, so their tokens differ: compare "
            "perplexities per word or byte (`pha eval`)"
        )
    store.require_tokenizer(hashes[0])
    _, total = split_windows(store, split, protocol)
    require_blocks(total - 1, default_block(protocol.stride) if block is None else block)
    losses, evaluations = [], []
    for name, loaded in (("A", a), ("B", b)):
        begin = time.perf_counter()
        scored = token_losses(
            loaded.model,
            store,
            split,
            protocol,
            precision=precision,
            progress=None if progress is None else _named(progress, name),
        )
        if not np.isfinite(scored.nats).all():
            raise PHAError(f"{loaded.path} has losses that are not finite; its weights are unfit")
        losses.append(scored.nats)
        totals = Totals(
            float(scored.nats.sum(dtype=np.float64)),
            int(scored.hits.sum()),
            total - 1,
            total,
            time.perf_counter() - begin,
        )
        evaluations.append(summarise(store, split, protocol, precision, totals))
    difference = losses[0].astype(np.float64) - losses[1]
    size = choose_block(difference, protocol.stride, block)
    blocks = block_numbers(total - 1, size)
    sums, counts = block_sums(difference, blocks)
    return PairedComparison(
        str(a.path),
        str(b.path),
        (evaluations[0], evaluations[1]),
        mean_interval(sums, counts),
        bootstrap_interval(sums, counts),
        size,
        sums / counts,
        _breakdowns(store, split, protocol, losses[0], losses[1], blocks),
        _passages(store.tokens(split), difference, blocks, a.tokenizer),
    )


def _named(progress: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _breakdowns(
    store: TokenStore,
    split: str,
    protocol: Protocol,
    a: np.ndarray,
    b: np.ndarray,
    blocks: np.ndarray,
) -> dict[str, list[BinDifference]]:
    """By context, by frequency and by recall."""
    tokens = np.asarray(store.tokens(split))
    contexts = context_starts(store, split, protocol)
    reference = "train" if "train" in store.splits else split
    divisions = (
        context_bins(np.arange(1, len(tokens)) - contexts, protocol.sequence_length),
        frequency_bins(tokens[1:], _token_counts(store, reference), reference),
        recall_bins(tokens, contexts),
    )
    return {bins.name: break_down(a, b, blocks, bins) for bins in divisions}


def _token_counts(store: TokenStore, split: str) -> np.ndarray:
    """(V,) int64: how often each id occurs, counted part by part."""
    tokens = store.tokens(split)
    counts = np.zeros(store.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _COUNT_TOKENS):
        counts += np.bincount(tokens[start : start + _COUNT_TOKENS], minlength=store.vocab_size)
    return counts


def _passages(
    tokens: np.ndarray, difference: np.ndarray, blocks: np.ndarray, tokenizer: Any
) -> list[Passage]:
    """The blocks with the largest differences, those where A is better first."""
    found = []
    sums, counts = block_sums(difference, blocks)
    edges = np.concatenate([[0], np.cumsum(counts)])
    means = sums / counts
    for better, sign in (("A", -1.0), ("B", 1.0)):
        for number in np.argsort(-sign * means, kind="stable")[:PASSAGES]:
            if sign * means[number] <= 0:
                break
            first, last = int(edges[number]), int(edges[number + 1])
            start = first + steepest(sign * difference[first:last], EXCERPT_TOKENS)
            stretch = slice(start, min(start + EXCERPT_TOKENS, last))
            # Entry i of the differences is of token i + 1.
            text = tokenizer.decode(tokens[stretch.start + 1 : stretch.stop + 1].tolist())
            found.append(
                Passage(
                    better,
                    first + 1,
                    last - first,
                    float(means[number]),
                    text.strip("\ufffd"),
                    float(difference[stretch].mean()),
                )
            )
    return found


def _digits(gap: float, width: float | None) -> str:
    """`0.0312 ± 0.0061`: two significant figures of the width, and the gap to the same place."""
    if not width:
        return f"{gap:.3g}"
    decimals = min(8, max(0, 1 - math.floor(math.log10(width))))
    return f"{gap:.{decimals}f} ± {width:.{decimals}f}"
