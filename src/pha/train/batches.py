"""Micro-batches on their way to the device: on a GPU the next one is read while one is used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pha.data.sampler import WindowSampler
from pha.ops.linear_cross_entropy import IGNORE_INDEX
from pha.tasks.sampler import TaskSampler


def dropout_seed(seed: int, first: int, part: int) -> int:
    """What torch's generator starts from before a micro-batch.

    A generator on a CPU has but the low 32 bits of it, which therefore depend on everything.

    Args:
        seed: of the run.
        first: the number of the micro-batch's first sequence in the run.
        part: of sequences that are read in pieces.
    """
    return int(np.random.SeedSequence((seed, first, part)).generate_state(1, np.uint64)[0])


def _use(device: torch.device) -> None:
    """Let this thread pin for that card: by itself it would open a context on the first one."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


class BatchFeed:
    """The micro-batches of a run as arguments of the model; a context manager.

    Args:
        sampler: of the global batches.
        pieces: (start, stop) of this process's micro-batches in every global batch, in order.
        device: where they go.
        ahead: whether a thread reads the next one meanwhile; by default on a GPU, where the host
            has time to spare.
        gather: name the places that have a label where not all do, so that only these meet the
            head. Their number varies, so it is not for a compiled graph.

    Attributes:
        waited: seconds that `get` has taken so far, in which the host could do nothing else.
    """

    def __init__(
        self,
        sampler: WindowSampler | TaskSampler,
        pieces: Sequence[tuple[int, int]],
        device: torch.device,
        ahead: bool | None = None,
        gather: bool = True,
    ) -> None:
        self.sampler, self.pieces, self.device = sampler, list(pieces), device
        self.gather = gather
        ahead = device.type == "cuda" if ahead is None else ahead
        self.thread = ThreadPoolExecutor(1, initializer=_use, initargs=(device,)) if ahead else None
        self.next: tuple[tuple[int, int], Future[dict[str, Any]]] | None = None
        self.waited = 0.0

    def __enter__(self) -> BatchFeed:
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)

    def get(self, step: int, piece: int) -> dict[str, Any]:
        """Micro-batch number `piece` of a step, on the device or being copied there.

        Returns:
            `input_ids` and `shift_labels`, (rows, T), and `document_starts`, the same or None;
            `label_places` (N,) in the flattened rows, where it is there; and `labels`, how many
            targets the global batch has.
        """
        begin = time.perf_counter()
        tensors = self._move(self._take((step, piece)))
        self.waited += time.perf_counter() - begin
        return tensors

    def _take(self, place: tuple[int, int]) -> dict[str, Any]:
        """What was read ahead, or is read now; then reading what follows begins."""
        if self.thread is None:
            return self._read(place)
        if self.next is not None and self.next[0] == place:
            tensors = self.next[1].result()
        else:
            tensors = self.thread.submit(self._read, place).result()
        step, piece = place
        following = (step, piece + 1) if piece + 1 < len(self.pieces) else (step + 1, 0)
        self.next = following, self.thread.submit(self._read, following)
        return tensors

    def _read(self, place: tuple[int, int]) -> dict[str, Any]:
        batch = self.sampler.batch(place[0], *self.pieces[place[1]])
        tensors = {
            "input_ids": batch.inputs,
            "shift_labels": batch.targets,
            "document_starts": batch.document_starts,
            "labels": batch.labels,
        }
        if self.gather and not (labelled := batch.targets.flatten() != IGNORE_INDEX).all():
            tensors["label_places"] = labelled.nonzero().flatten()
        if self.device.type != "cuda":
            return tensors
        # Only from pinned memory does a copy not hold up the host.
        return {n: x.pin_memory() if isinstance(x, Tensor) else x for n, x in tensors.items()}

    def _move(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x
            for name, x in tensors.items()
        }
