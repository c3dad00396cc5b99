"""What programs of transformers' world expect of a model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

from pha.data.tokenizer import load_tokenizer, read_saved_tokenizer
from pha.sharing import export_model
from pha.utils.errors import PHAError
from tests.modeling.common import scrambled, small_config

TEXTS = ["To be", "or not to be, that is the question"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conventions")
    scrambled(small_config(vocab_size=257)).save_pretrained(folder / "saved")
    load_tokenizer("bytes").save_pretrained(folder / "saved")
    return export_model(folder / "saved", folder / "shared").path


def test_the_tokenizer_pads_on_the_left_and_knows_a_length(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 1024
    assert tokenizer.pad_token_id == model.config.pad_token_id == 256
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert batch.attention_mask[0].tolist() == [0] * (len(TEXTS[1]) - 5) + [1] * 5
    assert len(tokenizer("x" * 2000, truncation=True).input_ids) == 1024
    # Nothing ends at that length, and so our own commands neither cut there nor warn.
    assert len(read_saved_tokenizer(folder)("x" * 2000, truncation=True).input_ids) == 2000


def test_the_pipeline_writes_the_same_in_a_batch(folder: Path) -> None:
    write = pipeline("text-generation", model=str(folder), device="cpu")
    settings = {"max_new_tokens": 4, "do_sample": False}
    together = [found[0] for found in write(TEXTS, batch_size=2, **settings)]
    assert together == [write(text, **settings)[0] for text in TEXTS]
    assert [found["generated_text"].startswith(t) for found, t in zip(together, TEXTS, strict=True)]


def test_it_classifies_sequences_padded_or_not(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
        for row, text in zip(logits, TEXTS, strict=True):
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
            torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)
    model(**batch, labels=torch.tensor([0, 2])).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.score.weight, model.score.weight)
    with pytest.raises(PHAError, match=r"also have score\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_it_classifies_tokens(folder: Path) -> None:
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=5)
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt").input_ids
    assert model(ids, labels=ids % 5).logits.shape == (1, 5, 5)


def test_the_body_is_asked_as_other_bodies_are(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.base_model is model.get_decoder() is model.model
    ids = torch.ones(2, 5, dtype=torch.long)
    asked = {"output_attentions": True, "output_hidden_states": True}
    body = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
    assert torch.equal(model.lm_head(body.last_hidden_state), model(ids).logits)
    assert [x.shape for x in body.attentions] == [(2, 6, 5, 5)] * 2
    assert [x.shape for x in body.hidden_states] == [(2, 5, 32)] * 3


def test_a_conversation_has_a_template_where_the_tokenizer_has_its_tokens(
    folder: Path, tmp_path: Path
) -> None:
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}  # 257 and 258
    )
    scrambled(small_config(vocab_size=259)).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    out = export_model(tmp_path / "saved", tmp_path / "out").path
    turns = [{"role": "user", "content": "Hi"}]
    asked = AutoTokenizer.from_pretrained(out).apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    assert asked == [257, *b"user\nHi", 258, 10, 257, *b"assistant\n"]
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [256, 258]
    assert export_model(tmp_path / "saved", out, force=True).path == out
