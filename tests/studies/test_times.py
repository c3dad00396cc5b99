"""Times that another study measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pha.studies.times import Times
from pha.utils.errors import PHAError

VARIANT = {
    "name": "pha",
    "measures": {"speed": {"mean": 50.0}, "test": {"mean": 70.0}},
    "seeds": [
        {"status": "diverged"},
        {"provenance": {"device": "cpu", "cpu": "a processor", "threads": 1}},
    ],
}


def test_speeds_of_a_study_give_seconds(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps({"variants": [VARIANT]}))
    times = Times.read(tmp_path, ["pha"])
    assert times.of("pha", 200) == {"speed": 50.0, "seconds": 4.0}
    assert times.hardware == "cpu, a processor, threads: 1"
    with pytest.raises(PHAError, match="no time of gss, only of pha"):
        Times.read(tmp_path, ["pha", "gss"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"variants": [VARIANT | {"measures": {"test": {"mean": 70.0}}}]}, "has no times"),
        ({"variants": []}, "has no times"),
        ({"perplexity": 9.0}, "variants is missing"),
    ],
)
def test_what_has_no_times_is_refused(content: object, says: str, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PHAError, match=says):
        Times.read(path, [])
