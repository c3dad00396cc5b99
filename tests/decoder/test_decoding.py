"""Tokens written one at a time by compiled instructions, against the layers."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from pha import decoder
from pha.decoder import program
from pha.modeling import PHAConfig, PHAForCausalLM
from tests.modeling.common import (
    KINDS,
    VOCABULARY,
    assert_same,
    cached_model,
    padded_batch,
    scrambled,
    small_config,
    tokens,
)

PREFIX, TOTAL = 7, 19
OURS = [kind for kind in KINDS if "mehta_gss" not in kind[1] and kind[0] != "hybrid"]
each_of_ours = pytest.mark.parametrize(
    ("block", "branches"), OURS, ids=[f"{block}-{'+'.join(names)}" for block, names in OURS]
)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def written(model: PHAForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    """Logits of all tokens but the first PREFIX - 1, one token at a time after the prefix."""
    cache = options.pop("past_key_values", None) or model.new_cache()
    mask = options.pop("attention_mask", None)
    logits = []
    for begin, end in [(0, PREFIX), *((t, t + 1) for t in range(PREFIX, ids.shape[1]))]:
        if mask is not None:
            options["attention_mask"] = mask[:, :end]
        output = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **options)
        logits.append(output.logits[:, -1:])
    return torch.cat(logits, dim=1)


@each_of_ours
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_full_forward(
    block: str, branches: tuple[str, ...], batch: int, steps: list[int]
) -> None:
    model, ids = cached_model(block, branches), tokens(batch, TOTAL)
    assert_same(written(model, ids), model(ids).logits[:, PREFIX - 1 :])
    assert len(steps) == TOTAL - PREFIX


@pytest.mark.parametrize(
    "options",
    [
        {"residual": "post"},
        {"attention_logits": "dot-product"},
        {"input_scaling": "zero-order-hold"},
        {"primary_ffn_expansion": 0},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_every_option_of_the_layers(block: str, options: dict[str, Any], steps: list[int]) -> None:
    model = scrambled(small_config(block=block, **options))
    ids = tokens(2, TOTAL)
    truth = copy.deepcopy(model).double()(ids).logits[:, PREFIX - 1 :]
    rounding = (model(ids).logits[:, PREFIX - 1 :] - truth).abs().max()
    assert (written(model, ids) - truth).abs().max() <= 2 * rounding
    assert steps


@pytest.mark.parametrize("scaling", ["unit-variance", "zero-order-hold"])
@pytest.mark.parametrize("dt", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_every_option_of_the_extended_state_space(
    gate: bool, dt: bool, scaling: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With attention in one layer alone, and states that threads do not share out by groups."""
    branch = {"extended_gss": {"output_gate": gate, "input_dt": dt}}
    pattern = [[branch, "aux_ffn"], [branch, "attention", "aux_ffn"]]
    model = scrambled(small_config(layer_pattern=pattern, input_scaling=scaling, state_size=48))
    monkeypatch.setattr(program, "BYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    ids = tokens(2, TOTAL)
    truth = copy.deepcopy(model).double()(ids).logits[:, PREFIX - 1 :]
    rounding = (model(ids).logits[:, PREFIX - 1 :] - truth).abs().max()
    assert (written(model, ids) - truth).abs().max() <= 2 * rounding
    assert len(steps) == TOTAL - PREFIX


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_change_a_bit(
    threads: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = cached_model("parallel", ("gss", "attention", "aux_ffn")), tokens(2, TOTAL)
    alone = written(model, ids)
    monkeypatch.setattr(program, "BYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(written(model, ids), alone)
    assert len(steps) == 2 * (TOTAL - PREFIX)


def test_a_sequence_does_not_depend_on_the_others(steps: list[int]) -> None:
    model, ids = cached_model("parallel", ("gss", "attention", "aux_ffn")), tokens(3, TOTAL)
    cache, logits = model.new_cache(), []
    # The same prefix for all, so that only the compiled steps are compared bit by bit.
    ids[:, :PREFIX] = ids[:1, :PREFIX]
    for row in ids[:, None]:
        logits.append(written(model, row))
    del cache
    together = written(model, ids)
    torch.testing.assert_close(together, torch.cat(logits), rtol=0, atol=1e-5)
    assert steps


@pytest.mark.parametrize("lengths", [(19, 12, 15), (15, 19, 19)])
def test_left_padding(lengths: tuple[int, ...], steps: list[int]) -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids, mask = padded_batch(lengths, TOTAL)
    logits = written(model, ids, attention_mask=mask)
    assert len(steps) == TOTAL - PREFIX
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, TOTAL - length :]).logits[0]
        known = min(length, TOTAL - PREFIX + 1)
        assert_same(logits[row, -known:], alone[-known:])


def test_bf16_is_at_least_as_exact_as_the_layers(
    steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scrambled(small_config()).bfloat16()
    exact = copy.deepcopy(model).float()
    ids = tokens(2, TOTAL)
    truth = exact(ids).logits[:, PREFIX - 1 :]
    ours = written(model, ids)
    assert steps
    assert ours.dtype == torch.bfloat16
    monkeypatch.setattr(PHAForCausalLM, "decode", None)
    layers = written(model, ids)
    assert (ours - truth).abs().mean() <= (layers - truth).abs().mean()


def test_the_layers_can_go_on_and_back_again(steps: list[int]) -> None:
    model, ids = cached_model("parallel", ("gss", "attention", "aux_ffn")), tokens(2, TOTAL)
    expected, cache = model(ids).logits, model.new_cache()
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 12), (12, 18), (18, 19)):
        logits = model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits
        assert_same(logits, expected[:, begin:end])
        assert cache.get_seq_length() == end
    assert len(steps) == 4


