from __future__ import annotations

import hashlib
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pha.data.splits import TextSplit, natural_order, path_split, split_word


def test_path_split_never_changes() -> None:
    expected = {
        "os.py": "validation",
        "json/__init__.py": "train",
        "notes/été.md": "train",
        "doc-0.txt": "train",
        "doc-7.txt": "test",
        "doc-10.txt": "test",
        "doc-72.txt": "validation",
    }
    assert {name: path_split(name) for name in expected} == expected


@given(text=st.text(), seed=st.integers(0, 2**70), holdout=st.fractions(0, "1/2"))
def test_text_split_is_the_published_rule(text: str, seed: int, holdout: Fraction) -> None:
    number = int(hashlib.sha256(str(seed).encode() + b"\n" + text.encode()).hexdigest(), 16)
    if number * holdout.denominator < holdout.numerator * 2**256:
        expected = "test"
    elif number * holdout.denominator < 2 * holdout.numerator * 2**256:
        expected = "validation"
    else:
        expected = "train"
    assert TextSplit(seed, holdout).split_of(text) == expected


def test_text_split_is_exact_at_its_bounds() -> None:
    digest = int(hashlib.sha256(b"0\nhello").hexdigest(), 16)
    for held in (("test",), ("validation", "test")):
        bound = Fraction(digest, 2**256 * len(held))
        assert TextSplit(0, bound, held).split_of("hello") == (*held, "train")[len(held)]
        above = Fraction(digest + 1, 2**256 * len(held))
        assert TextSplit(0, above, held).split_of("hello") == held[-1]


def test_only_missing_splits_are_held_out() -> None:
    rule = TextSplit(0, Fraction(1, 4), ("validation",))
    shares = Counter(rule.split_of(str(number)) for number in range(4_000))
    assert shares.keys() == {"train", "validation"}
    assert shares["validation"] / 4_000 == pytest.approx(0.25, abs=0.03)
    assert rule.describe()["fractions"] == {"train": "3/4", "validation": "1/4"}


@pytest.mark.parametrize(
    ("stem", "word"),
    [
        ("train", "train"),
        ("wiki.valid", "valid"),
        ("my_DEV", "dev"),
        ("train-2", "train"),
        ("train-00000-of-00002", "train"),
        ("books.test-10", "test"),
        ("unit-test", None),
        ("train-ing", None),
        ("train-2-of", None),
        ("train_test", None),
        ("latest", None),
        ("", None),
    ],
)
def test_words_for_splits_in_names(stem: str, word: str | None) -> None:
    assert split_word(stem) == word


def test_natural_order() -> None:
    names = ["train-10", "train", "train-2", "a/train-3", "10", "9", "train-2-of-3"]
    expected = ["9", "10", "a/train-3", "train", "train-2", "train-2-of-3", "train-10"]
    assert sorted(names, key=natural_order) == expected
