"""The same targets with more and more context before them."""

from __future__ import annotations

import numpy as np

from pha.evals.perplexity import BATCH_TOKENS, score_rows
from pha.evals.probes.reading import Panel, Point, Progress, Question, Reading, stage
from pha.loading import LoadedModel
from pha.utils.errors import PHAError

STRETCHES = 64


def context(loaded: LoadedModel, question: Question, progress: Progress | None = None) -> Reading:
    """Loss of fixed targets with T/4, T/2, ... tokens before the first of them.

    The targets are up to `STRETCHES` spans of T/4 tokens, evenly spread over the text. They are the
    same ones for every amount of context, so later positions are no other tokens. A span is a block
    of the intervals.

    Raises:
        PHAError: less text than a span with its context.
    """
    tokens, span = question.tokens(), max(1, question.trained // 4)
    most = len(tokens) - span
    if most < 2 * span:
        raise PHAError(
            f"{len(tokens):,} tokens of the {question.split} split leave no room for targets with "
            f"{span:,} and {2 * span:,} tokens before them; take more text"
        )
    reach = question.reach(most, span)
    contexts = [span << k for k in range(reach.bit_length()) if span << k <= reach]
    if len(contexts) < 2:
        raise PHAError(f"with {reach:,} tokens there is nothing to compare; ask for more")
    count = max(1, min(STRETCHES, (most - contexts[-1]) // span + 1))
    first = np.linspace(contexts[-1], most, count).astype(np.int64)  # target of each span
    points = []
    for number, before in enumerate(contexts):
        shown, wanted = (
            stage(progress, number, len(contexts)),
            np.arange(before - 1, before + span - 1),
        )
        rows, sums = max(1, BATCH_TOKENS // (before + span)), []
        for start in range(0, count, rows):
            index = first[start : start + rows, None] - before + np.arange(before + span)
            nats, _ = score_rows(
                *(loaded.model, tokens[index].astype(np.int64), wanted, question.precision),
                piece=question.piece,
            )
            sums += nats.sum(axis=1, dtype=np.float64).tolist()
            if shown is not None:
                shown(len(sums), count)
        points.append(Point(f"{before:,}", count * span, sums, [float(span)] * count, before))
    return Reading(
        "context",
        question.protocol(length=contexts[-1], spans=count, span=span),
        [
            Panel(
                *("the same targets with more context", "nats per token", points),
                axis="tokens of context",
                reference=points[-1].label,
            )
        ],
    )
