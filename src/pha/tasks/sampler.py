"""Batches of a task: a pure function of seed and step, as those of a text are."""

from __future__ import annotations

import numpy as np

from pha.data.sampler import Batch
from pha.tasks.task import IGNORE, Drawn, Task, generator

TRAIN, VALIDATION, TEST = range(3)
"""Streams of random numbers that never meet."""


class TaskSampler:
    """Training batches of a task: fresh sequences at every step.

    The global batch of a step is drawn whole, so the same step gives the same rows however they are
    cut into micro-batches and shared by processes. numpy may change what its generators draw from
    version to version; a run compares a hash of what is drawn before it goes on.

    Args:
        task: what is drawn.
        sequence_length: T of a row, which holds as many of the task's sequences as fit.
        global_batch: rows of an optimiser step.
        seed: not negative.
    """

    def __init__(self, task: Task, sequence_length: int, global_batch: int, seed: int) -> None:
        self.task, self.sequence_length, self.global_batch = task, sequence_length, global_batch
        self._seed = seed
        self._latest: tuple[int, Drawn] | None = None

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """The global batch of a step, counted from 0, or what its rows start:stop hold."""
        import torch

        if self._latest is None or self._latest[0] != step:
            random = generator(TRAIN, self._seed, step)
            self._latest = (step, self.task.draw(random, self.global_batch, self.sequence_length))
        drawn = self._latest[1]
        in_row = len(drawn.tokens) // self.global_batch
        stop = self.global_batch if stop is None else stop
        rows = slice(start * in_row, stop * in_row)
        tokens, labels = (
            torch.from_numpy(np.ascontiguousarray(x[rows])) for x in (drawn.tokens, drawn.labels)
        )
        return Batch(tokens, labels, None, int((drawn.labels != IGNORE).sum()))
