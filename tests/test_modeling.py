"""The language model as a whole: causality, state, packing, generation, saving, loss.

`python tests/test_modeling.py` rewrites the golden loss curve, after a change that is meant to
change the mathematics; see `test_golden_loss_curve`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from pha.modeling import PHAConfig, PHAForCausalLM
from pha.nn import ArchitectureConfig
from pha.nn.presets import PRESETS
from pha.ops import OPS
from pha.utils.errors import PHAError

GOLDEN = Path(__file__).parent / "golden" / "loss-pha-50.json"
VOCABULARY = 31
FLOAT32_PARAMETERS = {"log_A", "log_dt", "theta", "logit_scale"}
SUBSETS = [
    subset
    for size in (1, 2, 3)
    for subset in itertools.combinations(("gss", "attention", "ffn"), size)
]
KINDS = [("parallel", subset) for subset in SUBSETS]
KINDS += [("sequential", ("attention", "gss")), ("sequential", ("gss",))]
# Logits are of order one; other matrix shapes add their terms in another order, a few units of
# float32 apiece, and two layers pass them on.
ATOL = 1e-5

each_kind = pytest.mark.parametrize(
    ("block", "branches"), KINDS, ids=[f"{block}-{'+'.join(names)}" for block, names in KINDS]
)
each_main_kind = pytest.mark.parametrize(
    ("block", "branches"),
    [
        ("parallel", ("gss", "attention", "ffn")),
        ("parallel", ("attention",)),
        ("parallel", ("gss",)),
        ("sequential", ("attention", "gss")),
    ],
    ids=["pha", "attention-only", "gss-only", "sequential"],
)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers whichever tests run, in whatever order."""
    torch.manual_seed(0)


def small_config(**overrides: Any) -> PHAConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "state_size": 48,
    }
    return PHAConfig(**(fields | overrides))


def scrambled(config: PHAConfig, seed: int = 0) -> PHAForCausalLM:
    """A model whose every parameter is off its starting value, with layers that matter.

    Fresh layers hardly move the residual stream, and a tied head then repeats the last token.
    """
    torch.manual_seed(seed)
    model = PHAForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            if "embed_tokens" not in name:
                parameter.add_(spread * torch.randn_like(parameter))
            if "mixing.norms" in name or name.endswith(("W_down.weight", "W_o.weight")):
                parameter.mul_(4)
    return model


@functools.cache
def cached_model(block: str, branches: tuple[str, ...]) -> PHAForCausalLM:
    """Shared by tests that only run the model."""
    return scrambled(small_config(block=block, branches=list(branches))).requires_grad_(False)


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


# Causality


@functools.cache
def shrunken(name: str) -> PHAForCausalLM:
    """The preset with its kind, branches, expansions and ratio of heads, at a small size."""
    config = PHAConfig.from_preset(
        name,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=8,
        state_size=32,
    )
    return scrambled(config).requires_grad_(False)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_later_token_never_changes_an_earlier_logit(name: str) -> None:
    model = shrunken(name)
    ids = tokens(2, 70)
    before = model(ids).logits
    for t in (1, 37, 69):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        after = model(changed).logits
        # Row by row the same products in the same order: equal to the last bit.
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_no_gradient_flows_back_from_later_tokens(name: str) -> None:
    model = shrunken(name)
    embedded = model.model.embed_tokens(tokens(1, 41)).requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    for t in (0, 20, 40):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)
        assert torch.equal(gradient[:, t + 1 :], torch.zeros_like(gradient[:, t + 1 :]))
        # Every preset has a branch that sees the past: all of it counts.
        assert bool(gradient[0, : t + 1].abs().amax(-1).gt(0).all())


@each_main_kind
def test_a_long_sequence_is_causal_too(block: str, branches: tuple[str, ...]) -> None:
    # Long enough for fused attention to work in several blocks of queries and keys.
    model = cached_model(block, branches)
    ids = tokens(1, 700)
    before = model(ids).logits
    ids[:, 400:] = tokens(1, 300, seed=1)
    after = model(ids).logits
    assert torch.equal(after[:, :400], before[:, :400])


