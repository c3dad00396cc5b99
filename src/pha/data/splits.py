"""Which document is in which split, in ways that anybody can repeat and check."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

SPLITS = ("train", "validation", "test")

SPLIT_WORDS = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""The split that a word in the name of a file or of a Hub data set's split stands for."""

_NUMBERED = re.compile(rf"({'|'.join(SPLIT_WORDS)})(-\d+(-of-\d+)?)?")


@dataclass(frozen=True)
class TextSplit:
    """Holds documents out of a corpus by a hash of their text, whatever their order or number.

    Let u be SHA-256(seed in decimal, a line feed, the text in UTF-8), read as a big-endian binary
    fraction in [0, 1). The first split of `held` takes u < holdout, the second
    holdout <= u < 2 holdout, and train takes the rest. Equal texts land in the same split.

    Attributes:
        seed: not negative.
        holdout: share of each held-out split, exact.
        held: the held-out splits.
    """

    seed: int
    holdout: Fraction
    held: tuple[str, ...] = ("test", "validation")

    def split_of(self, text: str) -> str:
        """The split of a text."""
        digest = hashlib.sha256(f"{self.seed}\n{text}".encode()).digest()
        u = Fraction(int.from_bytes(digest, "big"), 1 << 8 * len(digest))
        for number, split in enumerate(self.held, start=1):
            if u < number * self.holdout:
                return split
        return "train"

    def describe(self) -> dict[str, Any]:
        """The rule, seed and exact fractions, ready for JSON."""
        train = 1 - len(self.held) * self.holdout
        fractions = {"train": train, **dict.fromkeys(self.held, self.holdout)}
        return {
            "rule": "hash of seed and text",
            "seed": self.seed,
            "fractions": {split: str(fraction) for split, fraction in fractions.items()},
        }


def path_split(name: str) -> str:
    """The split of a document by the SHA-256 of its path: about 90% train, 5%, 5%.

    It depends on nothing else, so a document never moves when others come or go.
    """
    digest = hashlib.sha256(os.fsencode(name)).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    return "train" if percent < 90 else "validation" if percent < 95 else "test"


def split_word(stem: str) -> str | None:
    """The word of `SPLIT_WORDS` in a file's name without its endings, if there is just one.

    It is parted by `.` or `_` and may carry a part's number, as in wiki.valid, train-2 and
    train-00000-of-00002.
    """
    matches = [_NUMBERED.fullmatch(part) for part in re.split(r"[._]", stem.lower())]
    words = [match.group(1) for match in matches if match]
    return words[0] if len(words) == 1 else None


def natural_order(name: str) -> list[str | int]:
    """A sorting key with numbers by value: train, train-2, train-10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]
