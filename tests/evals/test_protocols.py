"""Protocols: what the words stand for, and that every one scores every token once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pha.evals.protocols import Protocol, parse_protocols, trained_protocol
from pha.runs import RunFolder
from pha.utils.errors import PHAError


def shapes(*specs: str, base: int = 256) -> list[tuple[str, int, int]]:
    found = parse_protocols(specs, base)
    return [(p.name, p.sequence_length, p.stride) for p in found]


def test_names_and_specs() -> None:
    assert shapes("all") == [
        ("non-overlapping", 256, 256),
        ("strided", 256, 128),
        ("long", 1024, 1024),
    ]
    assert shapes("100", "1024/256") == [("100", 100, 100), ("1024/256", 1024, 256)]
    assert shapes("strided", base=1) == [("strided", 1, 1)]
    assert [p.packed_documents for p in parse_protocols(["all"], 8, True)] == [True] * 3


def test_each_protocol_comes_once() -> None:
    assert shapes("256", "all", "256/128") == [
        ("256", 256, 256),
        ("strided", 256, 128),
        ("long", 1024, 1024),
    ]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("slow", "no protocol 'slow'"),
        ("", "no protocol ''"),
        ("12/", "no protocol '12/'"),
        ("12/3/4", "no protocol '12/3/4'"),
        ("1.5", "no protocol '1.5'"),
        ("0", "the sequence length is 0"),
        ("-4", "the sequence length is -4"),
        ("8/9", "stride is 9; it must be from 1 to 8"),
        ("8/0", "stride is 0"),
    ],
)
def test_impossible_specs(spec: str, expected: str) -> None:
    with pytest.raises(PHAError, match=expected) as caught:
        parse_protocols([spec], 256)
    assert "\n" not in str(caught.value)


def test_a_protocol_describes_itself() -> None:
    facts = Protocol(8, 4, True, "mine").describe()
    assert facts["name"] == "mine"
    assert facts["windows"] == "sliding"
    assert facts["documents"] == "state and attention reset at document starts"
    assert "name" not in Protocol(8, 8).describe()


@given(st.integers(2, 200), st.integers(1, 50), st.integers(1, 50))
def test_every_token_but_the_first_is_scored_once(total: int, length: int, stride: int) -> None:
    protocol = Protocol(max(length, stride), stride)
    scored = np.zeros(total, dtype=int)
    for window in protocol.windows(total):
        assert window.end - window.start <= protocol.sequence_length
        targets = range(window.start + window.first_scored + 1, window.end + 1)
        assert len(targets) > 0
        scored[targets] += 1
        # All but the first window give each target the context that the docstring promises.
        if window.start > 0:
            least = protocol.sequence_length - protocol.stride + 1
            assert targets[0] - window.start >= least
    assert scored.tolist() == [0] + [1] * (total - 1)


def test_windows_by_hand() -> None:
    assert list(Protocol(4, 4).windows(10)) == [(0, 4, 0), (4, 8, 0), (8, 9, 0)]
    assert list(Protocol(4, 4).windows(9)) == [(0, 4, 0), (4, 8, 0)]
    assert list(Protocol(4, 3).windows(10)) == [(0, 4, 0), (3, 7, 1), (6, 9, 1)]
    assert list(Protocol(100, 7).windows(3)) == [(0, 2, 0)]


def test_a_run_knows_its_protocol(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert trained_protocol(None) is None
    assert trained_protocol(run) is None
    run.config.write_text("data: {sequence_length: 96, packed_documents: true}\n")
    assert trained_protocol(run) == Protocol(96, 96, True)
    for content in ("data: {", "data: 3", "seed: 1", "data: {sequence_length: x}"):
        run.config.write_text(content)
        with pytest.raises(PHAError, match=r"config\.yaml.* is"):
            trained_protocol(run)