def test_room_for_keys_is_enlarged(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_SPARE", 2)
    model, ids = cached_model("parallel", ("gss", "attention", "aux_ffn")), tokens(2, TOTAL)
    assert_same(written(model, ids), model(ids).logits[:, PREFIX - 1 :])


def test_two_copies_of_a_cache_part_ways(steps: list[int]) -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids, other = tokens(1, TOTAL), tokens(1, TOTAL, seed=1)
    other[:, :10] = ids[:, :10]
    cache = model.new_cache()
    model(ids[:, :9], past_key_values=cache, use_cache=True)
    model(ids[:, 9:10], past_key_values=cache, use_cache=True)
    copied = copy.deepcopy(cache)
    for t in range(10, TOTAL):
        for kept, text in ((cache, ids), (copied, other)):
            logits = model(text[:, t : t + 1], past_key_values=kept, use_cache=True).logits
            assert_same(logits[:, 0], model(text[:, : t + 1]).logits[:, -1])
    assert len(steps) == 1 + 2 * (TOTAL - 10)


def test_keys_of_one_layer_can_be_replaced(
    steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The instructions know one number of places for all layers."""
    monkeypatch.setattr(decoder, "_SPARE", 4)
    model, ids = cached_model("parallel", ("attention",)), tokens(2, TOTAL)
    cache, expected = model.new_cache(), model(ids).logits
    model(ids[:, :9], past_key_values=cache, use_cache=True)
    for t in range(9, TOTAL):
        cache.layers[1].keys = cache.layers[1].keys.clone() if t == 11 else cache.layers[1].keys
        logits = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        assert_same(logits[:, 0], expected[:, t])
    assert len(steps) == TOTAL - 9


def test_a_cropped_cache_leaves_its_copy_alone(steps: list[int]) -> None:
    model, ids, other = cached_model("parallel", ("attention",)), tokens(1, 13), tokens(1, 1, 1)
    cache = model.new_cache()
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
        model(ids[:, begin:end], past_key_values=cache, use_cache=True)
    copied = cache.copy()
    cache.crop(-3)
    model(other, past_key_values=cache, use_cache=True)
    logits = model(ids[:, 12:], past_key_values=copied, use_cache=True).logits
    assert_same(logits, model(ids).logits[:, 12:])
    assert len(steps) == 5


def test_what_inference_mode_began_goes_on_outside_of_it(steps: list[int]) -> None:
    model, ids = cached_model("parallel", ("attention",)), tokens(1, TOTAL)
    cache = model.new_cache()
    with torch.inference_mode():
        for begin, end in ((0, 9), (9, 10)):
            model(ids[:, begin:end], past_key_values=cache, use_cache=True)
    logits = model(ids[:, 10:11], past_key_values=cache, use_cache=True).logits
    assert_same(logits, model(ids[:, :11]).logits[:, 10:])
    assert len(steps) == 2


def test_rows_that_were_reordered(steps: list[int]) -> None:
    model, ids = cached_model("parallel", ("gss", "attention", "aux_ffn")), tokens(2, TOTAL)
    cache, order = model.new_cache(), torch.tensor([1, 0])
    model(ids[:, :9], past_key_values=cache, use_cache=True)
    model(ids[:, 9:10], past_key_values=cache, use_cache=True)
    cache.reorder_cache(order)
    logits = model(ids[order, 10:11], past_key_values=cache, use_cache=True).logits
    assert_same(logits, model(ids[order, :11]).logits[:, -1:])
    assert len(steps) == 2


def test_changed_weights_are_seen(steps: list[int]) -> None:
    model, ids = scrambled(small_config()), tokens(1, TOTAL)
    written(model, ids)
    for parameter in model.parameters():  # in place, as an optimizer does
        parameter.add_(0.01 * torch.ones_like(parameter))
    assert_same(written(model, ids), model(ids).logits[:, PREFIX - 1 :])
    cache = model.new_cache()
    model(ids[:, :9], past_key_values=cache, use_cache=True)
    model(ids[:, 9:10], past_key_values=cache, use_cache=True)
    weights = {
        name: weight.clone() for name, weight in scrambled(small_config(), 1).state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    taken = len(steps)
    ours = model(ids[:, 10:11], past_key_values=copy.deepcopy(cache), use_cache=True).logits
    assert len(steps) == taken + 1
    torch.set_grad_enabled(True)  # which leaves it to the layers
    assert_same(ours, model(ids[:, 10:11], past_key_values=cache, use_cache=True).logits.detach())
    assert len(steps) == taken + 1


@pytest.mark.parametrize(
    "how", ["hook", "module", "gradient", "static", "documents", "eager", "batch", "two states"]
)
def test_what_is_left_to_the_layers(how: str, steps: list[int]) -> None:
    branches = ["gss", "extended_gss" if how == "two states" else "attention", "aux_ffn"]
    model, ids, options = scrambled(small_config(branches=branches)), tokens(2, TOTAL), {}
    seen = []
    if how == "hook":
        module = model.model.get_submodule("layers.1.branches.gss.W_C")
        module.register_forward_hook(lambda *_: seen.append(1))
    elif how == "module":
        ffn = model.model.get_submodule("layers.0.primary_ffn")
        ffn.W_up = torch.nn.Sequential(ffn.get_submodule("W_up"), torch.nn.Identity())
    elif how == "gradient":
        torch.set_grad_enabled(True)
    elif how == "static":
        options["past_key_values"] = StaticCache(config=model.config, max_cache_len=TOTAL)
    elif how == "documents":
        options["document_starts"] = torch.zeros(2, TOTAL, dtype=torch.bool)
    elif how == "eager":
        model.set_attn_implementation("eager")
    elif how == "batch":
        ids = tokens(program.MOST_ROWS + 1, TOTAL)
    if how == "documents":
        cache = model.new_cache()
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        logits = model(ids[:, -1:], past_key_values=cache, use_cache=True, **options).logits
        assert_same(logits, model(ids).logits[:, -1:])
    else:
        assert_same(
            written(model, ids, **options).detach(), model(ids).logits[:, PREFIX - 1 :].detach()
        )
    assert not steps
    assert bool(seen) == (how == "hook")


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_the_same(
    beams: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scrambled(small_config(vocab_size=VOCABULARY))
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False}
    ours = model.generate(tokens(1, 5), pad_token_id=0, **options)
    assert len(steps) >= 10
    monkeypatch.setattr(PHAForCausalLM, "decode", None)
    assert torch.equal(ours, model.generate(tokens(1, 5), pad_token_id=0, **options))


def test_float64_and_autocast_are_left_to_the_layers(steps: list[int]) -> None:
    ids = tokens(1, TOTAL)
    written(PHAForCausalLM(PHAConfig(**small_config().to_dict())).double().eval(), ids)
    with torch.autocast("cpu", torch.bfloat16):
        written(cached_model("parallel", ("gss", "attention", "aux_ffn")), ids)
    assert not steps
