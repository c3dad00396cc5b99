"""Losses token by token, against single windows and the loop of transformers' users."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from pha.data import TokenStore
from pha.evals.losses import context_starts, token_losses
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.loading import LoadedModel
from pha.modeling import PHAForCausalLM

STARTS = np.array([0, 40, 41, 100, 777], dtype=np.int64)


@pytest.fixture(scope="module")
def model(writer: LoadedModel) -> PHAForCausalLM:
    return writer.model


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
    ours = evaluate(model, store, sequence_length=max_length - 1, stride=stride)
    assert scored == ours.tokens == len(tokens) - 1
    assert ours.loss == pytest.approx(total / scored, rel=1e-5)
    assert ours.perplexity == pytest.approx(math.exp(total / scored), rel=1e-5)


def test_their_windows_that_do_not_overlap_leave_tokens_out(
    model: PHAForCausalLM, store: TokenStore
) -> None:
    tokens = store.tokens("test")
    length = 64
    total, scored = sliding_loop(model, tokens, length, length)
    assert scored == len(tokens) - math.ceil(len(tokens) / length)
    # Alone, such a window is one of ours with a token less, and its first token goes unscored.
    parts = [
        model(torch.from_numpy(part.astype(np.int64))[None]).logits[0, :-1].log_softmax(-1)
        for part in np.split(tokens, range(length, len(tokens), length))
    ]
    targets = [part[1:] for part in np.split(tokens, range(length, len(tokens), length))]
    by_hand = sum(
        -float(log[torch.arange(len(t)), torch.from_numpy(t.astype(np.int64))].double().sum())
        for log, t in zip(parts, targets, strict=True)
    )
    assert total == pytest.approx(by_hand, rel=1e-5)


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
    losses = token_losses(model, store, "test", protocol)
    first = context_starts(store, "test", protocol)
    tokens = torch.from_numpy(store.tokens("test").astype(np.int64))
    assert losses.nats.shape == losses.hits.shape == first.shape == (len(tokens) - 1,)
    assert losses.nats.dtype == np.float32
    for target in (1, 2, 39, 40, 41, 42, 64, 65, 100, 101, 130, 776, 777, 778, len(tokens) - 1):
        context = tokens[first[target - 1] : target]
        assert 1 <= len(context) <= length
        with torch.no_grad():
            log = model.eval()(context[None]).logits[0, -1].log_softmax(-1)
        nats = -float(log[tokens[target]])
        assert losses.nats[target - 1] == pytest.approx(nats, abs=2e-5)
        assert losses.hits[target - 1] == (int(log.argmax()) == int(tokens[target]))


def windows_by_hand(total: int, length: int, stride: int, starts: np.ndarray | None) -> list[int]:
    """First token seen when each of the tokens 1 .. total - 1 is predicted."""
    found = []
    for target in range(1, total):
        # The first window whose targets, start + 1 .. start + length, include it.
        window = max(0, -(-(target - length) // stride)) * stride
        if starts is not None:
            window = max(window, *(int(s) for s in starts if s <= target - 1))
        found.append(window)
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "stride"), [(64, 64), (64, 32), (33, 7), (10, 1), (9999, 500)])
def test_contexts_by_hand(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, length: int, stride: int, packed: bool
) -> None:
    monkeypatch.setattr(TokenStore, "document_starts", lambda *_: STARTS)
    found = context_starts(store, "test", Protocol(length, stride, packed))
    total = store.counts("test").tokens
    assert found.tolist() == windows_by_hand(total, length, stride, STARTS if packed else None)


def test_batches_change_nothing_and_sums_are_those_of_evaluate(
    model: PHAForCausalLM, store: TokenStore
) -> None:
    protocol = Protocol(48, 20)
    one = token_losses(model, store, "test", protocol, batch_tokens=1)
    many = token_losses(model, store, "test", protocol, batch_tokens=1000)
    np.testing.assert_allclose(many.nats, one.nats, atol=2e-5)
    total = evaluate(model, store, sequence_length=48, stride=20, batch_tokens=1000)
    assert total.loss == pytest.approx(many.nats.astype(np.float64).mean(), rel=1e-12)
    assert total.accuracy == many.hits.mean()


def test_progress_and_mode(model: PHAForCausalLM, store: TokenStore) -> None:
    seen: list[tuple[int, int]] = []
    model.train()
    try:
        token_losses(
            model,
            store,
            "validation",
            Protocol(64, 64),
            batch_tokens=640,
            progress=lambda *counts: seen.append(counts),
        )
        assert model.training
    finally:
        model.eval()
    assert seen[0] == (10, seen[-1][0])
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_result_names_its_protocol(model: PHAForCausalLM, store: TokenStore) -> None:
    settings = {"sequence_length": 64, "max_tokens": 128}
    named = evaluate(model, store, **settings, name="mine")
    plain = evaluate(model, store, **settings)
    assert named.protocol == {"name": "mine"} | plain.protocol
    same = dataclasses.replace(named, protocol=plain.protocol, seconds=plain.seconds)
    assert same == plain
