"""Models with a tokenizer, small enough to ask many questions of."""

from __future__ import annotations

from pathlib import Path

import pytest

from pha.data.tokenizer import load_tokenizer
from pha.loading import LoadedModel
from tests.modeling.common import scrambled, small_config


@pytest.fixture(scope="session")
def writer() -> LoadedModel:
    """A model of bytes whose next token is far from certain."""
    model = scrambled(small_config(vocab_size=257)).requires_grad_(False)
    return LoadedModel(Path("writer"), model, load_tokenizer("bytes"), None)
