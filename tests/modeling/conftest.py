"""Settings for the tests of the language model."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers whichever tests run, in whatever order."""
    torch.manual_seed(0)
