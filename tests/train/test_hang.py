"""Who is to blame when nothing goes on."""

from __future__ import annotations

from pha.train.hang import Sign, blame


def sign(beat: int, collectives: int, step: int = 7) -> Sign:
    return Sign(beat, step, collectives, "host-1")


def test_who_says_nothing_is_to_blame_whatever_else_there_is() -> None:
    before = {0: sign(4, 90), 1: sign(5, 89), 2: sign(9, 90)}
    guilty, what = blame(before, {0: sign(6, 90), 1: sign(7, 89), 2: sign(9, 90)}, 120.4)
    assert guilty == {2}
    assert what.startswith("rank 2 (host-1) gives no sign of life")
    assert what.endswith("step 8 was not finished for 120 s")


def test_who_never_said_anything_is_to_blame() -> None:
    guilty, what = blame({0: sign(1, 9), 1: None}, {0: sign(2, 9), 1: None}, 5)
    assert guilty == {1}
    assert "rank 1 (on an unknown host)" in what


def test_who_has_begun_fewer_collectives_is_to_blame() -> None:
    before = {rank: sign(4, 90) for rank in range(4)}
    after = {0: sign(6, 90), 1: sign(6, 89, 6), 2: sign(6, 90), 3: sign(6, 89, 6)}
    guilty, what = blame(before, after, 60)
    assert guilty == {1, 3}
    assert what.startswith("rank 1 (host-1), rank 3 (host-1) is behind")


def test_nobody_is_to_blame_where_all_wait_for_the_same() -> None:
    guilty, what = blame({0: sign(1, 9), 1: sign(1, 9)}, {0: sign(3, 9), 1: sign(3, 9)}, 60)
    assert not guilty
    assert "network" in what
