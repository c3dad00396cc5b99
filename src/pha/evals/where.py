"""Where two models differ: kinds of token by context, frequency and recall, and passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pha.data.store import TokenStore
from pha.evals.protocols import Protocol

RECENT_TOKENS = 64
POSITION_BINS = 8
RANK_BOUNDS = (10, 100, 1000, 10_000)
PASSAGES = 5
EXCERPT_TOKENS = 64

_COUNTED_TOKENS = 1 << 22  # at a time


class Bins(NamedTuple):
    """A division of N tokens into kinds.

    Attributes:
        name: what divides them.
        labels: of the bins, in order.
        members: (N,) which bin each token is in.
    """

    name: str
    labels: Sequence[str]
    members: np.ndarray


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


def divisions(store: TokenStore, split: str, protocol: Protocol) -> tuple[Bins, ...]:
    """By context, by frequency and by recall."""
    tokens = np.asarray(store.tokens(split))
    contexts = context_starts(store, split, protocol)
    reference = "train" if "train" in store.splits else split
    counted = store.tokens(reference)
    counts = np.zeros(store.vocab_size, dtype=np.int64)
    for start in range(0, len(counted), _COUNTED_TOKENS):
        part = counted[start : start + _COUNTED_TOKENS]
        counts += np.bincount(part, minlength=store.vocab_size)
    return (
        context_bins(np.arange(1, len(tokens)) - contexts, protocol.sequence_length),
        frequency_bins(tokens[1:], counts, reference),
        recall_bins(tokens, contexts),
    )


def context_starts(store: TokenStore, split: str, protocol: Protocol) -> np.ndarray:
    """(N - 1,) int64: the first token that the model sees when token i + 1 is scored.

    It is the first of the window, or of the document that token i is in where documents are kept
    apart.
    """
    total = store.counts(split).tokens
    first = np.empty(total - 1, dtype=np.int64)
    for window in protocol.windows(total):
        first[window.start + window.first_scored : window.end] = window.start
    if protocol.packed_documents:
        starts = store.document_starts(split)
        documents = starts[np.searchsorted(starts, np.arange(total - 1), side="right") - 1]
        np.maximum(first, documents, out=first)
    return first


def context_bins(lengths: np.ndarray, longest: int) -> Bins:
    """Eight equal bins (fewer below eight tokens) of 1 to `longest` tokens of context.

    `lengths` (N,) is how many tokens each prediction sees.
    """
    count = min(POSITION_BINS, longest)
    last = np.arange(1, count + 1) * longest // count
    return Bins("context (tokens)", _ranges(last), np.searchsorted(last, lengths))


def frequency_bins(targets: np.ndarray, counts: np.ndarray, split: str) -> Bins:
    """Bins by the rank of each of `targets` (N,), the commonest first; ties in the order of ids.

    `counts` (V,) is how often each id occurs in `split`.
    """
    from scipy import stats

    ranks = stats.rankdata(-counts, method="ordinal")
    known = int((counts > 0).sum())  # ids that do not occur have the ranks after these
    last = [*(bound for bound in RANK_BOUNDS if bound < known), known]
    members = np.searchsorted(last, ranks[targets])
    return Bins(f"token rank ({split} split)", [*_ranges(last), "not in it"], members)


def recall_bins(tokens: np.ndarray, contexts: np.ndarray) -> Bins:
    """Bins by where a token last occurred in the context it is predicted from.

    `contexts` (N - 1,) is the first token that the prediction of token i + 1 of `tokens` (N,) sees.
    """
    order = np.argsort(tokens, kind="stable")
    same = tokens[order[1:]] == tokens[order[:-1]]
    previous = np.full(len(tokens), -1, dtype=np.int64)  # where each token occurred last before
    previous[order[1:][same]] = order[:-1][same]
    near = np.arange(len(tokens)) - previous <= RECENT_TOKENS
    members = np.where(previous[1:] < contexts, 0, np.where(near[1:], 1, 2))
    labels = ("new", f"seen ≤ {RECENT_TOKENS} back", f"seen > {RECENT_TOKENS} back")
    return Bins("token in its context", labels, members)


def _ranges(last: Sequence[int] | np.ndarray) -> list[str]:
    """`1–10`, `11–100`, ...: names of ranges that follow one another, by their last numbers."""
    first = [1, *(int(number) + 1 for number in last[:-1])]
    return [f"{a:,}" if a == b else f"{a:,}\u2013{b:,}" for a, b in zip(first, last, strict=True)]


def passages(
    tokens: np.ndarray, difference: np.ndarray, counts: np.ndarray, tokenizer: Any
) -> list[Passage]:
    """The blocks with the largest differences, those where A is better first.

    Args:
        tokens: (N,) token ids.
        difference: (N - 1,) loss of A less that of B; entry i is of token i + 1.
        counts: (blocks,) tokens of each block.
        tokenizer: that made the ids.
    """
    edges = np.append(0, np.cumsum(counts))
    means = np.add.reduceat(difference, edges[:-1]) / counts
    found = []
    for better, sign in (("A", -1), ("B", 1)):
        for number in np.argsort(-sign * means, kind="stable")[:PASSAGES]:
            if sign * means[number] <= 0:
                break
            first, last = int(edges[number]), int(edges[number + 1])
            width = min(EXCERPT_TOKENS, last - first)
            stretches = np.lib.stride_tricks.sliding_window_view(difference[first:last], width)
            start = first + int((sign * stretches.sum(axis=1)).argmax())
            end = start + width
            text = tokenizer.decode(tokens[start + 1 : end + 1].tolist()).strip("\ufffd")
            mean, telling = float(means[number]), float(difference[start:end].mean())
            found.append(Passage(better, first + 1, last - first, mean, text, telling))
    return found
