"""Where two models differ: kinds of token by context, frequency and recall, and passages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pha.data.store import TokenStore
from pha.evals.ngrams import Repeats, repeats
from pha.evals.protocols import Protocol

RECENT_TOKENS = 64
POSITION_BINS = 8
RANK_BOUNDS = (10, 100, 1000, 10_000)
PASSAGES = 5
EXCERPT_TOKENS = 64
NGRAMS = (1, 2, 5)
COUNT_BOUNDS = (0, 3, 15)  # last counts of ranges


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
    """By context, by frequency, by recall and by n-gram."""
    tokens = np.asarray(store.tokens(split))
    contexts = context_starts(store, split, protocol)
    lengths = np.arange(1, len(tokens)) - contexts
    reference = reference_split(store, split)
    found = find_repeats(store, split, contexts)
    return (
        context_bins(lengths, protocol.sequence_length),
        octave_bins(lengths, protocol.sequence_length, protocol.sequence_length),
        frequency_bins(tokens[1:], store.frequencies(reference), reference),
        recall_bins(found[1]),
        ngram_bins(found, reference),
    )


def reference_split(store: TokenStore, split: str) -> str:
    """The split in which tokens and n-grams are counted."""
    return "train" if "train" in store.splits else split


def find_repeats(store: TokenStore, split: str, contexts: np.ndarray) -> dict[int, Repeats]:
    """n -> the repeated n-grams of a split, for every n of `NGRAMS`; see `repeats`."""
    reference = store.tokens(reference_split(store, split))
    return repeats(np.asarray(store.tokens(split)), contexts, NGRAMS, store.vocab_size, reference)


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


def octave_bins(values: np.ndarray, around: int, longest: int) -> Bins:
    """Bins of doubling width for `values` from 1 to `longest`, one of which ends at `around`."""
    last = octaves(around, longest)
    return Bins("context (octaves)", _ranges(last), np.searchsorted(last, values))


def octaves(around: int, longest: int) -> list[int]:
    """Last numbers of ranges that double up to `longest`, such that one of them is `around`."""
    last = {around >> k for k in range(around.bit_length())}
    while max(last) < longest:
        last.add(2 * max(last))
    return sorted({min(each, longest) for each in last})


def recall_bins(found: Repeats) -> Bins:
    """Bins by where each token, an n-gram of one, last occurred in what its prediction sees."""
    members = np.where(found.seen, np.where(found.distance <= RECENT_TOKENS, 1, 2), 0)
    labels = ("new", f"seen ≤ {RECENT_TOKENS} back", f"seen > {RECENT_TOKENS} back")
    return Bins("token in its context", labels, members)


def ngram_bins(found: Mapping[int, Repeats], split: str) -> Bins:
    """Bins by the longest n-gram of `NGRAMS` that a token completes a second time.

    Repeated bigrams and 5-grams are told apart by how often they occur in `split`.
    """
    members = np.where(found[1].seen, 1, 0)
    labels = ["new", "seen, bigram new"]
    for n in NGRAMS[1:]:
        grade = np.searchsorted(COUNT_BOUNDS, found[n].counts)
        members = np.where(found[n].seen, len(labels) + grade, members)
        counts = [*_ranges(COUNT_BOUNDS, first=0), f"{COUNT_BOUNDS[-1] + 1:,}+"]
        labels += [f"{'bigram' if n == 2 else f'{n}-gram'}, {each} in {split}" for each in counts]
    return Bins("repeated n-gram", labels, members)


def _ranges(last: Sequence[int] | np.ndarray, first: int = 1) -> list[str]:
    """`1–10`, `11–100`, ...: names of ranges that follow one another, by their last numbers."""
    firsts = [first, *(int(number) + 1 for number in last[:-1])]
    pairs = zip(firsts, last, strict=True)
    return [f"{a:,}" if a == b else f"{a:,}\u2013{b:,}" for a, b in pairs]


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
