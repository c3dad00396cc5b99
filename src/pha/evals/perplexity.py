"""Perplexity and accuracy over a whole split, with the protocol recorded beside the numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pha.data.store import TokenStore
from pha.evals.losses import BATCH_TOKENS, evaluation_mode, score_windows, split_windows
from pha.evals.protocols import Protocol
from pha.modeling import PHAForCausalLM
from pha.results import Evaluation
from pha.utils.hardware import synchronise


@dataclass(frozen=True)
class Totals:
    """Sums over the scored tokens of a split.

    Attributes:
        nll: negative log-likelihood in nats, separators between documents included.
        hits: tokens that were the top prediction.
        scored: tokens scored.
        read: tokens read, with the first, which nothing predicts.
        seconds: wall time.
    """

    nll: float
    hits: int
    scored: int
    read: int
    seconds: float


def evaluate(
    model: PHAForCausalLM,
    store: TokenStore,
    split: str = "test",
    *,
    sequence_length: int,
    stride: int | None = None,
    packed_documents: bool = False,
    precision: str = "fp32",
    batch_tokens: int = BATCH_TOKENS,
    max_tokens: int | None = None,
    share: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    name: str = "",
) -> Evaluation:
    """Score every token of a split but its first, each exactly once.

    Windows of `sequence_length` tokens follow one another (the paper's protocol) or advance by
    `stride`, in which case only the tokens not yet scored count, with more context each.

    Args:
        model: in evaluation mode or not; its mode is restored.
        store: tokens made by the model's own tokenizer.
        split: which split.
        sequence_length: T, tokens per window.
        stride: how far windows advance; `sequence_length` when absent.
        packed_documents: reset state and attention at document starts.
        precision: fp32, or bf16 for autocast.
        batch_tokens: tokens per forward pass.
        max_tokens: score only the first so many tokens; words and bytes are then estimated from
            the split's ratios, and the protocol says so.
        share: (rank, ranks) when several processes take turns at the windows.
        reduce: sums a float64 tensor over those processes.
        progress: called with (windows done, windows in all).
        name: what the result calls its protocol.

    Raises:
        PHAError: no such split, too few tokens, or an impossible length or stride.
    """
    stride = sequence_length if stride is None else stride
    protocol = Protocol(sequence_length, stride, packed_documents, name)
    windows, total = split_windows(store, split, protocol, max_tokens)
    windows = windows[share[0] :: share[1]]
    sums = torch.zeros(3, dtype=torch.float64)  # negative log-likelihood, hits, tokens
    begin, done = time.perf_counter(), 0
    with evaluation_mode(model):
        for batch in score_windows(
            model,
            store,
            split,
            protocol,
            windows,
            precision=precision,
            batch_tokens=batch_tokens,
        ):
            sums[0] += float(batch.nats.sum(dtype="float64"))
            sums[1] += int(batch.hits.sum())
            sums[2] += batch.nats.size
            done += len(batch.windows)
            if progress is not None:
                progress(done, len(windows))
    synchronise(model.device)
    if reduce is not None:
        sums = reduce(sums)
    nll, hits, scored = sums.tolist()
    totals = Totals(nll, int(hits), int(scored), total, time.perf_counter() - begin)
    return summarise(store, split, protocol, precision, totals)


def summarise(
    store: TokenStore, split: str, protocol: Protocol, precision: str, totals: Totals
) -> Evaluation:
    """All figures of a split from its sums.

    Args:
        store: where the tokens are from; its counts of words, lines and bytes are of the text.
        split: which split.
        protocol: the windows.
        precision: of the computation.
        totals: the sums. Where less than the whole split was read, words and bytes are estimated.
    """
    counts, nll, scored = store.counts(split), totals.nll, totals.scored
    # All but the first token are scored; words and bytes are those of the whole split.
    whole = totals.read == counts.tokens
    fraction = 1.0 if whole else totals.read / counts.tokens
    words, size = (counts.words + counts.lines) * fraction, counts.bytes * fraction
    loss = nll / scored
    return Evaluation(
        split=split,
        loss=loss,
        perplexity=_exp(loss),
        word_perplexity=_exp(nll / words) if words else math.inf,
        byte_perplexity=_exp(nll / size),
        bits_per_byte=nll / size / math.log(2),
        accuracy=totals.hits / scored,
        tokens=scored,
        words=words,
        bytes=size,
        seconds=totals.seconds,
        protocol=protocol.describe()
        | {
            "tokens_scored": scored,
            "whole_split": whole,
            "precision": precision,
            "data_sha256": store.sha256,
        },
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
