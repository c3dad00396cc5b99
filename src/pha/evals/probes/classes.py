"""Loss by kind of token: new, or the end of an n-gram that occurred before, and how far back."""

from __future__ import annotations

import numpy as np

from pha.evals.compare import BLOCK_TOKENS
from pha.evals.perplexity import evaluate
from pha.evals.probes.reading import Panel, Progress, Question, Reading, points_of
from pha.evals.protocols import Protocol
from pha.evals.where import (
    NGRAMS,
    context_starts,
    find_repeats,
    ngram_bins,
    octave_bins,
    octaves,
    reference_split,
)
from pha.loading import LoadedModel

FIRST_NATS = 2.0
"""Copies count for recall efficiency where the first one cost more."""


def classes(loaded: LoadedModel, question: Question, progress: Progress | None = None) -> Reading:
    """Loss by the longest repeated n-gram that a token completes, and by distance of its copy.

    Windows have the trained length T unless told otherwise. *Recall efficiency* is 1 less the nats
    of second occurrences in a window over those of the first ones, over pairs whose first cost more
    than `FIRST_NATS`: how much of what was to be recalled is recalled. Which pairs these are is the
    model's own matter.
    """
    store, split, total = question.store, question.split, len(question.tokens()) - 1
    size = question.reach(total) if question.length else question.trained
    protocol = Protocol(size, size)
    nats = np.empty(max(0, total), dtype=np.float32)
    evaluate(
        *(loaded.model, store, split, protocol),
        precision=question.precision,
        max_tokens=total,
        losses=nats,
        piece=question.piece,
        progress=progress,
    )
    blocks = np.arange(total) // BLOCK_TOKENS
    found = find_repeats(store, split, context_starts(store, split, protocol))
    kinds = ngram_bins(found, reference_split(store, split))
    panels = [
        Panel(
            *("by repeated n-gram", "nats per token"),
            points_of(nats, kinds.members[:total], kinds.labels, blocks),
        )
    ]
    last = octaves(1, size)
    for n in NGRAMS[1:]:
        earlier = found[n].earlier[:total]
        distance = octave_bins(found[n].distance[:total], 1, size)
        name, axis = "bigrams" if n == 2 else f"{n}-grams", "distance of the copy (tokens)"
        members = np.where(earlier >= 0, distance.members, -1)
        nats_by_distance = points_of(nats, members, distance.labels, blocks, places=last)
        # Entry i of the losses is of token i + 1.
        first = nats[earlier - 1]
        pairs = (earlier >= 0) & (found[n].earlier[earlier - 1] < 0) & (first > FIRST_NATS)
        members = np.where(pairs, distance.members, -1)
        recalled = points_of(first - nats, members, distance.labels, blocks, first, last)
        panels += [
            Panel(f"repeated {name}", "nats per token", nats_by_distance, axis),
            Panel(f"second {name}", "recall efficiency", recalled, axis, chance=0.0),
        ]
    return Reading("classes", question.protocol(length=size), panels)
