"""Training by other people's loops: transformers' Trainer, PEFT, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from pha.data.tokenizer import load_tokenizer
from pha.modeling import PHAForCausalLM
from tests.conftest import synthetic_text
from tests.modeling.common import assert_same, small_config, tokens


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate fixes one precision for a whole process; other tests have theirs."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Lines(Dataset[dict[str, list[int]]]):
    """Lines of text of different lengths, as Trainer wants them."""

    def __init__(self) -> None:
        self.lines = synthetic_text(64, 1).splitlines()
        self.tokenizer = load_tokenizer("bytes")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer(self.lines[index])["input_ids"]}


def fit(model: Any, folder: Path, **changes: Any) -> list[float]:
    """Losses of a short training by transformers' Trainer, batches padded on the right."""
    lines = Lines()
    lines.tokenizer.pad_token = lines.tokenizer.eos_token
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=30,
        learning_rate=1e-2,
        logging_steps=5,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **changes,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=lines,
        data_collator=DataCollatorForLanguageModeling(lines.tokenizer, mlm=False),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def small_model() -> PHAForCausalLM:
    torch.manual_seed(0)
    return PHAForCausalLM(small_config(vocab_size=257, state_size=64))


@pytest.mark.parametrize("changes", [{"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_the_trainer_of_transformers_lowers_the_loss(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    losses = fit(small_model(), tmp_path, **changes)
    assert losses[-1] < 0.7 * losses[0]
    # The mean of the first five steps, from ln 257 down; twice that if accumulation added up.
    assert 3 < losses[0] < 5.5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_the_trainer_are_of_the_next_token(smoothing: float, tmp_path: Path) -> None:
    model, ids = small_model(), tokens(4, 20)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=smoothing, report_to=[], use_cpu=True
    )
    # It knows what is a label from the names of arguments, and counts those before it evaluates.
    result = Trainer(model=model, args=arguments, eval_dataset=rows).evaluate()
    log_p = model(ids).logits.detach()[:, :-1].log_softmax(-1)
    nats = -log_p.gather(-1, ids[:, 1:, None]).mean()
    expected = (1 - smoothing) * nats - smoothing * log_p.mean()
    assert result["eval_loss"] == pytest.approx(float(expected), abs=1e-4)


def test_lora_trains_adapters_alone_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = small_model()
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(
        r=4, target_modules=["W_q", "W_v", "W_B", "W_C", "W_down"], task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    losses = fit(adapted, tmp_path)
    assert losses[-1] < 0.98 * losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.eval()
    ids = tokens(2, 20)
    expected = adapted(ids).logits
    base = small_model()
    base.load_state_dict(frozen)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same(again(ids).logits, expected)
    merged = again.merge_and_unload()
    assert_same(merged(ids).logits, expected)
    assert isinstance(merged, PHAForCausalLM)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_same(loaded(ids).logits, expected)
