"""Perplexity and accuracy over a whole split, with the protocol recorded beside the numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pha.data.sampler import EvaluationWindow, evaluation_windows
from pha.data.store import TokenStore
from pha.modeling import PHAForCausalLM
from pha.ops import token_statistics
from pha.utils.errors import PHAError
from pha.utils.hardware import PRECISIONS, synchronise


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on a split.

    Attributes:
        split: name of the split.
        loss: mean negative log-likelihood per token, in nats.
        perplexity: exp(loss), per token.
        word_perplexity: exp(total NLL / (whitespace words + line ends)).
        byte_perplexity: exp(total NLL / UTF-8 bytes).
        bits_per_byte: total NLL / UTF-8 bytes, in bits.
        accuracy: fraction of tokens that were the top prediction.
        tokens: tokens scored.
        words: words and line ends they spell.
        bytes: UTF-8 bytes they spell.
        seconds: wall time.
        protocol: how it was measured.
    """

    split: str
    loss: float
    perplexity: float
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    accuracy: float
    tokens: int
    words: float
    bytes: float
    seconds: float
    protocol: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return asdict(self)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _batches(windows: list[EvaluationWindow], batch_size: int) -> Iterator[list[EvaluationWindow]]:
    """Group consecutive windows of equal shape, at most `batch_size` at a time."""
    group: list[EvaluationWindow] = []
    for window in windows:
        same = group and (group[0][1] - group[0][0], group[0][2]) == (
            window[1] - window[0],
            window[2],
        )
        if group and (not same or len(group) == batch_size):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def evaluate(
    model: PHAForCausalLM,
    store: TokenStore,
    split: str = "test",
    *,
    sequence_length: int,
    stride: int | None = None,
    packed_documents: bool = False,
    precision: str = "fp32",
    batch_tokens: int = 8192,
    max_tokens: int | None = None,
    share: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
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

    Raises:
        PHAError: no such split, or too few tokens.
    """
    if split not in store.splits:
        raise PHAError(f"{store.path} has no {split} split; it has {', '.join(store.splits)}")
    stride = sequence_length if stride is None else stride
    if not 1 <= stride <= sequence_length:
        raise PHAError(f"stride is {stride}; it must be from 1 to {sequence_length}")
    tokens = store.tokens(split)
    total = len(tokens) if max_tokens is None else min(len(tokens), max_tokens + 1)
    if total < 2:
        raise PHAError(f"the {split} split of {store.path} has {len(tokens)} tokens; 2 are needed")
    windows = list(evaluation_windows(total, sequence_length, stride))[share[0] :: share[1]]
    starts = np.zeros(0, dtype=bool)
    if packed_documents:
        starts = np.zeros(len(tokens), dtype=bool)
        starts[store.document_starts(split)] = True
    device = model.device
    autocast = torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")
    sums = torch.zeros(3, dtype=torch.float64)  # negative log-likelihood, hits, tokens
    begin, done, was_training = time.perf_counter(), 0, model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast:
            for group in _batches(windows, max(1, batch_tokens // sequence_length)):
                first = group[0][2]
                rows = np.stack([tokens[s : e + 1].astype(np.int64) for s, e, _ in group])
                ids = torch.from_numpy(rows).to(device)
                document_starts = None
                if packed_documents:
                    document_starts = torch.from_numpy(np.stack([starts[s:e] for s, e, _ in group]))
                    document_starts = document_starts.to(device)
                x = model.model(input_ids=ids[:, :-1], document_starts=document_starts)
                nll, hits = token_statistics(
                    x[:, first:].flatten(0, 1), model.lm_head.weight, ids[:, first + 1 :].flatten()
                )
                sums[0] += float(nll.double().sum())
                sums[1] += float(hits.sum())
                sums[2] += nll.numel()
                done += len(group)
                if progress is not None:
                    progress(done, len(windows))
    finally:
        model.train(was_training)
    synchronise(device)
    if reduce is not None:
        sums = reduce(sums)
    nll_sum, hit_sum, scored = sums.tolist()
    counts = store.counts(split)
    # All but the first token are scored; words and bytes are those of the whole split.
    fraction = 1.0 if total == len(tokens) else total / len(tokens)
    words, size = (counts.words + counts.lines) * fraction, counts.bytes * fraction
    loss = nll_sum / scored
    return Evaluation(
        split=split,
        loss=loss,
        perplexity=_exp(loss),
        word_perplexity=_exp(nll_sum / words) if words else math.inf,
        byte_perplexity=_exp(nll_sum / size),
        bits_per_byte=nll_sum / size / math.log(2),
        accuracy=hit_sum / scored,
        tokens=int(scored),
        words=words,
        bytes=size,
        seconds=time.perf_counter() - begin,
        protocol={
            "sequence_length": sequence_length,
            "stride": stride,
            "windows": "non-overlapping" if stride == sequence_length else "sliding",
            "documents": "state and attention reset at document starts"
            if packed_documents
            else "document boundaries ignored",
            "tokens_scored": int(scored),
            "whole_split": total == len(tokens),
            "precision": precision,
            "data_sha256": store.sha256,
        },
    )
