from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pha.data.sampler import WindowSampler
from tests.data.conftest import Refuses


def test_windows_cover_every_target_once_per_epoch() -> None:
    tokens = np.arange(4 * 12 + 1, dtype=np.uint16)
    sampler = WindowSampler(tokens, sequence_length=4, global_batch=3, seed=1)
    assert sampler.windows == 12
    assert sampler.steps_per_epoch == 4
    for epoch in range(2):
        batches = [sampler.batch(epoch * 4 + step) for step in range(4)]
        targets = torch.cat([batch.targets for batch in batches])
        assert sorted(targets.flatten().tolist()) == list(range(1, 49))
        for batch in batches:
            assert batch.inputs.dtype == batch.targets.dtype == torch.int64
            assert batch.inputs.shape == (3, 4)
            assert torch.equal(batch.targets, batch.inputs + 1)
            assert batch.document_starts is None


def test_what_fills_no_window_or_batch_is_left_out() -> None:
    sampler = WindowSampler(np.arange(4 * 7 + 1 + 3), sequence_length=4, global_batch=3, seed=0)
    assert (sampler.windows, sampler.steps_per_epoch) == (7, 2)
    seen = [sampler.batch(step).inputs for step in range(2)]
    begins = torch.cat(seen)[:, 0].tolist()
    assert len(set(begins)) == 6
    assert set(begins) < {0, 4, 8, 12, 16, 20, 24}
    short = WindowSampler(np.arange(4 * 7), sequence_length=4, global_batch=3, seed=0)
    assert short.windows == 6


def test_order_is_fixed_for_all_time() -> None:
    sampler = WindowSampler(np.arange(33), sequence_length=4, global_batch=2, seed=0)
    order = [(sampler.batch(step).inputs[:, 0] // 4).tolist() for step in range(8)]
    assert order == [[3, 2], [1, 6], [0, 7], [4, 5], [7, 4], [5, 1], [6, 2], [0, 3]]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    def sampler(seed: int) -> WindowSampler:
        return WindowSampler(np.arange(201), sequence_length=2, global_batch=10, seed=seed)

    used = sampler(5)
    for step in (31, 0, 12, 3):
        used.batch(step)
    assert torch.equal(used.batch(12).inputs, sampler(5).batch(12).inputs)
    assert not torch.equal(used.batch(2).inputs, sampler(6).batch(2).inputs)
    assert not torch.equal(used.batch(2).inputs, used.batch(12).inputs)  # one epoch later


def test_rows_are_slices_of_the_global_batch() -> None:
    starts = np.array([0, 5, 77])
    sampler = WindowSampler(np.arange(101), 5, 6, seed=3, document_starts=starts)
    whole = sampler.batch(4)
    parts = [sampler.batch(4, start, stop) for start, stop in ((0, 1), (1, 4), (4, 6))]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    masks = [part.document_starts for part in parts if part.document_starts is not None]
    assert whole.document_starts is not None
    assert torch.equal(torch.cat(masks), whole.document_starts)
    assert sampler.batch(4, 2, 2).inputs.shape == (0, 5)


@given(
    st.integers(2, 60),
    st.integers(1, 7),
    st.sets(st.integers(1, 59)),
)
def test_document_starts_mark_first_tokens(total: int, length: int, others: set[int]) -> None:
    starts = np.array(sorted({0, *(start for start in others if start < total)}))
    if total - 1 < length:
        return
    sampler = WindowSampler(np.arange(total), length, 1, seed=0, document_starts=starts)
    for step in range(sampler.steps_per_epoch):
        batch = sampler.batch(step)
        assert batch.document_starts is not None
        assert batch.document_starts.dtype == torch.bool
        expected = torch.isin(batch.inputs, torch.from_numpy(starts))
        expected[:, 0] = True
        assert torch.equal(batch.document_starts, expected)


def test_sampler_refuses_what_it_cannot_do(refuses: Refuses) -> None:
    tokens = np.arange(41)
    with refuses("41 tokens", "4 windows of 10", "global batch of 5", "lower"):
        WindowSampler(tokens, 10, 5, seed=0)
    with refuses("0 windows"):
        WindowSampler(tokens[:0], 10, 1, seed=0)
