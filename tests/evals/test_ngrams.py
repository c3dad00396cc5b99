"""Repeated n-grams against loops, whatever parts the other text is read in."""

from __future__ import annotations

import numpy as np
import pytest

from pha.evals import ngrams
from pha.evals.ngrams import NGrams, repeats
from pha.evals.where import COUNT_BOUNDS, ngram_bins, octave_bins, octaves


@pytest.mark.parametrize("part", [7, 64, 1 << 22])
def test_repeats_by_a_loop(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(ngrams, "_COUNTED_TOKENS", part)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4, 400).astype(np.uint16)
    other = rng.integers(0, 5, 300).astype(np.uint16)  # with an id that the text does not have
    contexts = np.arange(399) // 90 * 90
    found = repeats(tokens, contexts, (1, 2, 5), 5, other)
    text, read = tokens.tolist(), other.tolist()
    for n, each in found.items():
        assert each.seen.any()
        assert not each.seen.all()
        for entry, target in enumerate(range(1, 400)):
            gram = text[target - n + 1 : target + 1] if target >= n - 1 else None
            ends = [
                end
                for end in range(contexts[entry] + n - 1, target)
                if text[end - n + 1 : end + 1] == gram
            ]
            assert each.earlier[entry] == (ends[-1] if ends else -1)
            if ends:
                assert each.distance[entry] == target - ends[-1]
            times = sum(read[i : i + n] == gram for i in range(len(read) - n + 1))
            assert each.counts[entry] == times


def test_numbers_are_exact_at_any_vocabulary() -> None:
    rng = np.random.default_rng(1)
    words = rng.integers(0, 1 << 31, 6)
    tokens = words[rng.integers(0, 6, 500)]
    small = np.searchsorted(np.sort(words), tokens)
    for n in (2, 5):
        one, two = NGrams(tokens, 5, 1 << 31), NGrams(small, 5, 6)
        assert (one.earlier(n) == two.earlier(n)).all()
        assert (one.counts(tokens, [n])[0] == two.counts(small, [n])[0]).all()


def test_octaves_double_around_a_length() -> None:
    assert octaves(8, 64) == [1, 2, 4, 8, 16, 32, 64]
    assert octaves(100, 350) == [1, 3, 6, 12, 25, 50, 100, 200, 350]
    assert octaves(64, 20) == [1, 2, 4, 8, 16, 20]
    bins = octave_bins(np.arange(1, 21), 8, 20)
    assert list(bins.labels) == ["1", "2", "3–4", "5–8", "9–16", "17–20"]
    assert np.bincount(bins.members).tolist() == [1, 1, 2, 4, 8, 4]


def test_classes_of_repeated_ngrams_by_a_loop() -> None:
    rng = np.random.default_rng(2)
    tokens = np.concatenate([rng.integers(0, 30, 300), np.tile(rng.integers(0, 30, 12), 9)])
    train = np.concatenate([tokens[:40], np.tile(tokens[290:330], 30), rng.integers(0, 30, 3000)])
    found = repeats(tokens, np.zeros(len(tokens) - 1, dtype=np.int64), (1, 2, 5), 30, train)
    bins = ngram_bins(found, "train")
    text, read = tokens.tolist(), train.tolist()

    def earlier(end: int, n: int) -> bool:
        gram = text[end - n + 1 : end + 1]
        return end >= n - 1 and any(text[i : i + n] == gram for i in range(end - n + 1))

    for entry, end in enumerate(range(1, len(text))):
        n = next((n for n in (5, 2, 1) if earlier(end, n)), 0)
        expected = "new" if n == 0 else "seen, bigram new"
        if n > 1:
            gram = text[end - n + 1 : end + 1]
            times = sum(read[i : i + n] == gram for i in range(len(read)))
            grade = sum(times > bound for bound in COUNT_BOUNDS)
            expected = f"{'bigram' if n == 2 else '5-gram'}, {['0', '1–3', '4–15', '16+'][grade]}"
        assert bins.labels[bins.members[entry]].removesuffix(" in train") == expected
    assert len(set(bins.members.tolist())) >= 7
