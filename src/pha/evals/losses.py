"""The loss of every token of a split, window by window: what all figures here are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from pha.data.sampler import EvaluationWindow, evaluation_windows
from pha.data.store import TokenStore
from pha.evals.protocols import Protocol
from pha.modeling import PHAForCausalLM
from pha.utils.errors import PHAError
from pha.utils.hardware import PRECISIONS

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class ScoredBatch:
    """Windows of equal shape that went through the model together.

    Attributes:
        windows: B consecutive ones.
        nats: (B, S) float32, -log p of the targets that each window scores.
        hits: (B, S) bool, whether the target was the top prediction.
    """

    windows: list[EvaluationWindow]
    nats: np.ndarray
    hits: np.ndarray


@dataclass(frozen=True)
class TokenLosses:
    """A split of N tokens, scored; entry i is of token i + 1, since nothing predicts the first.

    Attributes:
        nats: (N - 1,) float32, -log p.
        hits: (N - 1,) bool, whether the token was the top prediction.
    """

    nats: np.ndarray
    hits: np.ndarray


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
    if split not in store.splits:
        raise PHAError(f"{store.path} has no {split} split; it has {', '.join(store.splits)}")
    count = store.counts(split).tokens
    total = count if max_tokens is None else min(count, max_tokens + 1)
    if total < 2:
        raise PHAError(f"the {split} split of {store.path} has {count} tokens; 2 are needed")
    return list(evaluation_windows(total, protocol.sequence_length, protocol.stride)), total


@contextmanager
def evaluation_mode(model: PHAForCausalLM) -> Iterator[None]:
    """The model without dropout; the mode it was in returns afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def score_windows(
    model: PHAForCausalLM,
    store: TokenStore,
    split: str,
    protocol: Protocol,
    windows: list[EvaluationWindow],
    *,
    precision: str = "fp32",
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[ScoredBatch]:
    """Score windows in order. Only the states at scored positions meet the output head.

    Args:
        model: in evaluation mode.
        store: tokens made by the model's own tokenizer.
        split: which split.
        protocol: whether documents are kept apart.
        windows: from `split_windows`.
        precision: fp32, or bf16 for autocast.
        batch_tokens: inputs per forward pass; a longer window goes alone.
    """
    tokens = store.tokens(split)
    starts: np.ndarray | None = None
    if protocol.packed_documents:
        starts = np.zeros(len(tokens), dtype=bool)
        starts[store.document_starts(split)] = True
    for batch in _batches(windows, max(1, batch_tokens // protocol.sequence_length)):
        rows = np.stack([tokens[w.start : w.end + 1].astype(np.int64) for w in batch])
        marks = None
        if starts is not None:
            marks = np.stack([starts[w.start : w.end] for w in batch])
        yield ScoredBatch(batch, *_score(model, rows, marks, batch[0].first_scored, precision))


def token_losses(
    model: PHAForCausalLM,
    store: TokenStore,
    split: str,
    protocol: Protocol,
    *,
    precision: str = "fp32",
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> TokenLosses:
    """The loss of every token of a split but its first; the arguments are those of `evaluate`.

    Memory: 5 bytes a token, besides the model.

    Raises:
        PHAError: no such split, or too few tokens.
    """
    windows, total = split_windows(store, split, protocol)
    nats = np.empty(total - 1, dtype=np.float32)
    hits = np.empty(total - 1, dtype=bool)
    done = 0
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
            for window, values, right in zip(batch.windows, batch.nats, batch.hits, strict=True):
                scored = slice(window.start + window.first_scored, window.end)
                nats[scored], hits[scored] = values, right
            done += len(batch.windows)
            if progress is not None:
                progress(done, len(windows))
    return TokenLosses(nats, hits)


def context_starts(store: TokenStore, split: str, protocol: Protocol) -> np.ndarray:
    """(N - 1,) int64: the first token that the model sees when token i + 1 is scored.

    It is the first of the window, or of the document that token i is in where documents are kept
    apart.

    Raises:
        PHAError: see `split_windows`.
    """
    windows, total = split_windows(store, split, protocol)
    first = np.empty(total - 1, dtype=np.int64)
    for window in windows:
        first[window.start + window.first_scored : window.end] = window.start
    if protocol.packed_documents:
        starts = store.document_starts(split)
        inputs = np.arange(total - 1)
        documents = starts[np.searchsorted(starts, inputs, side="right") - 1]
        np.maximum(first, documents, out=first)
    return first


def _batches(windows: list[EvaluationWindow], batch_size: int) -> Iterator[list[EvaluationWindow]]:
    """Group consecutive windows of equal shape, at most `batch_size` at a time."""
    group: list[EvaluationWindow] = []
    for window in windows:
        same = group and _shape(group[0]) == _shape(window)
        if group and (not same or len(group) == batch_size):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _shape(window: EvaluationWindow) -> tuple[int, int]:
    return window.end - window.start, window.first_scored


@torch.inference_mode()
def _score(
    model: PHAForCausalLM,
    rows: np.ndarray,
    marks: np.ndarray | None,
    first: int,
    precision: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and hits, each (B, T - first), of rows (B, T + 1) and document starts (B, T)."""
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
