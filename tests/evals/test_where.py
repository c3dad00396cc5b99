"""Kinds of token and passages, against loops."""

from __future__ import annotations

import numpy as np
import pytest

from pha.data import TokenStore
from pha.evals.ngrams import repeats
from pha.evals.protocols import Protocol
from pha.evals.where import context_bins, context_starts, frequency_bins, passages, recall_bins
from pha.loading import LoadedModel

STARTS = np.array([0, 40, 41, 100, 777], dtype=np.int64)


def test_context_bins_are_equal_and_complete() -> None:
    lengths = np.arange(1, 257)
    bins = context_bins(lengths, 256)
    assert bins.labels[0] == "1–32"
    assert bins.labels[-1] == "225–256"
    assert np.bincount(bins.members).tolist() == [32] * 8
    few = context_bins(np.arange(1, 4), 3)
    assert list(few.labels) == ["1", "2", "3"]
    assert few.members.tolist() == [0, 1, 2]
    odd = context_bins(np.arange(1, 14), 13)
    assert sum(np.bincount(odd.members)) == 13
    for length, number in zip(range(1, 14), odd.members, strict=True):
        first, _, last = odd.labels[number].partition("–")
        assert int(first) <= length <= int(last or first)


def test_frequency_bins_are_ranks() -> None:
    counts = np.zeros(300, dtype=np.int64)
    order = np.random.default_rng(8).permutation(300)[:150]
    counts[order] = np.arange(1000, 850, -1)
    bins = frequency_bins(np.arange(300), counts, "train")
    assert list(bins.labels) == ["1–10", "11–100", "101–150", "not in it"]
    for rank, token in enumerate(order, start=1):
        assert bins.members[token] == (0 if rank <= 10 else 1 if rank <= 100 else 2)
    assert (bins.members[counts == 0] == 3).all()


def test_recall_by_a_loop() -> None:
    rng = np.random.default_rng(9)
    tokens = rng.integers(0, 120, 2000).astype(np.uint16)
    contexts = np.arange(1999) // 150 * 150
    bins = recall_bins(repeats(tokens, contexts, [1], 120, tokens)[1])
    for entry, target in enumerate(range(1, 2000)):
        seen = tokens[contexts[entry] : target].tolist()[::-1]
        back = seen.index(tokens[target]) + 1 if tokens[target] in seen else 0
        assert bins.members[entry] == (0 if back == 0 else 1 if back <= 64 else 2)
    assert set(bins.members.tolist()) == {0, 1, 2}


def windows_by_hand(total: int, length: int, stride: int, starts: np.ndarray | None) -> list[int]:
    """First token seen when each of the tokens 1 .. total - 1 is predicted."""
    found = []
    for target in range(1, total):
        # The first window whose targets, start + 1 .. start + length, include it.
        window = max(0, -(-(target - length) // stride)) * stride
        if starts is not None:
            window = max(window, *(int(s) for s in starts if s <= target - 1))
        found.append(window)
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "stride"), [(64, 64), (64, 32), (33, 7), (10, 1), (9999, 500)])
def test_contexts_by_hand(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, length: int, stride: int, packed: bool
) -> None:
    monkeypatch.setattr(TokenStore, "document_starts", lambda *_: STARTS)
    found = context_starts(store, "test", Protocol(length, stride, packed))
    total = store.counts("test").tokens
    assert found.tolist() == windows_by_hand(total, length, stride, STARTS if packed else None)


def test_passages_are_the_blocks_that_differ_most(writer: LoadedModel) -> None:
    rng = np.random.default_rng(11)
    counts = np.array([*rng.integers(30, 200, 14), 90])  # some shorter than an excerpt
    tokens = rng.integers(97, 123, counts.sum() + 1)
    difference = rng.standard_normal(counts.sum())
    blocks = np.split(difference, np.cumsum(counts)[:-1])
    found = passages(tokens, difference, counts, writer.tokenizer)
    means = sorted(float(block.mean()) for block in blocks)
    for name, sign, expected in (("A", -1, means), ("B", 1, means[::-1])):
        each = [passage for passage in found if passage.better == name]
        expected = [mean for mean in expected if sign * mean > 0][:5]
        assert [p.difference for p in each] == pytest.approx(expected)
        for passage in each:
            first = passage.first_token - 1  # entry i of the differences is of token i + 1
            block = difference[first : first + passage.tokens]
            width = min(64, len(block))
            stretches = [block[i : i + width].mean() for i in range(len(block) - width + 1)]
            best = int(np.argmax(sign * np.array(stretches)))
            assert passage.excerpt_difference == pytest.approx(stretches[best])
            start = passage.first_token + best
            assert passage.excerpt == bytes(tokens[start : start + width].tolist()).decode()
