"""Scoring a document of any length in pieces, with the model's state carried along."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pha.data.encoding import TextEncoder, cut
from pha.evals.perplexity import figures
from pha.loading import LoadedModel
from pha.utils.errors import PHAError
from pha.utils.hardware import autocast, peak_memory

_EARLY_TOKENS = 8192  # where memory is first looked at, to be compared with the end


@dataclass(frozen=True)
class Surprisal:
    """A piece of a document, scored.

    Attributes:
        ids: (T,) tokens.
        nats: (T,) float32, -log p of each token given all before it; not a number for the first
            token of the document, which nothing predicts.
        hits: (T,) bool, whether it was the top prediction.
    """

    ids: np.ndarray
    nats: np.ndarray
    hits: np.ndarray


@dataclass(frozen=True)
class Score:
    """What a model makes of a document.

    The figures are those of `pha.results.Scores`.

    Attributes:
        tokens: scored, so all but the first.
        words: whitespace words and line ends.
        bytes: of UTF-8.
        memory_early: most bytes held after 8,192 tokens.
        memory_end: most bytes held at the end.
        protocol: how it was measured.
    """

    name: str
    tokens: int
    words: int
    bytes: int
    loss: float
    perplexity: float
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    accuracy: float
    seconds: float
    tokens_per_second: float
    memory_early: int
    memory_end: int
    protocol: dict[str, Any]


@torch.inference_mode()
def stream(
    loaded: LoadedModel, parts: Iterator[str], piece: int = 2048, precision: str = "fp32"
) -> Iterator[Surprisal]:
    """Score a text piece by piece; the numbers are those of one forward pass over all of it.

    Args:
        loaded: model and tokenizer.
        parts: the text, in any division.
        piece: tokens per forward pass.
        precision: fp32, or bf16 for autocast.

    Raises:
        PHAError: a piece of less than one token.
    """
    model, device = loaded.model, loaded.model.device
    cache = model.new_cache()
    previous: torch.Tensor | None = None  # hidden state at the last token of the piece before
    for array in TextEncoder(loaded.tokenizer).in_pieces(parts, piece):
        ids = torch.from_numpy(array).to(device)
        with autocast(device.type, precision):
            hidden = model.states(ids[None], cache=cache)[0]
            before = hidden[:-1] if previous is None else torch.cat([previous, hidden[:-1]])
            targets = ids[1:] if previous is None else ids
            nats, hits = model.token_statistics(before, targets)
        values, right = nats.float().cpu().numpy(), hits.cpu().numpy()
        if previous is None:
            values = np.concatenate([[np.float32(math.nan)], values])
            right = np.concatenate([[False], right])
        previous = hidden[-1:]
        yield Surprisal(array, values, right)


def score(
    loaded: LoadedModel,
    name: str,
    parts: Iterator[str],
    *,
    piece: int = 2048,
    precision: str = "fp32",
    each: Callable[[Surprisal], None] | None = None,
) -> Score:
    """Score a document and sum up; `each` is called with every piece, as `stream` yields it.

    Raises:
        PHAError: fewer than two tokens.
    """
    words = size = seen = hits = early = 0
    total = 0.0

    def counted() -> Iterator[str]:
        nonlocal words, size
        for part in cut(parts):  # not within a word
            words += len(part.split()) + part.count("\n")
            size += len(part.encode())
            yield part

    begin = time.perf_counter()
    device = loaded.model.device
    for surprisal in stream(loaded, counted(), piece, precision):
        known = surprisal.nats[np.isfinite(surprisal.nats)] if not seen else surprisal.nats
        total += float(known.sum(dtype=np.float64))
        hits += int(surprisal.hits.sum())
        seen += len(surprisal.ids)
        if early == 0 and seen >= _EARLY_TOKENS:
            early = peak_memory(device)
        if each is not None:
            each(surprisal)
    tokens = seen - 1
    if tokens < 1:
        raise PHAError(f"{name} has {seen} tokens; at least 2 are needed to predict anything")
    seconds = time.perf_counter() - begin
    return Score(
        name=name,
        tokens=tokens,
        words=words,
        bytes=size,
        **figures(total, hits, tokens, words, size),
        seconds=seconds,
        tokens_per_second=seen / seconds,
        memory_early=early or peak_memory(device),
        memory_end=peak_memory(device),
        protocol={
            "windows": "one document, state carried from piece to piece",
            "piece": piece,
            "attention_window": getattr(loaded.model.config, "sliding_window", None),
            "first_token": "not scored",
            "precision": precision,
        },
    )
