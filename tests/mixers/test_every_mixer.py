"""What every mixer of the registry promises, alone in our block and beside another branch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pha.model import BRANCHES, Branch
from pha.model.parameters import count_parameters
from pha.modeling import PHAConfig, PHAForCausalLM
from tests.modeling.common import (
    padded_batch,
    run_in_pieces,
    scrambled,
    small_config,
    starts_of,
    tokens,
)

SMALL: dict[str, dict[str, Any]] = {
    "compressive_attention": {"window": 5, "slots": 4, "rate": 3},
    "extended_gss": {"output_gate": True, "convolution": True, "input_dt": True},
    "gated_deltanet": {"heads": 3, "key_size": 6, "value_size": 10},
    "h3": {"modes": 5},
    "hyena": {"order": 3, "max_length": 20, "filter_size": 8},
    "linear_attention": {"heads": 4},
    "mamba2": {"state_size": 10, "head_size": 8},
    "mehta_gss": {"channels": 12, "modes": 20, "expansion": 2},
    "retnet": {"heads": 2},
    "s4d": {"modes": 5},
}
"""Options of mixers whose defaults are too large for tests; others are made without any."""

MIXERS = sorted(BRANCHES)
LENGTHS = [1, 129]
ATOL = 1e-11  # float64, of logits of order one; also where an FFT lets rounding flow back

each_mixer = pytest.mark.parametrize("name", MIXERS)
each_place = pytest.mark.parametrize("place", ["alone", "beside"])


def config_of(name: str, place: str = "alone") -> PHAConfig:
    # A layer has room for the keys of one branch.
    other = "gss" if BRANCHES[name].keeps_keys else "attention"
    return small_config(
        branches=[name] if place == "alone" else [name, other],
        branch_options={name: SMALL.get(name, {})},
    )


@functools.cache
def exact_model(name: str, place: str) -> PHAForCausalLM:
    return scrambled(config_of(name, place)).double().requires_grad_(False)


def branch_of(model: nn.Module, name: str, layer: int = 0) -> Branch:
    branch: Any = model.get_submodule(f"model.layers.{layer}.branches.{name}")
    return branch


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


@each_mixer
@each_place
def test_a_prefix_gives_the_same_outputs(name: str, place: str) -> None:
    model, ids = exact_model(name, place), tokens(2, 129)
    whole = model(ids).logits
    for t in (1, 31, 64, 128):
        assert_close(model(ids[:, :t]).logits, whole[:, :t])


@each_mixer
@each_place
@pytest.mark.parametrize("where", ["plain", "packed", "padded"])
def test_any_split_through_the_cache_equals_the_whole(name: str, place: str, where: str) -> None:
    model, ids = exact_model(name, place), tokens(3, 39)
    real: Tensor | slice = slice(None)
    options: dict[str, Any] = {}
    if where == "packed":
        options["document_starts"] = torch.rand(3, 39) < 0.1
    elif where == "padded":
        ids, mask = padded_batch((39, 5, 20), 39, "holes")
        options["attention_mask"], real = mask, mask.bool()
    whole = model(ids, use_cache=False, **options).logits
    cuts = [0, 1, 2, 4, 20, 20, 38]
    assert_close(run_in_pieces(model, ids, cuts, **options)[real], whole[real])


@each_mixer
@each_place
def test_packed_documents_equal_separate_ones(name: str, place: str) -> None:
    model, lengths = exact_model(name, place), [9, 1, 1, 70, 6]
    ids = tokens(1, sum(lengths))
    packed = model(ids, document_starts=starts_of(lengths)).logits
    assert_close(packed, torch.cat([model(piece).logits for piece in ids.split(lengths, 1)], 1))


@each_mixer
@each_place
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_padded_batch_equals_its_rows(name: str, place: str, side: str) -> None:
    model = exact_model(name, place)
    ids, mask = padded_batch((35, 5, 1), 35, side)
    logits = model(ids, attention_mask=mask).logits
    assert bool(logits.isfinite().all())
    for row, real in enumerate(mask.bool()):
        assert_close(logits[row : row + 1, real], model(ids[row : row + 1, real]).logits)


@each_mixer
@each_place
def test_half_precision(name: str, place: str, tmp_path: Path) -> None:
    scrambled(config_of(name, place)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    branch = branch_of(model, name)
    for key, parameter in branch.named_parameters():
        wanted = torch.float32 if key in branch.float32 else torch.bfloat16
        assert parameter.dtype == wanted, key
    ids = tokens(2, 63)
    whole, exact = model(ids).logits, model.double()(ids).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pieces = run_in_pieces(model, ids, [1, 3, 40])
    # Rounded in other places, a split is as wrong as the whole, within a factor.
    assert (pieces - exact).abs().mean() <= 1.5 * (whole - exact).abs().mean()
    assert (pieces - exact).abs().mean() <= 0.05


@each_mixer
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("bf16", [False, True])
def test_every_parameter_has_a_finite_gradient(name: str, T: int, bf16: bool) -> None:
    model, ids = scrambled(config_of(name)).train(), tokens(2, T + 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
    loss.backward()
    for key, parameter in branch_of(model, name).named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        assert T == 1 or bool(parameter.grad.any()), key


@each_mixer
def test_saved_loaded_and_generating(name: str, tmp_path: Path) -> None:
    model = scrambled(config_of(name))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], x) for key, x in before.items())
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids, mask = padded_batch((9, 4), 9)
    with_cache = loaded.double().generate(ids, attention_mask=mask, **options)
    assert with_cache.shape == (2, 21)
    without = loaded.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(with_cache, without)


@each_mixer
def test_adapters_on_its_linear_layers(name: str) -> None:
    peft = pytest.importorskip("peft")
    base = scrambled(config_of(name))
    layers = [key for key, m in base.named_modules() if type(m) is nn.Linear]
    targets = [key for key in layers if f"branches.{name}." in key]
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    ids = tokens(2, 17)
    adapted(ids, labels=ids).loss.backward()
    adapters = {key: p for key, p in adapted.named_parameters() if "lora_" in key}
    assert len(adapters) == 2 * len(targets)
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapters.values())
    logits = adapted.eval()(ids).logits
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, logits, rtol=0, atol=1e-4)


@each_mixer
def test_parameters_and_how_they_start(name: str) -> None:
    config = config_of(name)
    model = PHAForCausalLM(config)
    branches = [branch_of(model, name, i) for i in range(2)]
    counted = count_parameters(config)
    assert counted[name] == sum(p.numel() for b in branches for p in b.parameters())
    assert sum(counted.values()) == model.num_parameters()
    started = {key: p.detach().clone() for key, p in branches[0].named_parameters()}
    branch = branches[0]
    again = []
    for _ in range(2):
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.fill_(torch.inf)
        branch.reset_parameters()
        again.append({key: p.detach().clone() for key, p in branch.named_parameters()})
    for key, one in again[0].items():
        values, expected = started[key].double(), one.double()
        if not one.isfinite().any():  # a linear layer's, as those of the whole model
            assert key.endswith(".weight"), key
            expected = 0.02 * torch.randn(*one.shape).double()
        elif torch.equal(one, again[1][key]):
            assert torch.equal(values, expected), key
            continue
        room = 6 * (2 / values.numel()) ** 0.5  # standard errors of both samples
        assert abs(values.mean() - expected.mean()) <= room * expected.std(), key
        assert abs(values.std() / expected.std() - 1) <= room, key
