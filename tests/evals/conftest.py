"""Models with a tokenizer, small enough to ask many questions of."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text: PHA_TEST_DATA, or shared/data beside the repository."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("PHA_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip("no text corpora: set PHA_TEST_DATA to their folder")
    return folder
