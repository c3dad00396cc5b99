"""Which tokens are trained on: a pure function of seed, step and length.

Repeats may be planted in them: random tokens that stand twice, so that only memory predicts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from torch import Tensor

SPAN = 32
"""Tokens of a planted repeat."""

_PLANTS = 1  # at the end of a key: apart from the order of the windows, which has keys of its own


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch: (rows, T) int64 ids; `targets` are `inputs` one token later.

    `document_starts` (rows, T) is True at the first token of a document and at position 0, or None
    when documents are not kept apart. `labels` is how many targets there are in the whole global
    batch, of which these rows may be a part.
    """

    inputs: Tensor
    targets: Tensor
    document_starts: Tensor | None
    labels: int


class WindowSampler:
    """Training batches of windows from one token sequence, in an order that a seed fixes.

    Window k is `tokens[k*T : k*T + T + 1]`: T inputs, and T targets one later. So every token but
    the first is predicted exactly once per epoch, apart from what does not fill a window of T
    targets at the end of the sequence, and from the windows of an epoch's order that do not fill
    a global batch; those are left out.

    The state is the step alone: the same step gives the same batch in any process, after any
    other steps.

    Args:
        tokens: (N,) integers, such as a store's memory map; read as batches are asked for.
        sequence_length: T, at least 1.
        global_batch: windows per optimiser step, over all ranks and micro-batches; at least 1.
        seed: not negative.
        document_starts: (documents,) ascending positions of first tokens, to mark them in the
            batches.
        planter: of repeats, with `planted_repeats`, the odds that a window has one.
        planted_repeats: 0 for none.

    Raises:
        PHAError: fewer windows than one global batch.
    """

    _marks_beginnings = False  # of rows, where no starts of documents are marked

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        global_batch: int,
        seed: int,
        document_starts: np.ndarray | None = None,
        planter: Planter | None = None,
        planted_repeats: float = 0.0,
    ) -> None:
        self.windows = max(0, len(tokens) - 1) // sequence_length
        if self.windows < global_batch:
            raise PHAError(
                f"{len(tokens)} tokens give {self.windows} windows of {sequence_length}, fewer "
                f"than one global batch of {global_batch}: lower the sequence length or the "
                "batch, or use more text"
            )
        self.sequence_length = sequence_length
        self.global_batch = global_batch
        self.steps_per_epoch = self.windows // global_batch
        self._tokens = tokens
        self._firsts = np.arange(self.windows) * sequence_length  # token of every window
        self._seed = seed
        self._starts = document_starts
        self._planter, self._planted = planter, planted_repeats
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """The global batch of a step (counted from 0 over all epochs), or its rows start:stop."""
        import torch

        windows, new = (x[start:stop] for x in self._windows(*divmod(step, self.steps_per_epoch)))
        positions = self._firsts[windows, None] + np.arange(self.sequence_length + 1)
        read = np.asarray(self._tokens[positions], dtype=np.int64)
        if self._planter is not None:
            for number, row in enumerate(read, start=start):
                self._planter.plant(row, self._planted, [self._seed, step, number])
        ids = torch.from_numpy(read)
        marks = None
        if self._starts is not None:
            inputs = positions[:, :-1]
            next_starts = np.searchsorted(self._starts, inputs).clip(max=len(self._starts) - 1)
            is_first = self._starts[next_starts] == inputs
            is_first[new, 0] = True
            marks = torch.from_numpy(is_first)
        elif self._marks_beginnings and new.any():
            marks = torch.zeros(len(new), self.sequence_length, dtype=torch.bool)
            marks[:, 0] = torch.from_numpy(new)
        labels = self.global_batch * self.sequence_length
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), marks, labels)

    def _windows(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows of a step of an epoch; and which of them go on from nothing, all of them."""
        first = step * self.global_batch
        windows = self._epoch_order(epoch)[first : first + self.global_batch].copy()
        return windows, np.ones(len(windows), dtype=bool)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """A permutation of the windows for this epoch (only the latest is kept).

        It is the sorting order of raw PCG64 output, which numpy promises to keep between versions,
        unlike `Generator.permutation`.
        """
        if self._order is None or self._order[0] != epoch:
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
            self._order = (epoch, np.argsort(bits.random_raw(self.windows), kind="stable"))
        return self._order[1]


class StretchSampler(WindowSampler):
    """Batches in which each row goes on where it ended in the step before.

    The windows, in their order, are a ring. In each epoch row r has the r-th of `global_batch`
    stretches of it, all of `steps_per_epoch` windows, from a beginning that the seed draws. A row
    begins anew with the epoch and with the text, which `document_starts` of a batch marks whether
    documents are kept apart or not; where no row does, it is None.
    """

    _marks_beginnings = True

    def _windows(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows of a step of an epoch; and which of them go on from nothing."""
        bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
        stretches = np.arange(self.global_batch) * self.steps_per_epoch
        windows = (int(bits.random_raw()) % self.windows + stretches + step) % self.windows
        return windows, (windows == 0) | (step == 0)


class DocumentSampler(WindowSampler):
    """Batches in which a share of the rows lie in one long document each.

    Such a row is a window of `windows_in_documents`. These have an order of their own in every
    round, and take the places of a batch's first rows; the other rows are as of `WindowSampler`.

    Args:
        arguments: of `WindowSampler`.
        documents: (documents,) ascending positions of first tokens.
        share: of the rows, over many steps.

    Raises:
        PHAError: no document has T + 1 tokens.
    """

    def __init__(self, *arguments: Any, documents: np.ndarray, share: float) -> None:
        super().__init__(*arguments)
        found = windows_in_documents(documents, len(self._tokens), self.sequence_length)
        if not len(found):
            raise PHAError(
                f"no document has more than {self.sequence_length} tokens: lower the sequence "
                "length, or set data.long_documents 0"
            )
        self._firsts, self._share = np.concatenate([self._firsts, found]), share

    def _windows(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows of a step, those of long documents first; and that all begin anew."""
        windows, new = super()._windows(epoch, step)
        step += epoch * self.steps_per_epoch
        first, last = (int(n * self.global_batch * self._share) for n in (step, step + 1))
        long = len(self._firsts) - self.windows
        rounds, places = np.divmod(np.arange(first, last), long)
        for number in np.unique(rounds).tolist():
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, number, 0, 1]))
            order = self.windows + np.argsort(bits.random_raw(long), kind="stable")
            here = np.flatnonzero(rounds == number)
            windows[here] = order[places[here]]
        return windows, new


def windows_in_documents(documents: np.ndarray, tokens: int, length: int) -> np.ndarray:
    """Where windows begin whose inputs and targets lie in one document: (windows,) positions.

    Each document is cut from its first token on; what fills no window is left out.

    Args:
        documents: (documents,) ascending positions of first tokens.
        tokens: in all.
        length: T, inputs of a window.
    """
    sizes = np.diff(documents, append=tokens)
    counts = np.maximum(0, sizes - 1) // length
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(documents, counts) + number * length


class Planter:
    """Draws tokens by how frequent they are: a pure function of a key, the same for all time.

    Args:
        frequencies: (V,) how often each id occurs.
    """

    def __init__(self, frequencies: np.ndarray) -> None:
        self._upto = np.cumsum(frequencies)

    def draw(self, key: Sequence[int], count: int = SPAN) -> np.ndarray:
        """(count,) int64 ids, each drawn by its frequency, with replacement."""
        return self._tokens(_uniform(key, count))

    def plant(self, ids: np.ndarray, rate: float, key: Sequence[int]) -> None:
        """With odds `rate`, write a random span into two places of a row `ids`.

        They may be anywhere, but do not overlap. The row has at least 2 `SPAN` tokens.
        """
        decision, *places = _uniform([*key, _PLANTS], 3 + SPAN).tolist()
        if decision >= rate:
            return
        room = len(ids) - 2 * SPAN + 1
        first, second = sorted(int(place * room) for place in places[:2])
        span = self._tokens(np.array(places[2:]))
        ids[first : first + SPAN] = ids[second + SPAN : second + 2 * SPAN] = span

    def _tokens(self, uniform: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._upto, uniform * self._upto[-1], side="right")


def _uniform(key: Sequence[int], count: int) -> np.ndarray:
    """(count,) float64 in [0, 1), from raw PCG64 output, which numpy promises to keep."""
    bits = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53
