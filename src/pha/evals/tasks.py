"""Loss and accuracy on the answers of a task, with how far back they reach."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pha.evals.perplexity import BATCH_TOKENS
from pha.loading import LanguageModel
from pha.results import Evaluation, Part
from pha.tasks.task import IGNORE, Drawn
from pha.tasks.testing import BLOCK, TaskTest
from pha.utils.hardware import autocast, synchronise

OCTAVES = 32  # of distances, which end far below 2^32


def evaluate_task(
    model: LanguageModel,
    test: TaskTest,
    split: str,
    *,
    for_validation: bool = False,
    max_tokens: int | None = None,
    precision: str = "fp32",
    share: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Score the answers of a test; only their states meet the output head.

    Args:
        model: in evaluation mode or not; its mode is restored.
        test: what is asked.
        split: what the result calls it.
        for_validation: ask the sequences of validation, which are others.
        max_tokens: read only about so many tokens of them.
        precision: fp32, or bf16 for autocast.
        share: (rank, ranks) when several processes take turns.
        reduce: sums a float64 tensor over those processes.

    Returns:
        Scores of answers; what is per word or byte is not a number. `parts` are octaves of the
        distance, 1 for 1, 2 for 2 and 3, 4 for 4 to 7 tokens.
    """
    rows = None if max_tokens is None else max(1, max_tokens // test.length)
    # For each octave: answers, nats, hits, nats of the best predictor.
    sums = torch.zeros(OCTAVES, 4, dtype=torch.float64)
    begin, was_training, knows_best = time.perf_counter(), model.training, False
    model.eval()
    try:
        for drawn, counts in test.blocks(for_validation, rows, share):
            best = test.task.best(drawn)
            knows_best = best is not None
            best = np.zeros(drawn.labels.shape) if best is None else best
            many = max(1, BATCH_TOKENS // drawn.tokens.shape[1])
            # The last block may have fewer rows, and as many passes.
            for first in range(0, min(BLOCK, test.rows, rows or BLOCK), many):
                new = counts and first < len(drawn.tokens)
                here = slice(first, first + many) if new else slice(many)
                _add(sums if new else torch.zeros_like(sums), model, drawn, best, here, precision)
    finally:
        model.train(was_training)
    synchronise(model.device)
    if reduce is not None:
        sums = reduce(sums)
    parts = {
        str(1 << octave): _part(values, knows_best)
        for octave, values in enumerate(sums.tolist())
        if values[0]
    }
    whole = _part(sums.sum(0).tolist(), knows_best)
    return Evaluation(
        split=split,
        loss=whole.loss,
        perplexity=math.exp(min(whole.loss, 700.0)),
        word_perplexity=math.nan,
        byte_perplexity=math.nan,
        bits_per_byte=math.nan,
        accuracy=whole.accuracy,
        tokens=whole.answers,
        words=math.nan,
        bytes=math.nan,
        seconds=time.perf_counter() - begin,
        protocol=test.describe() | {"precision": precision},
        best=whole.best,
        parts=parts,
    )


def _part(sums: Sequence[float], knows_best: bool) -> Part:
    answers, nats, hits, best = sums
    best_nats = best / answers if knows_best else None
    return Part(int(answers), nats / answers, hits / answers, best_nats)


@torch.inference_mode()
def _add(
    sums: Tensor,
    model: LanguageModel,
    drawn: Drawn,
    best: np.ndarray,
    rows: slice,
    precision: str,
) -> None:
    """Add what the model makes of some rows to the sums of their octaves."""
    device, labels = model.device, drawn.labels[rows]
    asked = labels != IGNORE
    targets = torch.from_numpy(labels[asked]).to(device)
    places = torch.from_numpy(asked.ravel().nonzero()[0]).to(device)
    with autocast(device.type, precision):
        x = model.states(torch.from_numpy(np.ascontiguousarray(drawn.tokens[rows])).to(device))
        nats, hits = model.token_statistics(x.flatten(0, 1)[places], targets)
    distances = np.broadcast_to(1 + np.arange(labels.shape[1]), labels.shape)
    if drawn.distances is not None:
        distances = drawn.distances[rows]
    octaves = np.frexp(distances[asked])[1] - 1
    values = np.stack(
        [np.ones(len(octaves)), nats.cpu().double(), hits.cpu().double(), best[rows][asked]],
        axis=1,
    )
    sums.index_add_(0, torch.from_numpy(octaves).long(), torch.from_numpy(values))
