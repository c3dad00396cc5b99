"""What goes through each branch of a PHA model, how far back it looks, what it is needed for."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
from torch import Tensor

from pha.evals.compare import block_numbers
from pha.evals.perplexity import BATCH_TOKENS, evaluate
from pha.evals.probes.reading import Panel, Point, Progress, Question, Reading, points_of
from pha.evals.protocols import Protocol
from pha.evals.where import reference_split
from pha.loading import LoadedModel
from pha.model import Backbone
from pha.model.silence import Place, averages, branches_of, remembers, silenced
from pha.model.silence import horizon as shortened
from pha.utils.errors import PHAError

TOKENS = 100_000
"""That are scored unless told otherwise."""

MEAN_TOKENS = 65_536
"""Of the training split, which a branch's mean vector is of."""


class Windows:
    """The loss of each token of whole windows of T, under one change of the model or another."""

    def __init__(self, loaded: LoadedModel, question: Question, progress: Progress | None) -> None:
        self.model, self.question, self.progress = loaded.pha, question, progress
        self.branches = branches_of(self.model.model)
        length, known = question.trained, question.store.counts(question.split).tokens - 1
        read = min(known, question.max_tokens or TOKENS)
        windows = read // length
        if windows < 2:
            raise PHAError(
                f"{read:,} of {known:,} tokens of the {question.split} split make {windows} "
                f"windows of {length}, and 2 are needed: take more text, or a shorter "
                "--sequence-length"
            )
        self.batch = max(BATCH_TOKENS, 2 * length)
        windows -= windows > 2 and windows % (self.batch // length) == 1  # alone in a batch
        self.count = windows * length
        self.blocks = block_numbers(self.count, length)
        self.steps = self.done = 0
        self.reference = reference_split(question.store, question.split)
        self.read = min(MEAN_TOKENS, question.store.counts(self.reference).tokens - 1)

    def losses(self, change: AbstractContextManager[Any]) -> np.ndarray:
        """(N,) nats, float64."""
        length, found = self.question.trained, np.empty(self.count, dtype=np.float32)
        with change:
            evaluate(
                *(self.model, self.question.store, self.question.split, Protocol(length, length)),
                precision=self.question.precision,
                batch_tokens=self.batch,
                max_tokens=self.count,
                losses=found,
            )
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.steps)
        return found.astype(np.float64)

    def means(self) -> dict[Place, Tensor]:
        """The mean vector of every branch, behind its norm."""
        store, length = self.question.store, self.question.trained
        with averages(self.model.model, list(self.branches)) as means:
            evaluate(
                *(self.model, store, self.reference, Protocol(length, length)),
                precision=self.question.precision,
                max_tokens=self.read,
            )
        return means

    def rise(
        self,
        whole: np.ndarray,
        change: AbstractContextManager[Any],
        label: str,
        x: float | None = None,
    ) -> Point:
        """What a change costs."""
        lost, every = self.losses(change) - whole, np.zeros(self.count, dtype=np.int64)
        return points_of(lost, every, [label], self.blocks, places=None if x is None else [x])[0]

    def protocol(self) -> dict[str, Any]:
        """What was scored."""
        return self.question.protocol(
            length=self.question.trained,
            tokens_scored=self.count,
            mean_vectors=f"{self.read} tokens of the {self.reference} split",
        )


def horizons_below(length: int) -> list[int]:
    """1, 4, 16, ... below `length`."""
    return list(itertools.takewhile(lambda w: w < length, (4**i for i in itertools.count())))


def horizon(loaded: LoadedModel, question: Question, progress: Progress | None = None) -> Reading:
    """What it costs to let attention, or the state, see only the last w tokens; all else stays.

    Where layers have several kinds of state, all of them are shortened at once, and so are keys.
    w is 1, 4, 16, ... below T. Windows of T are the blocks of the intervals.

    Raises:
        PHAError: a model that is not ours, or less text than two windows.
    """
    asked = Windows(loaded, question, progress)
    far = horizons_below(question.trained)
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for (_, name), branch in asked.branches.items():
        if remembers(branch):
            kinds[branch.keeps_keys].add(name)
    asked.steps = 1 + len(far) * sum(map(bool, kinds.values()))
    whole = asked.losses(nullcontext())
    panels = []
    for keys, title in ((False, "through the state"), (True, "through attention")):
        points = [
            asked.rise(whole, _shortened(asked.model.model, kinds[keys], w), f"{w:,}", float(w))
            for w in (far if kinds[keys] else [])
        ]
        panels.append(
            Panel(
                f"{title}, the last w tokens alone",
                *("nats per token", points),
                axis="w (tokens)",
                chance=0.0,
            )
        )
    return Reading("horizon", asked.protocol(), panels)


@contextmanager
def _shortened(body: Backbone, names: Collection[str], window: int) -> Iterator[None]:
    with ExitStack() as every:
        for name in names:
            every.enter_context(shortened(body, name, window))
        yield


def need(loaded: LoadedModel, question: Question, progress: Progress | None = None) -> Reading:
    """What it costs to put its mean vector in the place of a branch, behind its norm.

    Raises:
        PHAError: a model that is not ours, or less text than two windows.
    """
    asked = Windows(loaded, question, progress)
    places = list(asked.branches)
    names = list(dict.fromkeys(name for _, name in places))
    sets = [(f"{name}, all layers", [p for p in places if p[1] == name]) for name in names]
    sets += [(f"{name}, layer {layer}", [(layer, name)]) for layer, name in places]
    asked.steps = 1 + len(sets)
    whole = asked.losses(nullcontext())
    means = asked.means()
    points = [
        asked.rise(whole, silenced(asked.model.model, chosen, "mean", means), label)
        for label, chosen in sets
    ]
    return Reading(
        "need",
        asked.protocol(),
        [Panel("with its mean in the place of a branch", "nats per token", points, chance=0.0)],
    )
