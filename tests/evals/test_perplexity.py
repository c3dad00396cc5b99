"""Evaluation against a computation with all logits and PyTorch's own cross-entropy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pha.data import TokenStore
from pha.evals.perplexity import evaluate
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.utils.errors import PHAError


@pytest.fixture(scope="module")
def model(store: TokenStore) -> PHAForCausalLM:
    torch.manual_seed(0)
    config = PHAConfig.from_preset(
        "pha-tiny",
        vocab_size=store.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=32,
        head_dim=8,
    )
    return PHAForCausalLM(config)


def by_hand(
    model: PHAForCausalLM, tokens: np.ndarray, length: int, stride: int
) -> tuple[float, int, int]:
    """Total loss, hits and tokens: each window alone, its last unscored tokens counted."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    total, hits, scored = 0.0, 0, 1
    start = 0
    while scored < len(ids):
        end = min(start + length, len(ids) - 1)
        with torch.no_grad():
            logits = model.eval()(ids[None, start:end]).logits[0].double()
        targets = ids[start + 1 : end + 1]
        new = slice(scored - start - 1, None)
        total += float(F.cross_entropy(logits[new], targets[new], reduction="sum"))
        hits += int((logits[new].argmax(-1) == targets[new]).sum())
        scored = end + 1
        start += stride
    return total, hits, scored - 1


@pytest.mark.parametrize(("length", "stride"), [(64, 64), (50, 50), (64, 16), (33, 7)])
def test_equals_the_plain_computation(
    model: PHAForCausalLM, store: TokenStore, length: int, stride: int
) -> None:
    total, hits, scored = by_hand(model, store.tokens("test"), length, stride)
    assert scored == len(store.tokens("test")) - 1
    result = evaluate(model, store, "test", sequence_length=length, stride=stride)
    counts = store.counts("test")
    assert result.tokens == scored
    assert result.loss == pytest.approx(total / scored, rel=1e-6)
    assert result.accuracy == hits / scored
    assert result.perplexity == pytest.approx(math.exp(total / scored), rel=1e-6)
    words = counts.words + counts.lines
    assert result.word_perplexity == pytest.approx(math.exp(total / words), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / counts.bytes / math.log(2), rel=1e-6)
    assert result.byte_perplexity == pytest.approx(2**result.bits_per_byte, rel=1e-6)
    assert result.protocol["stride"] == stride


def test_batching_and_sharing_change_nothing(model: PHAForCausalLM, store: TokenStore) -> None:
    whole = evaluate(model, store, "test", sequence_length=48)
    single = evaluate(model, store, "test", sequence_length=48, batch_tokens=1)
    assert single.loss == pytest.approx(whole.loss, rel=1e-6)
    sums: list[torch.Tensor] = []
    for rank in range(3):
        evaluate(
            model,
            store,
            "test",
            sequence_length=48,
            share=(rank, 3),
            reduce=lambda s: (sums.append(s.clone()), s)[1],
        )
    nll, hits, tokens = torch.stack(sums).sum(0).tolist()
    assert tokens == whole.tokens
    assert nll / tokens == pytest.approx(whole.loss, rel=1e-6)
    assert hits / tokens == whole.accuracy


def test_packed_documents_are_scored_as_if_alone(
    model: PHAForCausalLM, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = np.array([0, 40, 41, 100, 777], dtype=np.int64)
    monkeypatch.setattr(TokenStore, "document_starts", lambda *_: starts)
    result = evaluate(model, store, "test", sequence_length=64, packed_documents=True)
    ids = torch.from_numpy(store.tokens("test").astype(np.int64))
    total = 0.0
    cuts = sorted({*range(0, len(ids) - 1, 64), *starts.tolist(), len(ids) - 1})
    for begin, end in itertools.pairwise(cuts):
        with torch.no_grad():
            logits = model.eval()(ids[None, begin:end]).logits[0]
        total += float(F.cross_entropy(logits, ids[begin + 1 : end + 1], reduction="sum"))
    assert result.loss == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert result.loss != evaluate(model, store, "test", sequence_length=64).loss


def test_part_of_a_split_says_so(model: PHAForCausalLM, store: TokenStore) -> None:
    result = evaluate(model, store, "test", sequence_length=32, max_tokens=100)
    assert result.tokens == 100
    assert result.protocol["whole_split"] is False
    total, _, _ = by_hand(model, store.tokens("test")[:101], 32, 32)
    assert result.loss == pytest.approx(total / 100, rel=1e-6)


def test_mode_is_restored_and_mistakes_are_clear(model: PHAForCausalLM, store: TokenStore) -> None:
    model.train()
    evaluate(model, store, "test", sequence_length=32, max_tokens=64)
    assert model.training
    with pytest.raises(PHAError, match="no dev split"):
        evaluate(model, store, "dev", sequence_length=32)
    with pytest.raises(PHAError, match="stride is 33"):
        evaluate(model, store, "test", sequence_length=32, stride=33)
