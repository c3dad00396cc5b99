"""Training on a GPU: it learns, repeats itself and resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pha.data import TokenStore
from pha.runs import RunFolder
from pha.utils.errors import TrainingInterruptedError
from tests.train.conftest import Train
from tests.train.test_runs import assert_same_weights, start, stop_after, timeless

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def leave_no_setting() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("precision", "compiled"), [("fp32", "false"), ("bf16", "false"), ("bf16", "true")]
)
def test_a_run_learns(
    train_small: Train, tmp_path: Path, device: torch.device, precision: str, compiled: str
) -> None:
    changes = {"run__precision": precision, "run__compile": compiled}
    result = train_small(run__steps=60, run__evaluate_every=60, **changes)
    losses = [r.loss for r in RunFolder(tmp_path / "run").read_metrics().train]
    assert losses[-1] < 0.75 * losses[0]
    assert result.provenance["precision"] == precision
    assert result.peak_memory_bytes > 0
    if device.type == "cuda":
        assert result.provenance["device"] == torch.cuda.get_device_name()
        assert result.peak_memory_bytes < 5e8  # not what planning held


@pytest.mark.parametrize("documents", ["false", "true"])
def test_steps_are_those_of_a_cpu(
    train_small: Train,
    store: TokenStore,
    tmp_path: Path,
    documents: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"model__dropout": 0.0, "data__packed_documents": documents}
    train_small("gpu", **changes)
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        process = start(store, tmp_path / "cpu", **changes)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    gpu, cpu = RunFolder(tmp_path / "gpu"), RunFolder(tmp_path / "cpu")
    losses = [[r.loss for r in run.read_metrics().train] for run in (gpu, cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    a, b = (load_file(run.checkpoint(8) / "model.safetensors") for run in (gpu, cpu))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "documents"), [("adamw", "true"), ("muon", "false")])
def test_interrupted_and_resumed_equals_uninterrupted(
    train_small: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    documents: str,
    kind: str,
) -> None:
    train_small = partial(
        train_small,
        optimizer__kind=kind,
        data__packed_documents=documents,
        run__deterministic="true",
        run__precision="bf16",
    )
    train_small("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(TrainingInterruptedError):
            train_small("cut")
    train_small("cut")
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    assert_same_weights(whole.checkpoint(8), cut.checkpoint(8))
    assert timeless(whole) == timeless(cut)
