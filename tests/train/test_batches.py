from __future__ import annotations

import threading
import time

import pytest
import torch

from pha.data import TokenStore
from pha.data.sampler import WindowSampler
from pha.train.batches import BatchFeed, dropout_seed

CPU = torch.device("cpu")
PIECES = [(1, 3), (3, 4)]


@pytest.fixture
def sampler(store: TokenStore) -> WindowSampler:
    tokens, starts = store.tokens("train"), store.document_starts("train")
    return WindowSampler(tokens, 16, 5, seed=3, document_starts=starts)


@pytest.mark.parametrize("ahead", [False, True])
def test_pieces_come_as_the_sampler_has_them_in_any_order(
    sampler: WindowSampler, ahead: bool
) -> None:
    last = sampler.steps_per_epoch - 1
    places = [(0, 0), (0, 1), (1, 0), (last, 1), (last + 1, 0), (0, 1), (0, 0), (0, 0)]
    with BatchFeed(sampler, PIECES, CPU, ahead) as feed:
        for step, piece in places:
            inputs, batch = feed.get(step, piece), sampler.batch(step, *PIECES[piece])
            assert torch.equal(inputs["input_ids"], batch.inputs)
            assert torch.equal(inputs["shift_labels"], batch.targets)
            assert batch.document_starts is not None
            assert torch.equal(inputs["document_starts"], batch.document_starts)


def test_the_next_piece_is_read_before_it_is_asked_for(
    sampler: WindowSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    original = WindowSampler.batch

    def rows(self: WindowSampler, *place: int) -> object:
        read.append(place)
        return original(self, *place)

    monkeypatch.setattr(WindowSampler, "batch", rows)
    feed = BatchFeed(sampler, PIECES, CPU, ahead=True)
    with feed:
        feed.get(0, 1)
        assert feed.next is not None
        feed.next[1].result()
        assert read == [(0, 3, 4), (1, 1, 3)]
        feed.get(1, 0)
        feed.next[1].result()
        assert read == [(0, 3, 4), (1, 1, 3), (1, 3, 4)]
    assert feed.thread is not None
    with pytest.raises(RuntimeError, match="shutdown"):
        feed.thread.submit(print)


def test_what_was_read_ahead_is_not_waited_for(
    sampler: WindowSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = WindowSampler.batch

    def rows(self: WindowSampler, *place: int) -> object:
        time.sleep(0.2)
        return original(self, *place)

    monkeypatch.setattr(WindowSampler, "batch", rows)
    for ahead in (False, True):
        with BatchFeed(sampler, PIECES, CPU, ahead) as feed:
            feed.get(0, 0)
            assert feed.waited >= 0.2
            if feed.next is not None:
                feed.next[1].result()
            feed.get(0, 1)
        assert (feed.waited < 0.4) == ahead


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for(
    sampler: WindowSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(WindowSampler, "batch", fail)
    with BatchFeed(sampler, PIECES, CPU, ahead=True) as feed, pytest.raises(OSError, match="disk"):
        feed.get(0, 0)


@pytest.mark.parametrize(("name", "chosen"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_the_reading_thread_pins_for_its_own_card(
    sampler: WindowSampler, name: str, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pin_memory` opens a context on the card that is current in its thread."""
    used: list[tuple[int, str]] = []
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        used.append((threading.get_ident(), str(current)))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with BatchFeed(sampler, PIECES, torch.device(name), ahead=True) as feed:
        monkeypatch.setattr(feed, "_move", lambda tensors: tensors)
        feed.get(0, 0)
    assert current == chosen
    assert all(thread != threading.get_ident() for thread, _ in used)
    assert all(seen == str(chosen) for _, seen in used)
    assert bool(used) == (name != "cpu")


def test_dropout_depends_on_seed_sequence_and_part() -> None:
    base = (3, 5, 0)
    drawn = []
    # What differs by 2^32 or more is the same to a CPU's generator.
    for numbers in (base, base, (4, 5, 0), (3 + (1 << 40), 5, 0), (3, 6, 0), (3, 5, 1)):
        torch.manual_seed(dropout_seed(*numbers))
        drawn.append(tuple(torch.rand(4).tolist()))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == len(drawn) - 1
