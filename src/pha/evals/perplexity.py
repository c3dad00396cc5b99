"""Perplexity and accuracy over a whole split, with the protocol recorded beside the numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pha.data.store import TokenStore
from pha.evals.protocols import Protocol, Window
from pha.loading import LanguageModel
from pha.results import Evaluation
from pha.utils.errors import PHAError
from pha.utils.hardware import autocast, synchronise
from pha.utils.processes import turns

BATCH_TOKENS = 8192


def evaluate(
    model: LanguageModel,
    store: TokenStore,
    split: str,
    protocol: Protocol,
    *,
    precision: str = "fp32",
    batch_tokens: int = BATCH_TOKENS,
    max_tokens: int | None = None,
    share: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    losses: np.ndarray | None = None,
    piece: int | None = None,
) -> Evaluation:
    """Score every token of a split but its first, each exactly once.

    Args:
        model: in evaluation mode or not; its mode is restored.
        store: tokens made by the model's own tokenizer.
        split: which split, of N tokens.
        protocol: the windows.
        precision: fp32, or bf16 for autocast.
        batch_tokens: tokens per forward pass; a longer window goes alone.
        max_tokens: score only the first so many tokens; words and bytes are then estimated from
            the split's ratios, and the protocol says so.
        share: (rank, ranks) when several processes take turns at the windows.
        reduce: sums a float64 tensor over those processes.
        progress: called with (windows done, windows in all).
        losses: (N - 1,), to be filled: entry i with -log p of token i + 1, in nats.
        piece: see `score_rows`.

    Raises:
        PHAError: no such split, or fewer than two tokens.
    """
    counts = store.counts(split)
    read = counts.tokens if max_tokens is None else min(counts.tokens, max_tokens + 1)
    if read < 2:
        raise PHAError(f"the {split} split of {store.path} gives {read} tokens; 2 are needed")
    batches = _batches(protocol, read, batch_tokens)
    tokens = store.tokens(split)
    starts: np.ndarray | None = None
    if protocol.packed_documents:
        starts = np.zeros(len(tokens), dtype=bool)
        starts[store.document_starts(split)] = True
    sums = torch.zeros(3, dtype=torch.float64)  # negative log-likelihood, hits, tokens
    begin, done = time.perf_counter(), 0
    shape: tuple[int, ...] | None = None
    was_training = model.training
    model.eval()
    try:
        for batch, counts_here in turns(batches, share):
            ids = np.stack([tokens[w.start : w.end + 1].astype(np.int64) for w in batch])
            marks = None
            if starts is not None:
                marks = np.stack([starts[w.start : w.end] for w in batch])
            wanted = np.arange(batch[0].first_scored, ids.shape[1] - 1)
            shape = shape or ids.shape
            # The last rows, which are fewer or shorter, are not worth compiling for.
            with torch.compiler.set_stance("default" if ids.shape == shape else "force_eager"):
                nats, hits = score_rows(model, ids, wanted, precision, marks, piece)
            if not counts_here:
                continue
            found = [nats.sum(dtype="float64"), hits.sum(), nats.size]
            sums += torch.tensor(found, dtype=torch.float64)
            if losses is not None:
                for window, values in zip(batch, nats, strict=True):
                    losses[window.start + window.first_scored : window.end] = values
            done += len(batch)
            if progress is not None:
                progress(done, sum(map(len, batches)))
    finally:
        model.train(was_training)
    synchronise(model.device)
    if reduce is not None:
        sums = reduce(sums)
    nll, right, scored = sums.tolist()
    # All but the first token are scored; words and bytes are those of the whole split.
    part = read / counts.tokens
    words, size = (counts.words + counts.lines) * part, counts.bytes * part
    return Evaluation(
        split=split,
        **figures(nll, int(right), int(scored), words, size),
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


def figures(nll: float, hits: int, tokens: int, words: float, size: float) -> dict[str, Any]:
    """What `Evaluation` says of a text, by name, from its sums.

    These are the negative log-likelihood in nats, separators between documents included, how many
    `tokens` were scored and how many hit, words and line ends, and UTF-8 bytes.
    """
    return {
        "loss": nll / tokens,
        "perplexity": _exp(nll / tokens),
        "word_perplexity": _exp(nll / words) if words else math.inf,
        "byte_perplexity": _exp(nll / size),
        "bits_per_byte": nll / size / math.log(2),
        "accuracy": hits / tokens,
    }


def _batches(protocol: Protocol, tokens: int, batch_tokens: int) -> list[list[Window]]:
    """The windows of so many tokens in order, as many of equal shape as `batch_tokens` holds."""
    found = []
    rows = max(1, batch_tokens // protocol.sequence_length)
    windows = protocol.windows(tokens)
    for _, group in groupby(windows, lambda w: (w.end - w.start, w.first_scored)):
        while batch := list(islice(group, rows)):
            found.append(batch)
    return found


@torch.inference_mode()
def score_rows(
    model: LanguageModel,
    rows: np.ndarray,
    wanted: np.ndarray,
    precision: str = "fp32",
    marks: np.ndarray | None = None,
    piece: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses in nats and hits, each (B, W), of what follows W positions of rows of tokens.

    Only the states at these positions meet the output head.

    Args:
        model: in evaluation mode.
        rows: (B, T + 1) ids, each row a text of its own.
        wanted: (W,) positions from 0 to T - 1, ascending.
        precision: fp32, or bf16 for autocast.
        marks: (B, T) document starts, which reset state and attention.
        piece: longer rows without `marks` go through the model in pieces of so many tokens, their
            state carried along, which bounds the memory and changes no number but by rounding;
            None for all at once.

    Raises:
        PHAError: a model that does not go on from its cache.
    """
    device = model.device
    ids = torch.from_numpy(rows).to(device)
    starts = None if marks is None else torch.from_numpy(marks).to(device)
    length = ids.shape[1] - 1
    size = length if piece is None or starts is not None else min(piece, length)
    cache = model.new_cache() if size < length else None
    found = []
    for begin in range(0, length, size):
        here = wanted[(wanted >= begin) & (wanted < begin + size)]
        at = torch.from_numpy(here).to(device)
        with autocast(device.type, precision):
            x = model.states(ids[:, begin : min(begin + size, length)], starts, cache)
            nats, hits = model.token_statistics(
                x[:, at - begin].flatten(0, 1), ids[:, at + 1].flatten()
            )
        found.append([each.view(len(ids), len(here)) for each in (nats.float(), hits)])
    nats, hits = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return nats.cpu().numpy(), hits.cpu().numpy()


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
