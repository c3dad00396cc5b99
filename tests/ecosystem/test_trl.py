"""TRL's trainers on an exported model, all weights and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import synthetic_text

SETTINGS: dict[str, Any] = {
    "max_steps": 10,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def fit(trainer: str, folder: Path, out: Path, rows: dict[str, list[str]], lora: bool) -> Any:
    """What a trainer of TRL logs at each step."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig

    taught = getattr(trl, f"{trainer}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=getattr(trl, f"{trainer}Config")(str(out), **SETTINGS),
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        if lora
        else None,
    )
    taught.train()
    return [entry for entry in taught.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [False, True])
def test_supervised_fine_tuning_lowers_the_loss(lora: bool, folder: Path, tmp_path: Path) -> None:
    rows = {"text": synthetic_text(64, 1).splitlines()}
    log = fit("SFT", folder, tmp_path, rows, lora)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]


@pytest.mark.parametrize("lora", [False, True])
def test_preferences_are_learned(lora: bool, folder: Path, tmp_path: Path) -> None:
    rows = {"prompt": ["Say"] * 16, "chosen": [" yes"] * 16, "rejected": [" no"] * 16}
    log = fit("DPO", folder, tmp_path, rows, lora)
    assert abs(log[0]["rewards/margins"]) < 1e-4  # the reference is the model itself
    assert log[-1]["rewards/margins"] > 0.05
