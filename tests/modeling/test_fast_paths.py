"""Fast paths give what the modules would, or leave it to them: hooks, adapters, caches, labels."""

from __future__ import annotations

import copy
import io
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import cpu_offload
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import DynamicCache

from pha.modeling import PHAForCausalLM
from pha.utils.errors import PHAError
from tests.modeling.common import (
    assert_same,
    cached_model,
    each_main_kind,
    scrambled,
    small_config,
    tokens,
)

T = 12


@pytest.fixture
def model() -> PHAForCausalLM:
    return scrambled(small_config())


def replace(linear: nn.Linear) -> nn.Linear:
    original = linear.forward
    linear.forward = lambda input: original(input).flip(-1)  # type: ignore[method-assign]
    return linear


def hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, inputs, y: y.flip(-1))
    return linear


def offload(linear: nn.Linear) -> nn.Linear:
    cpu_offload(linear, execution_device=torch.device("cpu"))
    return linear


def quantise(linear: nn.Linear) -> nn.Module:
    kinds = {nn.Linear}
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), kinds, torch.qint8)[0]


def normalise(linear: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(linear)


def add(linear: nn.Linear) -> nn.Module:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.change = linear, nn.Linear(linear.in_features, linear.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.change(x)

    torch.manual_seed(1)
    return Adapter()


CHANGES: list[Callable[[nn.Linear], nn.Module]] = [replace, hook, offload, quantise, normalise, add]
each_change = pytest.mark.parametrize("change", CHANGES)


@each_change
def test_the_loss_is_that_of_the_logits(
    change: Callable[[nn.Linear], nn.Module], model: PHAForCausalLM
) -> None:
    ids, labels = tokens(2, T), tokens(2, T, seed=1)
    labels[0, :5] = -100
    # To quantise takes a weight that is not tied.
    head = copy.deepcopy(model.lm_head) if change is quantise else model.lm_head
    model.lm_head = change(head)  # type: ignore[assignment]
    with torch.no_grad():
        output = model(ids, labels=labels)
        assert_same(output.logits, model(ids).logits)
        expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(output.loss, expected)
        x = model.model(ids).last_hidden_state.flatten(0, 1)
        losses, hits = model.token_statistics(x, ids.flatten())
        logits = output.logits.flatten(0, 1)
        torch.testing.assert_close(losses, F.cross_entropy(logits, ids.flatten(), reduction="none"))
        assert torch.equal(hits, logits.argmax(-1) == ids.flatten())


def test_a_loss_through_modules_is_the_fused_one(model: PHAForCausalLM) -> None:
    ids, results = tokens(2, T), []
    for _ in range(2):
        model.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        results.append([p.grad.clone() for p in model.parameters()])
        model.lm_head.register_forward_hook(lambda *_: None)
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)


def test_an_adapter_on_the_head_learns(model: PHAForCausalLM) -> None:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "W_up"]))
    ids = tokens(2, T)
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    for part in ("lm_head", "W_up"):
        gradients = [p.grad for n, p in adapted.named_parameters() if part in n and "lora_B" in n]
        assert gradients
        assert all(gradient is not None and gradient.any() for gradient in gradients)


# --- writing tokens


def written(model: PHAForCausalLM, ids: Tensor, first: int = 5) -> Tensor:
    """Logits of what follows the first tokens, one token at a time."""
    cache = model.new_cache()
    model(ids[:, :first], past_key_values=cache, use_cache=True)
    logits = [
        model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        for t in range(first, ids.shape[1])
    ]
    return torch.cat(logits, dim=1)


LINEARS = ["gss.W_g", "gss.W_C", "attention.W_q", "attention.W_o", "aux_ffn.swiglu.W_up"]


@torch.no_grad()
@pytest.mark.parametrize("place", [f"branches.{name}" for name in LINEARS] + ["primary_ffn.W_down"])
@each_change
def test_tokens_go_through_what_was_changed(
    change: Callable[[nn.Linear], nn.Module],
    place: str,
    model: PHAForCausalLM,
    steps: list[int],
) -> None:
    ids = tokens(2, T)
    before = model(ids).logits
    owner = model.model.layers[1].get_submodule(place.rpartition(".")[0])
    name = place.rpartition(".")[2]
    setattr(owner, name, change(getattr(owner, name)))
    expected = model(ids).logits
    if change in (replace, hook, add):
        assert (expected - before).abs().max() > 1e-3
    tolerance = 0.2 if change is quantise else 1e-5  # whose scales follow from the batch
    torch.testing.assert_close(written(model, ids), expected[:, 5:], rtol=0, atol=tolerance)
    assert not steps


