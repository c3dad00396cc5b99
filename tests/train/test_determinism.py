"""One seed, one result: whatever the threads; and what cannot be deterministic is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pha.runs import RunFolder
from pha.train import trainer as trainer_module
from pha.train.batches import BatchFeed
from pha.utils.errors import PHAError
from tests.train.conftest import Train
from tests.train.test_runs import assert_same_weights, timeless


@pytest.mark.slow
def test_threads_of_the_tokenizer_change_no_byte_of_a_store(
    text_folder: Path, tmp_path: Path
) -> None:
    code = "import sys; from pathlib import Path; from pha.data import prepare\n"
    code += "prepare(sys.argv[1], 'bpe:280', Path(sys.argv[2]))"
    for threads in ("1", "3"):
        command = [sys.executable, "-c", code, str(text_folder), str(tmp_path / threads)]
        subprocess.run(command, env=os.environ | {"RAYON_NUM_THREADS": threads}, check=True)
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*.*"))
    assert len(files) > 8
    for file in files:
        first, second = ((tmp_path / threads / file).read_bytes() for threads in ("1", "3"))
        assert first == second, file


def test_a_thread_that_reads_ahead_changes_nothing(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_small("inline", run__micro_batch=3)
    ahead: Any = partial(BatchFeed, ahead=True)
    monkeypatch.setattr(trainer_module, "BatchFeed", ahead)
    train_small("ahead", run__micro_batch=3)
    inline, other = RunFolder(tmp_path / "inline"), RunFolder(tmp_path / "ahead")
    assert_same_weights(inline.checkpoint(8), other.checkpoint(8))
    assert timeless(inline) == timeless(other)


@pytest.mark.slow
def test_several_threads_of_torch_repeat_themselves(train_small: Train, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        for name in ("first", "second"):
            train_small(name, data__sequence_length=128)
    finally:
        torch.set_num_threads(1)
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    assert_same_weights(first.checkpoint(8), second.checkpoint(8))


@pytest.mark.parametrize(
    "message",
    [
        "scan_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism",
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` "
        "or ..., but this operation is not deterministic because it uses CuBLAS",
    ],
)
def test_what_cannot_be_deterministic_is_refused_in_one_line(
    train_small: Train, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def backward(*_: Any) -> torch.Tensor:
        raise RuntimeError(message)

    monkeypatch.setattr(trainer_module.Trainer, "_backward", backward)
    with pytest.raises(PHAError, match=r"^run.deterministic: .*leave run.deterministic out") as e:
        train_small(run__deterministic="true")
    assert "\n" not in str(e.value)
    with pytest.raises(RuntimeError, match="deterministic"):
        train_small("other")
