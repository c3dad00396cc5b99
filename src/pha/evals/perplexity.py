"""Perplexity and accuracy over a whole split, with the protocol recorded beside the numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pha.data.sampler import EvaluationWindow, evaluation_windows
from pha.data.store import TokenStore
from pha.evals.protocols import Protocol
from pha.modeling import PHAForCausalLM
from pha.results import Evaluation
from pha.utils.errors import PHAError
from pha.utils.hardware import PRECISIONS, synchronise

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class ScoredBatch:
    """Windows of equal shape that went through the model together.

    Attributes:
        windows: B consecutive ones.
        nats: (B, S) float32, -log p of the targets that each window scores.
        hits: (B, S) bool, whether the target was the top prediction.
    """

    windows: Sequence[EvaluationWindow]
    nats: np.ndarray
    hits: np.ndarray


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
    each: Callable[[ScoredBatch], None] | None = None,
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
        batch_tokens: tokens per forward pass; a longer window goes alone.
        max_tokens: score only the first so many tokens; words and bytes are then estimated from
            the split's ratios, and the protocol says so.
        share: (rank, ranks) when several processes take turns at the windows.
        reduce: sums a float64 tensor over those processes.
        progress: called with (windows done, windows in all).
        each: called with every batch, for what wants the loss of each token.
        name: what the result calls its protocol.

    Raises:
        PHAError: no such split, too few tokens, or an impossible length or stride.
    """
    stride = sequence_length if stride is None else stride
    protocol = Protocol(sequence_length, stride, packed_documents, name)
    windows, read = split_windows(store, split, protocol, max_tokens)
    windows = windows[share[0] :: share[1]]
    sums = torch.zeros(3, dtype=torch.float64)  # negative log-likelihood, hits, tokens
    begin, done = time.perf_counter(), 0
    was_training = model.training
    model.eval()
    try:
        for batch in _score(model, store, split, protocol, windows, precision, batch_tokens):
            sums[0] += float(batch.nats.sum(dtype="float64"))
            sums[1] += int(batch.hits.sum())
            sums[2] += batch.nats.size
            done += len(batch.windows)
            if each is not None:
                each(batch)
            if progress is not None:
                progress(done, len(windows))
    finally:
        model.train(was_training)
    synchronise(model.device)
    if reduce is not None:
        sums = reduce(sums)
    nll, hits, scored = sums.tolist()
    # All but the first token are scored; words and bytes are those of the whole split.
    counts = store.counts(split)
    part = read / counts.tokens
    words, size = (counts.words + counts.lines) * part, counts.bytes * part
    return Evaluation(
        split=split,
        **figures(nll, int(hits), int(scored), words, size),
        tokens=int(scored),
        words=words,
        bytes=size,
        seconds=time.perf_counter() - begin,
        protocol=protocol.describe()
        | {
            "tokens_scored": int(scored),
            "whole_split": read == counts.tokens,
            "precision": precision,
            "data_sha256": store.sha256,
        },
    )


def token_losses(
    model: PHAForCausalLM, store: TokenStore, split: str, protocol: Protocol, **settings: Any
) -> tuple[Evaluation, np.ndarray]:
    """What `evaluate` says of a whole split, with the loss of every token of it but the first.

    Args:
        model: see `evaluate`.
        store: see `evaluate`.
        split: which split, of N tokens.
        protocol: the windows.
        settings: `precision`, `batch_tokens` and `progress` of `evaluate`.

    Returns:
        The evaluation, and (N - 1,) float32: entry i is -log p of token i + 1.

    Raises:
        PHAError: no such split, or too few tokens.
    """
    nats = np.empty(max(0, store.counts(split).tokens - 1), dtype=np.float32)

    def keep(batch: ScoredBatch) -> None:
        for window, values in zip(batch.windows, batch.nats, strict=True):
            nats[window.start + window.first_scored : window.end] = values

    evaluation = evaluate(
        model,
        store,
        split,
        sequence_length=protocol.sequence_length,
        stride=protocol.stride,
        packed_documents=protocol.packed_documents,
        name=protocol.name,
        each=keep,
        **settings,
    )
    return evaluation, nats


def figures(nll: float, hits: int, tokens: int, words: float, size: float) -> dict[str, float]:
    """What `Evaluation` says of a text, by name, from its sums.

    Args:
        nll: negative log-likelihood in nats, separators between documents included.
        hits: tokens that were the top prediction.
        tokens: tokens scored.
        words: words and line ends.
        size: UTF-8 bytes.
    """
    return {
        "loss": nll / tokens,
        "perplexity": _exp(nll / tokens),
        "word_perplexity": _exp(nll / words) if words else math.inf,
        "byte_perplexity": _exp(nll / size),
        "bits_per_byte": nll / size / math.log(2),
        "accuracy": hits / tokens,
    }


def split_windows(
    store: TokenStore, split: str, protocol: Protocol, max_tokens: int | None = None
) -> tuple[list[EvaluationWindow], int]:
    """The windows of a protocol over a split, or over its first tokens.

    Args:
        store: tokens.
        split: which split.
        protocol: the windows.
        max_tokens: score only the first so many tokens.

    Returns:
        The windows, and how many tokens they read: one more than they score.

    Raises:
        PHAError: no such split, or fewer than two tokens.
    """
    count = store.counts(split).tokens
    total = count if max_tokens is None else min(count, max_tokens + 1)
    if total < 2:
        raise PHAError(f"the {split} split of {store.path} has {count} tokens; 2 are needed")
    return list(evaluation_windows(total, protocol.sequence_length, protocol.stride)), total


def _score(
    model: PHAForCausalLM,
    store: TokenStore,
    split: str,
    protocol: Protocol,
    windows: Sequence[EvaluationWindow],
    precision: str,
    batch_tokens: int,
) -> Iterator[ScoredBatch]:
    """Score windows in order, as many of equal shape at a time as `batch_tokens` holds."""
    tokens = store.tokens(split)
    starts: np.ndarray | None = None
    if protocol.packed_documents:
        starts = np.zeros(len(tokens), dtype=bool)
        starts[store.document_starts(split)] = True
    rows = max(1, batch_tokens // protocol.sequence_length)
    for (_, first), group in groupby(windows, lambda w: (w.end - w.start, w.first_scored)):
        alike = list(group)
        for begin in range(0, len(alike), rows):
            batch = alike[begin : begin + rows]
            ids = np.stack([tokens[w.start : w.end + 1].astype(np.int64) for w in batch])
            marks = None
            if starts is not None:
                marks = np.stack([starts[w.start : w.end] for w in batch])
            yield ScoredBatch(batch, *_losses(model, ids, marks, first, precision))


@torch.inference_mode()
def _losses(
    model: PHAForCausalLM, rows: np.ndarray, marks: np.ndarray | None, first: int, precision: str
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and hits, each (B, T - first), of rows (B, T + 1) and document starts (B, T).

    Only the states at scored positions meet the output head.
    """
    device = model.device
    ids = torch.from_numpy(rows).to(device)
    starts = None if marks is None else torch.from_numpy(marks).to(device)
    with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
        body = model.model(input_ids=ids[:, :-1], document_starts=starts, use_cache=False)
        x = body.last_hidden_state
        nats, hits = model.token_statistics(
            x[:, first:].flatten(0, 1), ids[:, first + 1 :].flatten()
        )
    shape = len(rows), -1
    return nats.view(shape).float().cpu().numpy(), hits.view(shape).cpu().numpy()


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