MODULES = [
    *("", "embed_tokens", "norm", "layers.0", "layers.1.mixing", "layers.1.mixing.norms.gss"),
    *("layers.0.mix_residual", "layers.0.mix_residual.norm", "layers.0.mix_residual.dropout"),
    *("layers.1.branches.gss", "layers.1.branches.attention", "layers.1.branches.aux_ffn"),
    *("layers.1.branches.aux_ffn.swiglu", "layers.1.primary_ffn", "layers.1.ffn_residual"),
]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hook", "forward"])
@pytest.mark.parametrize("name", [*MODULES, "lm_head"])
def test_who_listens_hears_every_token(
    name: str, kind: str, model: PHAForCausalLM, steps: list[int]
) -> None:
    ids, heard = tokens(1, T), []
    module = model.lm_head if name == "lm_head" else model.model.get_submodule(name)
    cache = model.new_cache()
    model(ids[:, :5], past_key_values=cache)
    model(ids[:, 5:6], past_key_values=cache)
    assert len(steps) == 1
    if kind == "hook":
        module.register_forward_hook(lambda *_: heard.append(1))
    else:
        original = module.forward

        def listening(*x: Any, **y: Any) -> Any:
            heard.append(1)
            return original(*x, **y)

        module.forward = listening
    for t in range(6, T):  # in the middle of a text
        model(ids[:, t : t + 1], past_key_values=cache)
    assert len(heard) == T - 6
    assert len(steps) == 1


def next_logits(model: PHAForCausalLM, token: Tensor, cache: DynamicCache) -> Tensor:
    """Those of one more token, which leaves `cache` as it is; those of the layers agree."""
    logits = model(token, past_key_values=copy.deepcopy(cache)).logits
    with torch.enable_grad():  # which leaves it to the layers
        expected = model(token, past_key_values=copy.deepcopy(cache)).logits
    assert_same(logits, expected.detach())
    return logits


@torch.no_grad()
@pytest.mark.parametrize("how", ["in place", "data", "assigned", "fresh data"])
def test_every_weight_that_changes_is_seen_by_the_next_token(
    how: str, model: PHAForCausalLM, steps: list[int]
) -> None:
    def scale(name: str, factor: float) -> None:
        parameter = model.get_parameter(name)
        if how == "in place":
            parameter.mul_(factor)
        elif how == "data":
            parameter.data.mul_(factor)
        elif how == "fresh data":
            parameter.data = factor * parameter.data
        else:
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, nn.Parameter(factor * parameter))
            model.tie_weights()

    ids, cache = tokens(1, T), model.new_cache()
    model(ids[:, :8], past_key_values=cache)
    before, names = next_logits(model, ids[:, 8:9], cache), list(dict(model.named_parameters()))
    for name in names:
        scale(name, 1.5)
        changed = next_logits(model, ids[:, 8:9], cache)
        assert not torch.equal(changed, before), name
        scale(name, 1 / 1.5)
        before = next_logits(model, ids[:, 8:9], cache)
    assert len(steps) == 1 + 2 * len(names)


@torch.no_grad()
def test_another_head_in_the_middle_of_a_text_is_seen(
    model: PHAForCausalLM, steps: list[int]
) -> None:
    ids, cache = tokens(1, T), model.new_cache()
    model(ids[:, :8], past_key_values=cache)
    model(ids[:, 8:9], past_key_values=cache)
    model.lm_head = nn.Linear(32, 31, bias=False)
    next_logits(model, ids[:, 9:10], cache)
    assert len(steps) == 2


@torch.no_grad()
def test_a_window_from_the_middle_of_a_text_on_is_seen(
    model: PHAForCausalLM, steps: list[int]
) -> None:
    ids, cache = tokens(1, T), model.new_cache()
    model(ids[:, :8], past_key_values=cache)
    model(ids[:, 8:9], past_key_values=cache)
    model.config.attention_window = 3
    next_logits(model, ids[:, 9:10], cache)
    assert len(steps) == 1


@torch.no_grad()
def test_settings_that_change_are_seen(steps: list[int], model: PHAForCausalLM) -> None:
    ids, cache = tokens(1, T), model.new_cache()
    model(ids[:, :5], past_key_values=cache)
    before = next_logits(model, ids[:, 5:6], cache)
    for owner, name, value in (
        ("norm", "eps", 1.0),
        ("layers.0.mix_residual", "alpha", 7.0),
        ("layers.1.branches.gss", "input_scaling", "zero-order-hold"),
        ("layers.1.branches.attention", "cosine", False),
    ):
        setattr(model.model.get_submodule(owner), name, value)
        changed = next_logits(model, ids[:, 5:6], cache)
        assert not torch.equal(changed, before), name
        before = changed
    assert len(steps) == 5


# --- caches


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


