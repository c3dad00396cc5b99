"""ONNX, with the recurrence in plain operations, one file for one length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pha.ops.backends import OPS


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def test_onnxruntime_gives_the_same_logits(folder: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    ids = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(0))
    file = str(tmp_path / "model.onnx")
    with OPS["gated_scan"].force("naive"):
        torch.onnx.export(Logits(model).eval(), (ids,), file, input_names=["ids"], dynamo=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    other = (ids + 7) % 256
    [logits] = session.run(None, {"ids": other.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(other).logits, rtol=0, atol=1e-4)
