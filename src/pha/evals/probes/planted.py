"""Planted repeats: random tokens in a text, and again after a gap."""

from __future__ import annotations

import numpy as np

from pha.data.planting import SPAN, Planter
from pha.evals.perplexity import BATCH_TOKENS, score_rows
from pha.evals.probes.reading import Panel, Point, Progress, Question, Reading, stage
from pha.evals.where import reference_split
from pha.loading import LoadedModel
from pha.utils.errors import PHAError

PROBES = 32
FIRST_GAP = 64
SEED = 0


def planted(loaded: LoadedModel, question: Question, progress: Progress | None = None) -> Reading:
    """How many nats a token costs less where it stands in the text a second time.

    A row is `SPAN` tokens of the text, `SPAN` random ones drawn by their frequency in training, a
    gap of further text, and the random ones again. The gain is the loss of the first copy less that
    of the second. Gaps are 0, 64, 256, ... tokens; all of them share text and random tokens, which
    are a function of `SEED` alone. A row is a block of the intervals.

    Raises:
        PHAError: a text shorter than a row without a gap.
    """
    tokens = question.tokens()
    most = len(tokens) - 2 * SPAN
    if most < 2:
        raise PHAError(f"the {question.split} split has too few tokens; take more text")
    reach = question.reach(most, 3 * SPAN)
    gaps = [0]
    while (gap := 4 * gaps[-1] or FIRST_GAP) <= reach:
        gaps.append(gap)
    planter = Planter(question.store.frequencies(reference_split(question.store, question.split)))
    spans = np.stack([planter.draw([SEED, number]) for number in range(PROBES)])
    begin = np.linspace(0, most - gaps[-1], PROBES).astype(np.int64)
    points = []
    for number, gap in enumerate(gaps):
        shown = stage(progress, number, len(gaps))
        text = tokens[begin[:, None] + np.arange(SPAN + gap)].astype(np.int64)
        rows = np.concatenate([text[:, :SPAN], spans, text[:, SPAN:], spans], axis=1)
        copies = np.arange(SPAN) + np.array([[SPAN], [2 * SPAN + gap]]) - 1
        at_once, gains = max(1, BATCH_TOKENS // rows.shape[1]), []
        for start in range(0, PROBES, at_once):
            nats, _ = score_rows(
                *(loaded.model, rows[start : start + at_once], copies.ravel()),
                precision=question.precision,
                piece=question.piece,
            )
            first, second = nats.astype(np.float64).reshape(-1, 2, SPAN).sum(axis=2).T
            gains += (first - second).tolist()
            if shown is not None:
                shown(len(gains), PROBES)
        weights = [float(SPAN)] * PROBES
        points.append(Point(f"{gap:,}", PROBES * SPAN, gains, weights, max(gap, FIRST_GAP / 4)))
    return Reading(
        "planted",
        question.protocol(length=gaps[-1], probes=PROBES, span=SPAN, seed=SEED),
        [
            Panel(
                *("gain of a planted repeat", "nats per token", points),
                axis="gap (tokens)",
                chance=0.0,
            )
        ],
    )
