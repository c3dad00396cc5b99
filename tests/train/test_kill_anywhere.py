"""Runs that are stopped anywhere: `scripts/kill_anywhere.py`, a few moments of it or all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_anywhere.py"


@pytest.mark.parametrize(
    ("moments", "others", "commands"),
    [
        pytest.param(2, 1, "train,prepare,export", marks=pytest.mark.slow),
        pytest.param(100, 25, "train,prepare,export,study", marks=pytest.mark.slow),
    ],
)
def test_what_is_stopped_anywhere_ends_as_if_it_had_not_been(
    tmp_path: Path, moments: int, others: int, commands: str
) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path),
    ]
    command += ["--moments", str(moments), "--others", str(others), "--commands", commands]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())["commands"]
    stops = {
        name: sum(sum(phases.values()) for phases in each["stops"].values())
        for name, each in found.items()
    }
    assert stops.keys() == set(commands.split(","))
    assert stops.pop("train") >= moments
    assert min(stops.values()) >= others
