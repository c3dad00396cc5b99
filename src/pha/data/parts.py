"""A store made in parts, by processes or machines that know nothing of each other.

    STORE/part-1-of-4/    a store of its own, and split.txt, the lines that its split's hash is of
    STORE/store.json      joins them: counts and hashes of the whole, and those of each part
    STORE/tokenizer/      as in any store

The ids of the parts one after the other are those of a store that one process makes, and so are the
counts, the hashes and the positions of documents. Nothing is copied: the store's files are the
parts'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pha.utils.errors import PHAError

SPLIT_LINES = "split.txt"


class Part(NamedTuple):
    """Part `number` of `of`, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """What 3/8 says.

        Raises:
            PHAError: another form, or no such part.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        part = cls(*map(int, match.groups())) if match else cls(0, 0)
        if not 1 <= part.number <= part.of:
            raise PHAError(f"--part {text}: write K/N, such as 1/8 for the first of eight parts")
        return part

    @classmethod
    def of_folder(cls, name: str) -> Part | None:
        """The part that a folder of this name holds; None for any other."""
        match = re.fullmatch(r"part-(\d{1,6})-of-(\d{1,6})", name, re.ASCII)
        return cls(*map(int, match.groups())) if match else None

    @property
    def folder(self) -> str:
        """Its folder's name in the store."""
        return f"part-{self.number}-of-{self.of}"

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"


class Shards:
    """Arrays one after the other, read as if they were one: (N,).

    A slice or an array of positions gives what it would of one array, read then.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])
        self.dtype = arrays[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[Any]:
        return (token for array in self._arrays for token in array)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            firsts = self._ends - [len(array) for array in self._arrays]
            pairs = zip(self._arrays, firsts.tolist(), strict=True)
            pieces = [a[max(0, start - first) : max(0, stop - first)] for a, first in pairs]
            return np.concatenate([piece for piece in pieces if len(piece)] or pieces[:1])
        positions = np.asarray(index)
        positions = np.where(positions < 0, positions + len(self), positions)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"a position beyond {len(self)} tokens")
        found = np.empty(positions.shape, self.dtype)
        numbers = np.searchsorted(self._ends, positions, side="right")
        for number in np.unique(numbers):
            here, array = numbers == number, self._arrays[number]
            found[here] = array[positions[here] - (self._ends[number] - len(array))]
        return found[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)
