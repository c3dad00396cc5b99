"""Planted repeats: drawn by frequency, the same for all time, in two places of a row."""

from __future__ import annotations

import numpy as np
import torch

from pha.data.sampler import SPAN, Planter, WindowSampler

COUNTS = np.array([5, 0, 60, 35])


def test_tokens_are_drawn_by_frequency_for_all_time() -> None:
    planter = Planter(COUNTS)
    assert planter.draw([0, 7], 12).tolist() == [0, 3, 3, 2, 3, 3, 2, 2, 2, 3, 3, 2]
    many = np.bincount(planter.draw([7], 20_000), minlength=4) / 20_000
    assert many[1] == 0
    assert np.allclose(many, COUNTS / COUNTS.sum(), atol=0.015)


def sampler(rate: float, rows: int = 8) -> WindowSampler:
    tokens = np.full(200 * 100 + 1, 9, dtype=np.uint16)
    return WindowSampler(tokens, 100, rows, 3, None, Planter(COUNTS), rate)


def test_a_row_has_both_copies_and_else_the_text() -> None:
    gaps = []
    for step in range(20):
        batch = sampler(1.0).batch(step)
        rows = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1).numpy()
        assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()
        for row in rows:
            places = np.flatnonzero(row != 9)
            assert len(places) == 2 * SPAN
            first, second = places[:SPAN], places[SPAN:]
            assert (row[first] == row[second]).all()
            assert (second[-1] - second[0], first[-1] - first[0]) == (SPAN - 1, SPAN - 1)
            gaps.append(second[0] - first[-1] - 1)
    assert min(gaps) < 4
    assert max(gaps) > 101 - 2 * SPAN - 12


def test_planting_is_of_seed_step_and_row_alone() -> None:
    whole = sampler(0.25).batch(5)
    parts = [sampler(0.25).batch(5, start, stop) for start, stop in ((0, 3), (3, 8))]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    planted = sum(
        int((sampler(0.125).batch(step).inputs != 9).any(dim=1).sum()) for step in range(25)
    )
    assert 10 <= planted <= 42  # of 200: 25, and 3.6 standard errors
    assert (sampler(0.0).batch(0).inputs == 9).all()
