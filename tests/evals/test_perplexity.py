"""Evaluation against computations with all logits, PyTorch's cross-entropy and others' loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pha.data import TokenStore
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.evals.where import context_starts
from pha.loading import LoadedModel
from pha.modeling import PHAForCausalLM
from pha.utils.errors import PHAError

STARTS = np.array([0, 40, 41, 100, 777], dtype=np.int64)


@pytest.fixture(scope="module")
def model(writer: LoadedModel) -> PHAForCausalLM:
    return writer.pha


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
    result = evaluate(model, store, "test", Protocol(length, stride))
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
    protocol = Protocol(48, 48, name="mine")
    many, one = (np.empty(store.counts("test").tokens - 1, dtype=np.float32) for _ in range(2))
    whole = evaluate(model, store, "test", protocol, batch_tokens=1000, losses=many)
    single = evaluate(model, store, "test", protocol, batch_tokens=1, losses=one)
    np.testing.assert_allclose(many, one, atol=2e-5)
    assert whole.loss == pytest.approx(many.astype(np.float64).mean(), rel=1e-12)
    assert single.loss == pytest.approx(whole.loss, rel=1e-6)
    assert whole.protocol["name"] == "mine"
    sums: list[torch.Tensor] = []

    def keep(s: torch.Tensor) -> torch.Tensor:
        sums.append(s.clone())
        return s

    for rank in range(3):
        evaluate(model, store, "test", protocol, batch_tokens=48, share=(rank, 3), reduce=keep)
    nll, hits, tokens = torch.stack(sums).sum(0).tolist()
    assert tokens == whole.tokens
    assert nll / tokens == pytest.approx(whole.loss, rel=1e-6)
    assert hits / tokens == whole.accuracy


def test_part_of_a_split_says_so(model: PHAForCausalLM, store: TokenStore) -> None:
    result = evaluate(model, store, "test", Protocol(32, 32), max_tokens=100)
    assert result.tokens == 100
    assert result.protocol["whole_split"] is False
    total, _, _ = by_hand(model, store.tokens("test")[:101], 32, 32)
    assert result.loss == pytest.approx(total / 100, rel=1e-6)


def test_mode_is_restored_and_mistakes_are_clear(model: PHAForCausalLM, store: TokenStore) -> None:
    seen: list[tuple[int, int]] = []
    protocol = Protocol(32, 32)
    model.train()
    try:
        evaluate(
            model,
            store,
            "test",
            protocol,
            max_tokens=640,
            batch_tokens=320,
            progress=lambda *counts: seen.append(counts),
        )
        assert model.training
    finally:
        model.eval()
    assert seen == [(10, 20), (20, 20)]
    with pytest.raises(PHAError, match="no dev split"):
        evaluate(model, store, "dev", protocol)
    with pytest.raises(PHAError, match="2 are needed"):
        evaluate(model, store, "test", protocol, max_tokens=0)


def sliding_loop(
    model: PHAForCausalLM, tokens: np.ndarray, max_length: int, stride: int
) -> tuple[float, int]:
    """Sliding windows of a model of fixed length, as transformers' page on perplexity has them.

    Windows of `max_length` tokens are both input and labels; labels of tokens that an earlier
    window had are -100. Returns the total loss and the number of labels that count after the
    model's own shift, which drops the first of each window.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    size, previous = ids.shape[1], 0
    total, scored = 0.0, 0
    for begin in range(0, size, stride):
        end = min(begin + max_length, size)
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : previous - begin] = -100
        with torch.no_grad():
            loss = model.eval()(window, labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        total += float(loss) * count
        scored += count
        previous = end
        if end == size:
            break
    return total, scored


@pytest.mark.parametrize(
    ("max_length", "stride"), [(65, 64), (65, 16), (33, 32), (40, 7), (301, 50)]
)
def test_equals_the_loop_for_models_of_fixed_length(
    model: PHAForCausalLM, store: TokenStore, max_length: int, stride: int
) -> None:
    tokens = store.tokens("test")
    total, scored = sliding_loop(model, tokens, max_length, stride)
    # Their windows of L tokens predict L - 1 of them; ours of T inputs predict T.
    ours = evaluate(model, store, "test", Protocol(max_length - 1, stride))
    assert scored == ours.tokens == len(tokens) - 1
    assert ours.loss == pytest.approx(total / scored, rel=1e-5)
    assert ours.perplexity == pytest.approx(math.exp(total / scored), rel=1e-5)


def test_their_windows_that_do_not_overlap_leave_tokens_out(
    model: PHAForCausalLM, store: TokenStore
) -> None:
    tokens = store.tokens("test")
    length = 64
    _, scored = sliding_loop(model, tokens, length, length)
    assert scored == len(tokens) - math.ceil(len(tokens) / length)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "stride"), [(64, 64), (33, 7), (5000, 5000)])
def test_each_loss_is_that_of_its_context_alone(
    model: PHAForCausalLM,
    store: TokenStore,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    stride: int,
    packed: bool,
) -> None:
    monkeypatch.setattr(TokenStore, "document_starts", lambda *_: STARTS)
    protocol = Protocol(length, stride, packed)
    tokens = torch.from_numpy(store.tokens("test").astype(np.int64))
    nats = np.empty(len(tokens) - 1, dtype=np.float32)
    evaluate(model, store, "test", protocol, losses=nats)
    first = context_starts(store, "test", protocol)
    assert nats.shape == first.shape
    for target in (1, 2, 39, 40, 41, 42, 64, 65, 100, 101, 130, 776, 777, 778, len(tokens) - 1):
        context = tokens[first[target - 1] : target]
        assert 1 <= len(context) <= length
        with torch.no_grad():
            log = model.eval()(context[None]).logits[0, -1].log_softmax(-1)
        assert nats[target - 1] == pytest.approx(-float(log[tokens[target]]), abs=2e-5)
