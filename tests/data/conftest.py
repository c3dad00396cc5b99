from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from pha.data.tokenizer import load_tokenizer
from pha.utils.errors import PHAError

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text: PHA_TEST_DATA, or shared/data beside the repository."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("PHA_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip("no text corpora: set PHA_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def gpt2(shared_data: Path) -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer (not to be changed)."""
    return load_tokenizer(f"gpt2:{shared_data / 'gpt2'}")


@pytest.fixture
def refuses() -> Refuses:
    """A block that must raise a PHAError of one line holding each of the given parts."""

    @contextmanager
    def check(*parts: str) -> Iterator[None]:
        with pytest.raises(PHAError) as caught:
            yield
        message = str(caught.value)
        assert message
        assert "\n" not in message
        for part in parts:
            assert part in message

    return check


@pytest.fixture
def document_folder(tmp_path: Path) -> Path:
    """A folder of 100 small documents, which the path hash spreads over all three splits."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(100):
        (folder / f"doc-{number}.txt").write_text(f"document number {number}\nends here\n")
    return folder


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    """A folder with one file for each split."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.txt").write_bytes("the café\r\nand the tea\n".encode() * 20)
    (folder / "valid.txt").write_bytes(b"one two\n three \n")
    (folder / "test.txt").write_bytes(b"no line end")
    return folder
