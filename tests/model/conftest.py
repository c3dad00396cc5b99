"""Settings and spies for the tests of the paper's parts and of the other mixers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pha import mixers as mixers  # which makes them known
from pha.model import BRANCHES

OURS = frozenset(BRANCHES)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers whichever tests run, in whatever order."""
    torch.manual_seed(0)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Replace a function by one that notes the `inputs` and `outputs` of its last call."""

    def watch(name: str) -> dict[str, Any]:
        module, _, attribute = name.rpartition(".")
        function, seen = getattr(importlib.import_module(module), attribute), {}

        def watched(*inputs: Any, **options: Any) -> Any:
            seen["inputs"], seen["outputs"] = inputs, function(*inputs, **options)
            return seen["outputs"]

        monkeypatch.setattr(name, watched)
        return seen

    return watch


@pytest.fixture
def registry() -> Iterator[None]:
    """Branches registered by a test are forgotten after it; those of others were."""
    before = dict(BRANCHES)
    assert set(before) == OURS
    yield
    BRANCHES.clear()
    BRANCHES.update(before)
