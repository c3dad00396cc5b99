"""Probes of a text: loss by position, by context and by kind of token, and planted repeats."""

from __future__ import annotations

import numpy as np

from pha.data.sampler import SPAN, Planter
from pha.evals.compare import BLOCK_TOKENS, MIN_BLOCKS
from pha.evals.perplexity import BATCH_TOKENS, evaluate, score_rows
from pha.evals.probes.reading import Panel, Point, Progress, Question, Reading, points_of, stage
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
from pha.utils.errors import PHAError

STRETCHES = 64
"""Spans of targets at most, in the probe `context`."""

FIRST_NATS = 2.0
"""Copies count for recall efficiency where the first one cost more."""

PLANTED, FIRST_GAP, SEED = 32, 64, 0
"""Rows of the probe `planted`, its shortest gap but none, and what its tokens are drawn by."""


def _losses(
    loaded: LoadedModel, question: Question, size: int, total: int, progress: Progress | None
) -> np.ndarray:
    """(total,) float32 nats of the tokens after the first, in windows of `size`."""
    found = np.empty(max(0, total), dtype=np.float32)
    evaluate(
        *(loaded.model, question.store, question.split, Protocol(size, size)),
        precision=question.precision,
        max_tokens=total,
        losses=found,
        piece=question.piece,
        progress=progress,
    )
    return found


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
    nats = [
        _losses(loaded, question, size, total, stage(progress, number, 2))
        for number, size in enumerate([length] if length <= trained else [length, trained])
    ]
    places = np.arange(total) % length + 1
    labels, members = octave_bins(places, trained, length)[1:]
    blocks, last = np.arange(total) // BLOCK_TOKENS, octaves(trained, length)
    of_place = points_of(nats[0], members, labels, blocks, places=last)
    beyond = np.where(places > trained, members, -1)
    gained = points_of(nats[0] - nats[-1], beyond, labels, blocks, places=last)
    axis = "position (tokens)"
    reference = labels[last.index(min(trained, length))]
    same = f"the same tokens: this window less one of {trained:,}"
    return Reading(
        "position",
        question.protocol(length=length, windows=total // length),
        [
            Panel("loss by position", "nats per token", of_place, axis, reference=reference),
            Panel(same, "nats per token", gained, axis, chance=0.0),
        ],
    )


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
    panel = Panel(
        *("the same targets with more context", "nats per token", points),
        axis="tokens of context",
        reference=points[-1].label,
    )
    protocol = question.protocol(length=contexts[-1], spans=count, span=span)
    return Reading("context", protocol, [panel])


def classes(loaded: LoadedModel, question: Question, progress: Progress | None = None) -> Reading:
    """Loss by the longest repeated n-gram that a token completes, and by distance of its copy.

    Windows have the trained length T unless told otherwise. *Recall efficiency* is 1 less the nats
    of second occurrences in a window over those of the first ones, over pairs whose first cost more
    than `FIRST_NATS`: how much of what was to be recalled is recalled. Which pairs these are is the
    model's own matter.

    Raises:
        PHAError: a text shorter than the longest n-gram.
    """
    store, split, total = question.store, question.split, len(question.tokens()) - 1
    if total < max(NGRAMS):
        raise PHAError(f"the {split} split has too few tokens; take more text")
    size = question.reach(total) if question.length else question.trained
    nats = _losses(loaded, question, size, total, progress)
    blocks = np.arange(total) // BLOCK_TOKENS
    found = find_repeats(store, split, context_starts(store, split, Protocol(size, size)))
    kinds = ngram_bins(found, reference_split(store, split))
    by_kind = points_of(nats, kinds.members[:total], kinds.labels, blocks)
    panels = [Panel("by repeated n-gram", "nats per token", by_kind)]
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
    spans = np.stack([planter.draw([SEED, number]) for number in range(PLANTED)])
    begin = np.linspace(0, most - gaps[-1], PLANTED).astype(np.int64)
    points = []
    for number, gap in enumerate(gaps):
        shown = stage(progress, number, len(gaps))
        text = tokens[begin[:, None] + np.arange(SPAN + gap)].astype(np.int64)
        rows = np.concatenate([text[:, :SPAN], spans, text[:, SPAN:], spans], axis=1)
        copies = np.arange(SPAN) + np.array([[SPAN], [2 * SPAN + gap]]) - 1
        at_once, gains = max(1, BATCH_TOKENS // rows.shape[1]), []
        for start in range(0, PLANTED, at_once):
            nats, _ = score_rows(
                *(loaded.model, rows[start : start + at_once], copies.ravel()),
                precision=question.precision,
                piece=question.piece,
            )
            first, second = nats.astype(np.float64).reshape(-1, 2, SPAN).sum(axis=2).T
            gains += (first - second).tolist()
            if shown is not None:
                shown(len(gains), PLANTED)
        weights = [float(SPAN)] * PLANTED
        points.append(Point(f"{gap:,}", PLANTED * SPAN, gains, weights, max(gap, FIRST_GAP / 4)))
    panel = Panel(
        *("gain of a planted repeat", "nats per token", points), axis="gap (tokens)", chance=0.0
    )
    protocol = question.protocol(length=gaps[-1], probes=PLANTED, span=SPAN, seed=SEED)
    return Reading("planted", protocol, [panel])
