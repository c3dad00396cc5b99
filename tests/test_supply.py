"""The pinned packages and the hashes of their files belong together."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([\w.-]+)==([^\s;]+)", re.MULTILINE)


def pins(file: str) -> dict[str, str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PIN.findall(text)}


def test_the_lock_has_hashes_for_what_the_constraints_pin() -> None:
    constraints, lock = pins("constraints.txt"), pins("requirements.lock")
    assert len(constraints) > 90
    assert constraints.items() <= lock.items(), "run `make lock`"
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    blocks = [block for block in re.split(r"\n(?=\w)", text) if PIN.match(block)]
    assert len(blocks) == len(lock)
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text  # the address of an index is the reader's
