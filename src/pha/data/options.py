"""What a user may say about a source: which field is the text, and how to split it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from pha.data.splits import TextSplit
from pha.utils.errors import PHAError


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source and split it, where the source leaves that open.

    Attributes:
        text_field: of records, the field with the text.
        holdout: share of documents in each split that is held out by a hash of the text, or None
            for the source's default (5% of files, 0.5% of Hub data sets).
        split_seed: of that hash; None for 0.

    Raises:
        PHAError: a value out of range.
    """

    text_field: str = "text"
    holdout: Fraction | None = None
    split_seed: int | None = None

    def __post_init__(self) -> None:
        if self.holdout is not None and not 0 < self.holdout < Fraction(1, 2):
            raise PHAError(
                f"a holdout of {self.holdout} leaves nothing to a split: "
                "give a fraction between 0 and 0.5, such as 0.05"
            )
        if self.split_seed is not None and self.split_seed < 0:
            raise PHAError(f"the split seed is {self.split_seed}: give 0 or more")

    def hold_out(self, default: Fraction, given: Iterable[str]) -> TextSplit | None:
        """The rule for a source of records with the splits `given`, or None if it needs none."""
        present = set(given)
        if "validation" in present:
            return None
        held = tuple(split for split in ("test", "validation") if split not in present)
        return TextSplit(self.split_seed or 0, self.holdout or default, held)

    def require_unused(self, description: str, rule: str) -> None:
        """Refuse options of a split by text for a source that is split by another `rule`.

        Raises:
            PHAError: holdout or seed is given.
        """
        if self.holdout is not None or self.split_seed is not None:
            raise PHAError(
                f"{description} is split by another rule ({rule}): leave out --holdout and "
                "--split-seed"
            )
