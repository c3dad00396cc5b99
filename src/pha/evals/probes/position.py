"""Loss by position in long windows, and beside it that of the same tokens in short ones."""

from __future__ import annotations

import numpy as np

from pha.evals.compare import BLOCK_TOKENS, MIN_BLOCKS
from pha.evals.perplexity import evaluate
from pha.evals.probes.reading import Panel, Progress, Question, Reading, points_of, stage
from pha.evals.protocols import Protocol
from pha.evals.where import octave_bins, octaves
from pha.loading import LoadedModel
from pha.utils.errors import PHAError


def position(loaded: LoadedModel, question: Question, progress: Progress | None = None) -> Reading:
    """Mean loss by octave of position, and what the long window changes for the same tokens.

    Whole windows of L tokens, one after the other, so that every octave is of the same windows;
    unless told otherwise, L leaves as many windows as an interval needs. The second panel sets the
    loss of each token against its loss where windows have the trained length T.

    Raises:
        PHAError: less text than a window.
    """
    trained, most = question.trained, len(question.tokens()) - 1
    if most < 2:
        raise PHAError(f"the {question.split} split has too few tokens; take more text")
    room = most if question.length is not None else max(most // MIN_BLOCKS, min(trained, most))
    length = question.reach(room)
    total = most // length * length
    nats = []
    for number, size in enumerate([length] if length <= trained else [length, trained]):
        losses = np.empty(total, dtype=np.float32)
        evaluate(
            *(loaded.model, question.store, question.split, Protocol(size, size)),
            precision=question.precision,
            max_tokens=total,
            losses=losses,
            piece=question.piece,
            progress=stage(progress, number, 2),
        )
        nats.append(losses)
    places = np.arange(total) % length + 1
    labels, members = octave_bins(places, trained, length)[1:]
    blocks, last = np.arange(total) // BLOCK_TOKENS, octaves(trained, length)
    of_place = points_of(nats[0], members, labels, blocks, places=last)
    beyond = np.where(places > trained, members, -1)
    gained = points_of(nats[0] - nats[-1], beyond, labels, blocks, places=last)
    axis = "position (tokens)"
    reference = labels[last.index(min(trained, length))]
    return Reading(
        "position",
        question.protocol(length=length, windows=total // length),
        [
            Panel("loss by position", "nats per token", of_place, axis, reference=reference),
            Panel(
                f"the same tokens: this window less one of {trained:,}",
                *("nats per token", gained, axis),
                chance=0.0,
            ),
        ],
    )
