"""One small exported model for every tool; a tool that is not installed is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from pha.data.tokenizer import load_tokenizer
from pha.sharing import export_model
from tests.modeling.common import scrambled, small_config


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ecosystem")
    scrambled(small_config(vocab_size=257, state_size=64)).save_pretrained(folder / "saved")
    load_tokenizer("bytes").save_pretrained(folder / "saved")
    return export_model(folder / "saved", folder / "shared").path


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate fixes one precision for a whole process; other tests have theirs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
