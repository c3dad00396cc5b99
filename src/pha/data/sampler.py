"""Which tokens are trained on and scored: pure functions of seed, epoch, step and length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch; `targets` are `inputs` one token later.

    Attributes:
        inputs: (rows, T) int64 token ids.
        targets: (rows, T) int64 token ids.
        document_starts: (rows, T) bool, True at the first token of a document and at position 0,
            or None when documents are not kept apart.
    """

    inputs: Tensor
    targets: Tensor
    document_starts: Tensor | None


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
        sequence_length: T.
        global_batch: windows per optimiser step, over all ranks and micro-batches.
        seed: not negative.
        document_starts: (documents,) ascending positions of first tokens, to mark them in the
            batches.

    Raises:
        PHAError: a value out of range, or fewer windows than one global batch.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        global_batch: int,
        seed: int,
        document_starts: np.ndarray | None = None,
    ) -> None:
        if sequence_length < 1 or global_batch < 1 or seed < 0:
            raise PHAError(
                "sequence length and global batch must be at least 1 and the seed at least 0, "
                f"but they are {sequence_length}, {global_batch} and {seed}"
            )
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
        self._seed = seed
        self._starts = document_starts
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> Batch:
        """The whole global batch of a step (counted from 0 over all epochs)."""
        return self.rows(step, 0, self.global_batch)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows `start` to `stop` (exclusive) of `batch(step)`, for one rank or micro-batch.

        Raises:
            PHAError: a negative step, or rows that the global batch does not have.
        """
        import torch

        if step < 0 or not 0 <= start <= stop <= self.global_batch:
            raise PHAError(
                f"no rows {start}..{stop} in step {step}: steps count from 0 and a global batch "
                f"has {self.global_batch} rows"
            )
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.global_batch
        windows = self._epoch_order(epoch)[first + start : first + stop]
        begins = windows * self.sequence_length
        positions = begins[:, None] + np.arange(self.sequence_length + 1)
        ids = torch.from_numpy(np.asarray(self._tokens[positions], dtype=np.int64))
        starts = None if self._starts is None else torch.from_numpy(self._start_mask(begins))
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), starts)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """A permutation of the windows for this epoch (only the latest is kept).

        It is the sorting order of raw PCG64 output, which numpy promises to keep between versions,
        unlike `Generator.permutation`.
        """
        if self._order is None or self._order[0] != epoch:
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
            self._order = (epoch, np.argsort(bits.random_raw(self.windows), kind="stable"))
        return self._order[1]

    def _start_mask(self, begins: np.ndarray) -> np.ndarray:
        """(rows, T) bool for the windows that begin at the positions `begins` (rows,)."""
        assert self._starts is not None
        mask = np.zeros((len(begins), self.sequence_length), dtype=bool)
        mask[:, 0] = True
        low = np.searchsorted(self._starts, begins)
        high = np.searchsorted(self._starts, begins + self.sequence_length)
        for row, begin in enumerate(begins):
            mask[row, self._starts[low[row] : high[row]] - begin] = True
        return mask


class EvaluationWindow(NamedTuple):
    """A stretch of tokens to score.

    Inputs are `tokens[start:end]` and targets `tokens[start + 1 : end + 1]`; the loss counts from
    position `first_scored` of the window (0-based) to its end.
    """

    start: int
    end: int
    first_scored: int


def evaluation_windows(
    total_tokens: int, sequence_length: int, stride: int | None = None
) -> Iterator[EvaluationWindow]:
    """Windows that score each of the tokens 1 .. total_tokens - 1 exactly once, in order.

    Window j starts at `j * stride` and has `sequence_length` inputs, the last one fewer if the
    tokens end. With the default stride, `sequence_length`, windows do not overlap and everything
    in them is scored. With a smaller stride a window scores what earlier ones have not: its last
    `stride` positions, each of which sees at least `sequence_length - stride` inputs before its
    own; only the first window scores everything in it.

    Raises:
        PHAError: fewer than 2 tokens, or a stride that is not in 1 .. sequence_length.
    """
    stride = sequence_length if stride is None else stride
    if total_tokens < 2:
        raise PHAError(f"{total_tokens} tokens leave nothing to predict: give at least 2")
    if not 1 <= stride <= sequence_length:
        raise PHAError(
            f"stride {stride} is not in 1..{sequence_length} (the sequence length): tokens would "
            "be left out"
        )
    return _evaluation_windows(total_tokens - 1, sequence_length, stride)


def _evaluation_windows(inputs: int, length: int, stride: int) -> Iterator[EvaluationWindow]:
    scored = 0
    for start in range(0, inputs, stride):
        end = min(start + length, inputs)
        yield EvaluationWindow(start, end, scored - start)
        scored = end
        if scored == inputs:
            return
