"""Which document is in which split, in ways that anybody can repeat and check."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pha.utils.errors import PHAError

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


class SplitHash:
    """One SHA-256 of a whole split: of a line `SHA-256 of the text, blank, split` per document."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, text_sha256: str, split: str) -> None:
        """Add the next document of the corpus, by the hex SHA-256 of its text in UTF-8."""
        self._digest.update(f"{text_sha256} {split}\n".encode())

    def hexdigest(self) -> str:
        """The hash of all documents added."""
        return self._digest.hexdigest()


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


def canonical_splits(names: Iterable[str], where: str) -> dict[str, str]:
    """From our name of a split to the name that a data set has for it; others are left out.

    Raises:
        PHAError: two names for one split.
    """
    found: dict[str, str] = {}
    for name in names:
        split = SPLIT_WORDS.get(name)
        if split is None:
            continue
        if split in found:
            raise PHAError(
                f"{where} has two splits for {split} ({found[split]} and {name}): use local files "
                "with one of them"
            )
        found[split] = name
    return found


def natural_order(name: str) -> list[str | int]:
    """A sorting key with numbers by value: train, train-2, train-10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]
