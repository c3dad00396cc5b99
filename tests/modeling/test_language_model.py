"""Loss, saving and loading, initial weights, configuration."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pha.model import ArchitectureConfig
from pha.model.presets import PRESETS
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops import OPS
from pha.utils.errors import PHAError
from tests.modeling.common import (
    FLOAT32_PARAMETERS,
    GSS_PARAMETERS,
    MEHTA_PARAMETERS,
    VOCABULARY,
    assert_same,
    cached_model,
    each_main_kind,
    scrambled,
    small_config,
    starts_of,
    tokens,
)

# Loss


def test_loss_is_cross_entropy_of_the_shifted_logits() -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids = tokens(3, 11)
    labels = ids.clone()
    labels[0, 4:7] = -100
    labels[2] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten()
    )
    # A sum of 17 float32 terms.
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_shift_labels_are_the_next_tokens() -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids = tokens(2, 12)
    output = model(ids[:, :-1], shift_labels=ids[:, 1:])
    expected = F.cross_entropy(output.logits.flatten(0, 1).double(), ids[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # `labels` lose the last position, which has no successor among them.
    shorter = model(ids[:, :-1], labels=ids[:, :-1]).loss
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).double(), ids[:, 1:-1].flatten())
    assert shorter.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_in_batch_divides_the_sum(as_tensor: bool) -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids = tokens(2, 11)
    labels = ids.masked_fill(torch.arange(11) < 3, -100)
    mean = model(ids, labels=labels).loss
    items = torch.tensor(100) if as_tensor else 100
    scaled = model(ids, labels=labels, num_items_in_batch=items).loss
    assert scaled.item() == pytest.approx(mean.item() * 16 / 100, rel=3e-7)


def test_accumulated_parts_equal_the_whole_batch() -> None:
    model = scrambled(small_config()).train()
    ids = tokens(4, 9)
    labels = ids.masked_fill(torch.rand(4, 9) < 0.3, -100)
    count = int((labels[:, 1:] != -100).sum())

    def gradients(parts: list[slice]) -> list[Tensor]:
        model.zero_grad()
        for part in parts:
            model(ids[part], labels=labels[part], num_items_in_batch=count).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradients([slice(0, 4)])
    for x, y in zip(gradients([slice(0, 1), slice(1, 4)]), whole, strict=True):
        # Float32 sums in two parts.
        assert (x - y).abs().max() <= 1e-5 * y.abs().max().clamp_min(1e-3)


def test_no_logits_while_training_with_labels() -> None:
    model = scrambled(small_config())
    ids = tokens(2, 9)
    expected = model(ids, labels=ids)
    assert expected.logits.shape == (2, 9, VOCABULARY)
    model.train()
    output = model(ids, labels=ids)
    assert output.logits is None
    assert output.past_key_values is None
    assert torch.equal(output.loss, expected.loss)
    assert model(ids).logits.shape == (2, 9, VOCABULARY)
    assert model(ids).loss is None


@each_main_kind
def test_gradients_are_those_of_the_oracles(block: str, branches: tuple[str, ...]) -> None:
    model = scrambled(small_config(block=block, branches=list(branches))).train()
    ids = tokens(2, 33)
    starts = torch.cat([starts_of([10, 23]), starts_of([32, 1])])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, document_starts=starts).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    fast = gradients()
    with (
        OPS["gated_scan"].force("naive"),
        OPS["dss"].force("naive"),
        OPS["attention"].force("naive"),
        OPS["linear_cross_entropy"].force("naive"),
    ):
        slow = gradients()
    for name, y in slow.items():
        # Both are float32, through two layers. Every parameter takes part, except the mixing
        # weight of a branch that has no other beside it: that is one, whatever theta.
        alone = name.endswith("theta") and len(branches) == 1
        assert alone or y.abs().max() > 1e-4, name
        assert (fast[name] - y).abs().max() <= 2e-5 * y.abs().max().clamp_min(1e-2), name


def test_logits_to_keep_and_embedded_inputs() -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids = tokens(2, 9)
    logits = model(ids).logits
    assert_same(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    chosen = torch.tensor([0, 5])
    assert_same(model(ids, logits_to_keep=chosen).logits, logits[:, chosen])
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, logits)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.model.embed_tokens(ids)}):
        with pytest.raises(PHAError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_autocast_loss_is_close_to_float32() -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids = tokens(4, 33)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids, labels=ids).loss
    assert rough.dtype == torch.float32
    # Two layers of products rounded to 2^-8, averaged over 128 tokens.
    assert rough.item() == pytest.approx(exact.item(), rel=2**-8)


# Saving and loading


@each_main_kind
def test_saved_and_loaded_logits_are_identical(
    block: str, branches: tuple[str, ...], tmp_path: Path
) -> None:
    model = cached_model(block, branches)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PHAForCausalLM
    assert not loaded.training
    before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter), name
    ids = tokens(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_tied_embedding_is_saved_once_and_stays_tied(tmp_path: Path) -> None:
    scrambled(small_config()).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
        table = [name for name in names if file.get_slice(name).get_shape()[0] == VOCABULARY]
    assert table == ["model.embed_tokens.weight"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.train()(tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    # The head gives every row of the table a gradient, not only the rows of the five tokens.
    assert bool(loaded.model.embed_tokens.weight.grad.abs().amax(-1).gt(0).all())


@pytest.mark.parametrize(
    ("state_space", "absent"), [("gss", MEHTA_PARAMETERS), ("mehta_gss", GSS_PARAMETERS)]
)
def test_loading_in_bfloat16_keeps_the_scalars_in_float32(
    state_space: str, absent: set[str], tmp_path: Path
) -> None:
    model = scrambled(small_config(branches=[state_space, "attention"]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = dict(model.named_parameters())
    seen = set()
    for name, parameter in loaded.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind in FLOAT32_PARAMETERS:
            seen.add(kind)
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, exact[name]), name
        else:
            assert parameter.dtype == torch.bfloat16, name
    assert seen == FLOAT32_PARAMETERS - absent
    assert loaded(tokens(2, 9)).logits.dtype == torch.bfloat16


def test_averaged_weights_load_into_the_same_model(tmp_path: Path) -> None:
    first, second = scrambled(small_config(), 1), scrambled(small_config(), 2)
    mean = {k: (v + second.state_dict()[k]) / 2 for k, v in first.state_dict().items()}
    first.load_state_dict(mean)
    first.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in mean.items())


# How the weights start


def test_initial_logits_are_of_order_one() -> None:
    model = PHAForCausalLM(small_config(vocab_size=2048, hidden_size=64)).eval()
    table = model.model.embed_tokens.weight
    # 131072 samples estimate a standard deviation to 0.2%; five times that.
    assert table.std().item() == pytest.approx(64**-0.5, rel=0.01)
    assert model.lm_head.weight is table
    # Hidden states have unit mean square, so logits have the variance of a row's length: one.
    logits = model(torch.arange(64)[None]).logits
    assert 0.9 <= logits.std().item() <= 1.1


def linear_weights(model: PHAForCausalLM) -> dict[str, Tensor]:
    return {
        name: module.weight
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@pytest.mark.parametrize("initializer_range", [0.02, 0.1])
def test_linear_layers_start_normal(initializer_range: float) -> None:
    model = PHAForCausalLM(small_config(initializer_range=initializer_range))
    weights = linear_weights(model)
    assert len(weights) == 2 * (3 + 4 + 3 + 3)
    for name, weight in weights.items():
        error = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(initializer_range, rel=error), name
        assert abs(weight.mean().item()) <= 5 * initializer_range / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("attention_logits", ["scaled-cosine", "dot-product"])
def test_deepnorm_initialisation_scales_what_writes_to_the_stream(attention_logits: str) -> None:
    config = small_config(
        residual="post", deepnorm_init=True, vocab_size=512, attention_logits=attention_logits
    )
    model = PHAForCausalLM(config)
    assert config.deepnorm_beta == pytest.approx(0.5)
    for name, weight in linear_weights(model).items():
        gain = 1.0 if name.endswith(("W_q", "W_k", "W_g")) else 0.5
        expected = gain * math.sqrt(2 / sum(weight.shape))
        error = 5 / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(expected, rel=error), name
    # The tied head is a linear layer as well, and must not disturb the embedding.
    table = model.model.embed_tokens.weight
    assert table.std().item() == pytest.approx(32**-0.5, rel=5 / math.sqrt(2 * table.numel()))


def test_the_same_seed_gives_the_same_model() -> None:
    def first_logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return PHAForCausalLM(small_config()).eval()(tokens(1, 5)).logits

    assert torch.equal(first_logits(3), first_logits(3))
    assert not torch.equal(first_logits(3), first_logits(4))


# Configuration


def test_preset_with_overrides() -> None:
    config = PHAConfig.from_preset("pha-tiny", vocab_size=300, dropout=0.1)
    assert (config.preset, config.vocab_size, config.dropout) == ("pha-tiny", 300, 0.1)
    assert config.hidden_size == PRESETS["pha-tiny"]["hidden_size"]
    with pytest.raises(PHAError, match="state_size is 100"):
        PHAConfig.from_preset("pha-tiny", state_size=100)


def test_unknown_preset_suggests_the_closest() -> None:
    with pytest.raises(PHAError, match=r"'pha-tny'; did you mean pha-tiny"):
        PHAConfig.from_preset("pha-tny")


def test_unknown_override_is_refused_by_name() -> None:
    with pytest.raises(PHAError, match="hidden_sise"):
        PHAConfig.from_preset("pha-tiny", hidden_sise=64)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.5),
        ("num_hidden_layers", 2.5),
        ("dropout", "none"),
        ("deepnorm_init", "yes"),
        ("branches", "gss"),
        ("branch_options", {"gss": 3}),
        ("rope_theta", "large"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(PHAError, match=field):
        PHAConfig(**{"residual": "post", field: value})


def test_untied_embeddings_are_refused() -> None:
    with pytest.raises(PHAError, match="tie_word_embeddings"):
        small_config(tie_word_embeddings=False)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_configuration_survives_json(name: str, tmp_path: Path) -> None:
    branch = PHAConfig.from_preset(name).branch_names[0]
    config = PHAConfig.from_preset(
        name, dropout=0.1, eos_token_id=7, branch_options={branch: {"option": [1, "two"]}}
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["preset"]) == ("pha", name)
    fields = [field.name for field in dataclasses.fields(ArchitectureConfig)]
    assert set(fields) <= set(written)
    for loaded in (AutoConfig.from_pretrained(tmp_path), PHAConfig(**written)):
        assert type(loaded) is PHAConfig
        for field in (*fields, "eos_token_id", "tie_word_embeddings", "layer_types"):
            assert getattr(loaded, field) == getattr(config, field), field