# Packing and padding


def starts_of(lengths: list[int]) -> Tensor:
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    return starts


@each_kind
@pytest.mark.parametrize("lengths", [[9, 1, 1, 20, 6], [36, 1]])
def test_packed_documents_equal_separate_ones(
    block: str, branches: tuple[str, ...], lengths: list[int]
) -> None:
    model = cached_model(block, branches)
    ids = tokens(1, sum(lengths))
    packed = model(ids, document_starts=starts_of(lengths)).logits
    apart = torch.cat([model(piece).logits for piece in ids.split(lengths, 1)], 1)
    assert_same(packed, apart)
    if set(branches) != {"ffn"}:
        # The control: without the boundaries the documents do see each other.
        assert (model(ids).logits - apart).abs().max() > 0.01


@each_main_kind
def test_packed_rows_have_boundaries_of_their_own(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids = tokens(2, 12)
    starts = torch.cat([starts_of([4, 8]), starts_of([7, 5])])
    together = model(ids, document_starts=starts).logits
    for row in range(2):
        alone = model(ids[row : row + 1], document_starts=starts[row : row + 1]).logits
        assert_same(together[row : row + 1], alone)


def padded_batch(lengths: tuple[int, ...], width: int, side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows of their own lengths, the rest filled with random tokens that the mask hides."""
    columns = torch.arange(width)
    rows = torch.tensor(lengths)[:, None]
    mask = columns >= width - rows if side == "left" else columns < rows
    return tokens(len(lengths), width), mask.long()


@each_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_padded_batch_equals_its_rows(
    block: str, branches: tuple[str, ...], side: str
) -> None:
    model = cached_model(block, branches)
    ids, mask = padded_batch((17, 5, 1, 12), 17, side)
    logits = model(ids, attention_mask=mask).logits
    assert bool(logits.isfinite().all())
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, real]).logits
        assert_same(logits[row : row + 1, real], alone)


@each_main_kind
def test_padded_and_packed_at_once(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids = tokens(1, 18)
    mask = (torch.arange(18) >= 5).long()[None]
    starts = torch.zeros(1, 18, dtype=torch.bool)
    starts[0, [5, 11]] = True
    logits = model(ids, attention_mask=mask, document_starts=starts).logits
    assert_same(logits[:, 5:11], model(ids[:, 5:11]).logits)
    assert_same(logits[:, 11:], model(ids[:, 11:]).logits)


def test_a_mask_of_ones_is_no_mask() -> None:
    model = cached_model("parallel", ("gss", "attention", "ffn"))
    ids = tokens(2, 9)
    assert torch.equal(model(ids, attention_mask=torch.ones(2, 9)).logits, model(ids).logits)
    with pytest.raises(PHAError, match=r"attention_mask must be \(batch, tokens\)"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))


# The cached state


def run_in_pieces(
    model: PHAForCausalLM,
    ids: Tensor,
    cuts: list[int],
    attention_mask: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> Tensor:
    """Feed `ids` cut at `cuts`, with masks over the whole sequence so far."""
    cache, outputs = None, []
    for begin, end in itertools.pairwise([0, *cuts, ids.shape[1]]):
        output = model(
            ids[:, begin:end],
            attention_mask=None if attention_mask is None else attention_mask[:, :end],
            document_starts=None if document_starts is None else document_starts[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        outputs.append(output.logits)
    return torch.cat(outputs, 1)


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A length and where to cut it."""
    T = draw(st.integers(2, 24))
    return T, sorted(draw(st.sets(st.integers(1, T - 1), max_size=6)))


few_examples = settings(max_examples=8, deadline=None, derandomize=True, database=None)


@each_kind
@given(split=splits())
@few_examples
def test_any_split_with_the_cache_equals_one_pass(
    block: str, branches: tuple[str, ...], split: tuple[int, list[int]]
) -> None:
    model, (T, cuts) = cached_model(block, branches), split
    ids = tokens(2, T)
    assert_same(run_in_pieces(model, ids, cuts), model(ids).logits)


@each_kind
@given(split=splits(), data=st.data())
@few_examples
def test_any_split_of_packed_documents(
    block: str, branches: tuple[str, ...], split: tuple[int, list[int]], data: st.DataObject
) -> None:
    model, (T, cuts) = cached_model(block, branches), split
    bits = data.draw(st.lists(st.booleans(), min_size=2 * T, max_size=2 * T))
    starts = torch.tensor(bits).view(2, T)
    ids = tokens(2, T)
    whole = model(ids, document_starts=starts).logits
    assert_same(run_in_pieces(model, ids, cuts, document_starts=starts), whole)


@each_kind
@given(split=splits(), data=st.data())
@few_examples
def test_any_split_of_a_left_padded_batch(
    block: str, branches: tuple[str, ...], split: tuple[int, list[int]], data: st.DataObject
) -> None:
    model, (T, cuts) = cached_model(block, branches), split
    lengths = data.draw(st.tuples(st.just(T), st.integers(1, T), st.integers(1, T)))
    ids, mask = padded_batch(lengths, T)
    starts = None
    if data.draw(st.booleans()):
        starts = torch.zeros(3, T, dtype=torch.bool)
        starts[:, data.draw(st.integers(0, T - 1))] = True
    whole = model(ids, attention_mask=mask, document_starts=starts).logits
    actual = run_in_pieces(model, ids, cuts, mask, starts)
    real = mask.bool()
    assert_same(actual[real], whole[real])


@each_kind
def test_one_token_at_a_time_equals_one_pass(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids = tokens(3, 26)
    assert_same(run_in_pieces(model, ids, list(range(1, 26))), model(ids).logits)


def test_the_cache_is_the_state_and_nothing_else() -> None:
    model = cached_model("parallel", ("gss", "attention", "ffn"))
    cache = model(tokens(2, 9), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 9
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, 2, 9, 10)
        assert layer.recurrent_states[0].shape == (2, 48)
    assert model(tokens(2, 9), use_cache=False).past_key_values is None
    model.config.use_cache = False
    try:
        assert model(tokens(2, 9)).past_key_values is None
    finally:
        model.config.use_cache = True


def test_recurrent_state_is_float32_beside_bfloat16_keys() -> None:
    model = scrambled(small_config()).bfloat16()
    cache = model(tokens(2, 9)).past_key_values
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_what_each_layer_keeps() -> None:
    kept = {
        ("gss", "attention", "ffn"): "hybrid",
        ("attention", "ffn"): "full_attention",
    }
    for branches, kind in kept.items():
        assert small_config(branches=list(branches)).layer_types == [kind] * 2


@each_main_kind
def test_positions_count_only_as_differences(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids = tokens(2, 9)
    shifted = model(ids, position_ids=torch.arange(100, 109)[None]).logits
    # Angles of up to 109 radians are float32: off by 109 * 6e-8, times a temperature of 10.
    torch.testing.assert_close(shifted, model(ids).logits, rtol=0, atol=1e-4)


# Generation


def greedy(model: PHAForCausalLM, ids: Tensor, count: int) -> Tensor:
    """Without any cache: the whole sequence again for each new token."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def generate(model: PHAForCausalLM, ids: Tensor, count: int, **kwargs: Any) -> Tensor:
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False} | kwargs
    return model.generate(ids, max_new_tokens=count, **kwargs)


@each_kind
def test_greedy_generation_equals_an_uncached_loop(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids = tokens(2, 7)
    expected = greedy(model, ids, 12)
    # More than one token in use, or the comparison says little.
    assert len(expected[:, 7:].unique()) > 2
    assert torch.equal(generate(model, ids, 12), expected)


@each_main_kind
def test_generation_from_a_left_padded_batch(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids, mask = padded_batch((8, 3), 8)
    result = generate(model, ids, 10, attention_mask=mask, pad_token_id=0)
    for row, real in enumerate(mask.bool()):
        alone = greedy(model, ids[row : row + 1, real], 10)
        assert torch.equal(result[row, 8:], alone[0, -10:])


@each_main_kind
def test_beam_search_carries_the_right_state(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids = tokens(2, 7)
    cached = generate(model, ids, 8, num_beams=3)
    assert torch.equal(cached, generate(model, ids, 8, num_beams=3, use_cache=False))


@each_main_kind
def test_generation_continues_from_a_cache(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids = tokens(1, 7)
    first = generate(model, ids, 5, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tokens(1, 4, seed=9)], 1)
    again = generate(model, turn, 5, past_key_values=first.past_key_values)
    assert torch.equal(again, greedy(model, turn, 5))


@each_main_kind
def test_generation_with_a_prompt_in_chunks(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids = tokens(2, 11)
    chunked = generate(model, ids, 5, prefill_chunk_size=4)
    assert torch.equal(chunked, greedy(model, ids, 5))


# Loss


def test_loss_is_cross_entropy_of_the_shifted_logits() -> None:
    model = cached_model("parallel", ("gss", "attention", "ffn"))
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
    model = cached_model("parallel", ("gss", "attention", "ffn"))
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
    model = cached_model("parallel", ("gss", "attention", "ffn"))
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
        OPS["scan"].force("naive"),
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
    model = cached_model("parallel", ("gss", "attention", "ffn"))
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
    model = cached_model("parallel", ("gss", "attention", "ffn"))
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


def test_loading_in_bfloat16_keeps_the_scalars_in_float32(tmp_path: Path) -> None:
    model = scrambled(small_config())
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
    assert seen == FLOAT32_PARAMETERS
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
    branch = PHAConfig.from_preset(name).branches[0]
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


# The golden loss curve

STEPS, BATCH, LENGTH = 50, 4, 32


def congruential(seed: int) -> Iterator[int]:
    """A linear congruential generator: 15 usable bits a step, the same on any machine."""
    state = seed % 2**31
    while True:
        state = (1103515245 * state + 12345) % 2**31
        yield state >> 16


def golden_tokens(count: int, vocabulary: int) -> list[int]:
    """Three times in four the successor 5 x + 3 of the token before, else a random one."""
    token, result = 0, []
    for chance in itertools.islice(congruential(1), count):
        token = (5 * token + 3 if chance % 4 else chance // 4) % vocabulary
        result.append(token)
    return result


def golden_model() -> PHAForCausalLM:
    """Weights from integers too, by name: neither torch's generators nor the order matter."""
    config = small_config(
        vocab_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=8, state_size=32
    )
    model = PHAForCausalLM(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stream = congruential(zlib.crc32(name.encode()))
            uniform = torch.tensor([next(stream) / 2**14 - 1 for _ in range(parameter.numel())])
            if parameter.dim() == 2:
                # Uniform on [-1, 1) has variance one third.
                spread = (3 / parameter.shape[1]) ** 0.5
                parameter.copy_(spread * uniform.view_as(parameter))
            elif name.endswith("log_dt"):
                parameter.copy_(torch.linspace(math.log(1e-3), math.log(1e-1), parameter.numel()))
    return model


def golden_losses() -> list[float]:
    """Train for 50 steps."""
    model = golden_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    count = STEPS * BATCH * (LENGTH + 1)
    data = torch.tensor(golden_tokens(count, 64)).view(STEPS, BATCH, LENGTH + 1)
    losses = []
    for batch in data:
        loss = model(batch[:, :-1], shift_labels=batch[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_golden_loss_curve() -> None:
    """A change that is not about the mathematics leaves the curve as it is."""
    golden = json.loads(GOLDEN.read_text())["losses"]
    assert len(golden) == STEPS
    assert golden[-1] < golden[0] - 1
    # Instruction sets (SSE4, AVX2, AVX-512) and thread counts move these losses by up to 1e-6 of
    # themselves, and float64 as much: rounding has not had the steps to grow. A change of one
    # part in a thousand to a temperature, a decay or a residual scale moves them by more than 1e-5.
    assert golden_losses() == pytest.approx(golden, rel=1e-5)


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps(
            {
                "what": "training loss per step, nats per token; see tests/test_modeling.py",
                "losses": golden_losses(),
            },
            indent=1,
        )
        + "\n"
    )
