"""Weights in 8 bits, by torchao and bitsandbytes, as transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig


def quantisation(tool: str) -> Any:
    pytest.importorskip(tool)
    if tool == "bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.parametrize("tool", ["torchao", "bitsandbytes"])
def test_eight_bits_change_little(tool: str, folder: Path) -> None:
    settings = quantisation(tool)
    exact = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (x(ids, labels=ids) for x in (exact, model))
    off = (found.logits - wanted.logits).abs().max() / wanted.logits.std()
    assert 0 < off < 0.2
    assert float(found.loss) == pytest.approx(float(wanted.loss), rel=0.02)
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert written.shape == (2, 28)