CACHES = {
    "empty": lambda model: DynamicCache(),
    "of transformers": lambda model: DynamicCache(config=model.config),
    "ours": lambda model: model.new_cache(),
}


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("kind", CACHES)
def test_every_growing_cache_works(kind: str, model: PHAForCausalLM, steps: list[int]) -> None:
    ids, cache = tokens(2, T), CACHES[kind](model)
    logits = [model(ids[:, :5], past_key_values=cache).logits]
    logits += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, T)]
    assert_same(torch.cat(logits, 1), model(ids).logits)
    assert len(steps) == T - 5


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("read", [5, 1])  # then by the layers, or the first token only
def test_our_cache_repeats_and_selects_sequences(read: int, model: PHAForCausalLM) -> None:
    ids, cache = tokens(2, T), model.new_cache()
    model(ids[:, :5], past_key_values=cache)
    model(ids[:, 5:6], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([5, 0, 1, 3]))
    rows = torch.tensor([1, 0, 0, 1])
    for begin in range(6, T, read):
        logits = model(ids[rows, begin : begin + read], past_key_values=cache).logits
        assert_same(logits, model(ids[rows, : begin + read]).logits[:, begin:])


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("written_before", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cropped(cache),
    ],
    ids=["repeated", "selected", "permuted", "cropped"],
)
def test_other_caches_whose_states_stayed_behind_are_refused(
    change: Callable[[DynamicCache], Any],
    written_before: bool,
    model: PHAForCausalLM,
    steps: list[int],
) -> None:
    ids, cache = tokens(2, T), DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    if written_before:
        model(ids[:, 5:6], past_key_values=cache)
    change(cache)
    rows = cache.layers[0].keys.shape[0]
    with pytest.raises(PHAError, match=r"model\.new_cache\(\)"):
        model(tokens(rows, 1), past_key_values=cache)
    assert len(steps) == written_before


def cropped(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]


@pytest.mark.usefixtures("no_gradients")
def test_a_pickled_cache_goes_on(model: PHAForCausalLM) -> None:
    ids = tokens(2, 12)
    cache = model(ids[:, :9], use_cache=True).past_key_values
    with io.BytesIO() as file:
        torch.save(cache, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert_same(model(ids[:, 9:], past_key_values=again).logits, model(ids).logits[:, 9:])
    with pytest.raises(PHAError, match=r"is a tuple, not a cache; make one with model.new_cache"):
        model(ids, past_key_values=tuple(cache.layers))


def test_a_reordered_or_emptied_cache_goes_on(model: PHAForCausalLM) -> None:
    ids, cache = tokens(2, T), DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    logits = model(ids[1:, 5:6].repeat(2, 1), past_key_values=cache).logits
    assert_same(logits, model(ids[[1, 1], :6]).logits[:, -1:])
    if Version(transformers.__version__) >= Version("5.18"):  # before, a reset leaves keys of zero
        cache.reset()
        assert_same(model(ids[:, :5], past_key_values=cache).logits, model(ids[:, :5]).logits)


@pytest.mark.parametrize("prompt", [1, 4])
@pytest.mark.parametrize(
    "other",
    [
        {"num_hidden_layers": 1},
        {"branches": ["attention", "aux_ffn"]},
        {"block": "hybrid", "branches": ["gss"]},
    ],
)
def test_a_cache_of_another_model_is_refused(
    other: dict[str, Any], prompt: int, model: PHAForCausalLM
) -> None:
    cache = scrambled(small_config(**other)).new_cache()
    with pytest.raises(PHAError, match="cache"):
        model(tokens(1, prompt), past_key_values=cache)


@pytest.mark.parametrize("prompt", [1, 4])
@each_main_kind
def test_a_cache_of_other_sequences_is_refused(
    block: str, branches: tuple[str, ...], prompt: int
) -> None:
    model = cached_model(block, branches)
    cache = model(tokens(2, 5), use_cache=True).past_key_values
    with pytest.raises(PHAError, match="of 2 sequences, and 1 are given"):
        model(tokens(1, prompt), past_key_values=cache)


@pytest.mark.usefixtures("no_gradients")
def test_old_keys_are_let_go_layer_by_layer(model: PHAForCausalLM) -> None:
    cache = model(tokens(1, 9), use_cache=True).past_key_values
    old, alive = weakref.ref(cache.layers[0].keys), []
    layer = model.model.get_submodule("layers.1")
    layer.register_forward_pre_hook(lambda *_: alive.append(old() is not None))
    model(tokens(1, 5), past_key_values=cache)
    assert alive == [False]


# --- labels


@pytest.mark.parametrize("shape", [(T,), (1, T), (2, T - 1), (2, T + 1), (4, T)])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_another_batch_are_refused(
    name: str, shape: tuple[int, ...], model: PHAForCausalLM
) -> None:
    with pytest.raises(PHAError, match=rf"labels are {re.escape(str(shape))} for .*\(2, {T}\)"):
        model(tokens(2, T), **{name: torch.zeros(shape, dtype=torch.long)})


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_batch_without_labels_teaches_nothing(items: Any, model: PHAForCausalLM) -> None:
    ids = tokens(2, T)
    labels = torch.full_like(ids, -100)
    loss = model.train()(ids, labels=labels, num_items_in_batch=items).loss
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
