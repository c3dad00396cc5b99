"""What an exported folder does where transformers is and `pha` is not: see `test_code.py`.

`python -I without_pha.py FOLDER... ` compares with `expected.safetensors` in each folder.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

for hidden in ("pha", "numba"):
    sys.modules[hidden] = None  # type: ignore[assignment]

ATOL = 1e-5


def same(x: Tensor, y: Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=ATOL)


def load(auto: Any, folder: Path, **options: Any) -> Any:
    return auto.from_pretrained(folder, trust_remote_code=True, **options)


def answers(model: Any, ids: Tensor, expected: dict[str, Tensor]) -> None:
    """The same logits as by the package, of whole rows and of rows padded on the left."""
    with torch.no_grad():
        same(model(ids).logits, expected["logits"])
        mask = expected["mask"]
        padded = model(ids * mask, attention_mask=mask).logits
        same(padded[mask.bool()], expected["padded"][mask.bool()])


def is_alone_in_a_batch(model: Any, ids: Tensor, expected: dict[str, Tensor]) -> None:
    """A row that is padded on the left has the logits that it has without."""
    mask = expected["mask"]
    with torch.no_grad():
        logits = model(ids * mask, attention_mask=mask).logits
        for row in range(len(ids)):
            there = mask[row].bool()
            same(logits[row][there], model(ids[row, there][None]).logits[0])


def writes(model: Any, ids: Tensor, expected: dict[str, Tensor]) -> None:
    """The same tokens as by the package, with and without a cache."""
    written = expected["written"]
    settings = {"max_length": written.shape[1], "do_sample": False}
    for cached in (True, False):
        found = model.generate(
            ids, use_cache=cached, attention_mask=torch.ones_like(ids), **settings
        )
        assert torch.equal(found, written)


def learns(model: Any, ids: Tensor, expected: dict[str, Tensor]) -> None:
    """The same gradients as by the package, with and without checkpointing."""
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        for name, weight in model.named_parameters():
            same(weight.grad, expected[f"gradient.{name}"])
    model.gradient_checkpointing_disable()
    model.eval()


def is_adapted(folder: Path, ids: Tensor) -> None:
    """A step of PEFT's LoRA moves the adapter and nothing else."""
    base = load(AutoModelForCausalLM, folder)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=1.0)
    first = model(ids, labels=ids).loss
    first.backward()
    optimizer.step()
    assert model(ids, labels=ids).loss < first
    after = dict(model.unload().named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


def is_saved_again(model: Any, folder: Path, ids: Tensor, expected: dict[str, Tensor]) -> None:
    """Saved and loaded again, the code goes along."""
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        code, copy = folder / "modeling_pha.py", Path(again, "modeling_pha.py")
        assert copy.read_bytes() == code.read_bytes()
        assert load(AutoConfig, Path(again)).auto_map == load(AutoConfig, folder).auto_map
        with torch.no_grad():
            same(load(AutoModelForCausalLM, Path(again))(ids).logits, expected["logits"])


def check(folder: Path, whole: bool) -> None:
    """All of it; in brief, what depends on the model's branches."""
    expected = load_file(folder / "expected.safetensors")
    ids = expected["ids"]
    model = load(AutoModelForCausalLM, folder)
    assert type(model).__module__.startswith("transformers_modules.")
    answers(model, ids, expected)
    writes(model, ids, expected)
    learns(model, ids, expected)
    if not whole:
        return
    is_alone_in_a_batch(model, ids, expected)
    is_adapted(folder, ids)
    is_saved_again(model, folder, ids, expected)
    with torch.no_grad():
        states = load(AutoModel, folder)(ids).last_hidden_state
        same(model.lm_head(states), expected["logits"])
        classifier = load(AutoModelForSequenceClassification, folder, num_labels=3)
        same(classifier.score(states[:, -1]), classifier(ids).logits)
    assert load(AutoTokenizer, folder)("é")["input_ids"] == [195, 169]
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, name in enumerate(sys.argv[1:]):
        check(Path(name), whole=number == 0)
        print(name, flush=True)
