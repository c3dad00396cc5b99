"""What must hold of every model: causality, packing, padding, the cached state."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from pha.inputs import packed_starts
from pha.model.presets import PRESETS, preset
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops import OPS
from pha.utils.errors import PHAError
from tests.mixers.test_every_mixer import SMALL
from tests.modeling.common import (
    VOCABULARY,
    assert_same,
    cached_model,
    each_kind,
    each_main_kind,
    padded_batch,
    run_in_pieces,
    scrambled,
    small_config,
    starts_of,
    tokens,
)

# Causality


@functools.cache
def shrunken(name: str) -> PHAForCausalLM:
    """The preset with its kind, branches, expansions and ratio of heads, at a small size."""
    fields = preset(name)
    config = PHAConfig.from_preset(
        name,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=8,
        state_size=32,
        attention_layers=[x for x in fields.get("attention_layers", []) if x < 2],
        branch_options={
            x: fields.get("branch_options", {}).get(x, {}) | SMALL[x]
            for x in fields.get("branches", [])
            if x in SMALL
        },
    )
    return scrambled(config).requires_grad_(False)


# A miniature has the blocks and branches of its full size, and all are shrunken alike.
each_kind_of_preset = pytest.mark.parametrize(
    "name", sorted(name for name in PRESETS if "tiny" not in name)
)


@pytest.fixture
def steps() -> Iterator[None]:
    """State spaces step by step: an FFT lets rounding, though nothing else, flow back in time."""
    with ExitStack() as stack:
        for name in ("dss", "diagonal_ssm", "long_convolution"):
            stack.enter_context(OPS[name].force("naive"))
        yield


@pytest.mark.usefixtures("steps")
@each_kind_of_preset
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


@pytest.mark.usefixtures("steps")
@each_kind_of_preset
def test_no_gradient_flows_back_from_later_tokens(name: str) -> None:
    model = shrunken(name)
    embedded = model.model.embed_tokens(tokens(1, 41)).requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    for t in (0, 20, 40):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)
        assert torch.equal(gradient[:, t + 1 :], torch.zeros_like(gradient[:, t + 1 :]))
        # Every preset has a branch that sees the past: all of it counts. A gradient ends where
        # inputs are pooled.
        first = max(0, t - 2 * 4) if name.startswith("compressive") else 0
        assert bool(gradient[0, first : t + 1].abs().amax(-1).gt(0).all())


@pytest.mark.usefixtures("steps")
@each_main_kind
def test_a_long_sequence_is_causal_too(block: str, branches: tuple[str, ...]) -> None:
    # Long enough for fused attention to work in several blocks of queries and keys.
    model = cached_model(block, branches)
    ids = tokens(1, 700)
    before = model(ids).logits
    ids[:, 400:] = tokens(1, 300, seed=1)
    after = model(ids).logits
    assert torch.equal(after[:, :400], before[:, :400])


@pytest.mark.parametrize("name", ["pha-125m-mehta", "pha-125m-s4d", "h3-hybrid-125m", "hyena-125m"])
def test_convolutions_by_fft_let_only_rounding_flow_back(name: str) -> None:
    model = shrunken(name).double()
    ids = tokens(2, 70)
    before = model(ids).logits
    ids[:, 40:] = tokens(2, 30, seed=1)
    after = model(ids).logits
    assert_same(after[:, :40], before[:, :40])
    assert (after[:, 40:] - before[:, 40:]).abs().max() > 0.1


# Packing and padding


@each_main_kind
@pytest.mark.parametrize("lengths", [[9, 1, 1, 20, 6], [36, 1]])
def test_packed_documents_equal_separate_ones(
    block: str, branches: tuple[str, ...], lengths: list[int]
) -> None:
    model = cached_model(block, branches)
    ids = tokens(1, sum(lengths))
    packed = model(ids, document_starts=starts_of(lengths)).logits
    apart = torch.cat([model(piece).logits for piece in ids.split(lengths, 1)], 1)
    assert_same(packed, apart)
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


@each_main_kind
@pytest.mark.parametrize("side", ["left", "right", "holes"])
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
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids = tokens(2, 9)
    assert torch.equal(model(ids, attention_mask=torch.ones(2, 9)).logits, model(ids).logits)


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (1, 9), (2, 8), (2, 10)])
def test_rows_of_other_tokens_are_refused(shape: tuple[int, ...]) -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    for name in ("attention_mask", "document_starts"):
        with pytest.raises(PHAError, match=rf"{name} is .*; it must be \(2, 9\)"):
            model(tokens(2, 9), **{name: torch.ones(shape, dtype=torch.bool)})
    # One over the new token alone would take what was padding for context.
    cache = model(tokens(2, 9), use_cache=True).past_key_values
    with pytest.raises(PHAError, match=r"it must be \(2, 10\)"):
        model(tokens(2, 1), attention_mask=torch.ones(2, 1), past_key_values=cache)


@pytest.mark.parametrize(
    "values",
    [(0.0, -1e9), (1, 2), (0.5, 1.0), (1.0, math.nan)],
    ids=["added", "numbers", "half", "nan"],
)
@pytest.mark.parametrize("past", [0, 6])
def test_masks_of_more_than_0_and_1_are_refused(values: tuple[float, float], past: int) -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids, mask = tokens(2, 7), torch.tensor(values).repeat_interleave(4)[:7].expand(2, 7)
    with torch.inference_mode():
        cache = model(ids[:, :past], use_cache=True).past_key_values if past else None
        with pytest.raises(PHAError, match="more than 0 and 1"):
            model(ids[:, past:], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("new", [1, 3])
def test_after_padding_a_mask_is_needed(new: int) -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids, mask = padded_batch((9, 4), 9, "left")
    with torch.inference_mode():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        for count in (1, 1, new):  # the first by layers, then by compiled instructions
            with pytest.raises(PHAError, match="attention_mask is "):
                model(tokens(2, count), attention_mask=mask, past_key_values=cache)
            for given in (copy.deepcopy(cache), cache, cache):  # nor is it forgotten that it does
                with pytest.raises(PHAError, match="holds padding; give attention_mask"):
                    model(tokens(2, count), past_key_values=given)
            mask = torch.cat([mask, mask.new_ones(2, count)], 1)
            cache = model(
                tokens(2, count), attention_mask=mask, past_key_values=cache
            ).past_key_values
        cache.reset()
        model(tokens(2, 5), past_key_values=cache)


@each_main_kind
def test_rows_packed_by_position_ids(block: str, branches: tuple[str, ...]) -> None:
    model, lengths = cached_model(block, branches), [4, 1, 9, 1, 3]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = model(ids, document_starts=starts_of(lengths)).logits
    assert_same(model(ids, position_ids=positions).logits, expected)
    assert_same(model(ids, position_ids=positions, use_cache=False).logits, expected)
    rows = tokens(2, sum(lengths), seed=1)
    each = model(rows, document_starts=starts_of(lengths).repeat(2, 1)).logits
    assert_same(model(rows, position_ids=positions).logits, each)
    # Positions that start late or are those of padding begin no document.
    assert_same(model(ids, position_ids=torch.arange(18)[None] + 7).logits, model(ids).logits)
    padded, mask = padded_batch((18, 5, 11), 18, "holes")
    counted, seen = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1), mask.bool()
    given = model(padded, attention_mask=mask, position_ids=counted).logits
    assert_same(given[seen], model(padded, attention_mask=mask).logits[seen])
    assert packed_starts(counted, mask, 0, {}) is None


def test_other_ways_to_pack_rows_are_refused() -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    cache = model(tokens(1, 4), use_cache=True).past_key_values
    positions = torch.tensor([[4, 5, 0, 1]])
    with pytest.raises(PHAError, match="give document_starts over all of them"):
        model(tokens(1, 4), position_ids=positions, past_key_values=cache)
    for name in ("seq_idx", "cu_seq_lens_q"):
        with pytest.raises(PHAError, match=f"packed by {name}; give position_ids"):
            model(tokens(1, 4), **{name: torch.tensor([[0, 0, 1, 1]])})


# The cached state


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A length and where to cut it."""
    T = draw(st.integers(2, 24))
    return T, sorted(draw(st.sets(st.integers(1, T - 1), max_size=6)))


few_examples = settings(max_examples=8, deadline=None, derandomize=True, database=None)


@each_main_kind
@given(split=splits())
@few_examples
def test_any_split_with_the_cache_equals_one_pass(
    block: str, branches: tuple[str, ...], split: tuple[int, list[int]]
) -> None:
    model, (T, cuts) = cached_model(block, branches), split
    ids = tokens(2, T)
    assert_same(run_in_pieces(model, ids, cuts), model(ids).logits)


@each_main_kind
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


@each_main_kind
@given(split=splits(), data=st.data())
@few_examples
def test_any_split_of_a_padded_batch(
    block: str, branches: tuple[str, ...], split: tuple[int, list[int]], data: st.DataObject
) -> None:
    model, (T, cuts) = cached_model(block, branches), split
    lengths = data.draw(st.tuples(st.just(T), st.integers(1, T), st.integers(1, T)))
    ids, mask = padded_batch(lengths, T, data.draw(st.sampled_from(["left", "right", "holes"])))
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
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
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


def test_the_complex_state_is_kept_as_pairs_of_real_numbers() -> None:
    model = cached_model("parallel", ("mehta_gss", "attention", "aux_ffn"))
    for T in (1, 9):
        for layer in model(tokens(2, T), use_cache=True).past_key_values.layers:
            state = layer.recurrent_states[0]
            assert (state.shape, state.dtype) == ((2, 12, 20, 2), torch.float32)


@pytest.mark.parametrize("first", ["gss", "mehta_gss"])
def test_recurrent_state_is_float32_beside_bfloat16_keys(first: str) -> None:
    model = scrambled(small_config(branches=[first, "attention"])).bfloat16()
    cache = model(tokens(2, 9)).past_key_values
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_what_each_layer_keeps() -> None:
    kept = {
        ("gss", "attention", "aux_ffn"): "hybrid",
        ("attention", "aux_ffn"): "full_attention",
    }
    for branches, kind in kept.items():
        assert small_config(branches=list(branches)).layer_types == [kind] * 2


def test_what_layers_of_different_branches_keep() -> None:
    def kinds(**fields: Any) -> list[str]:
        return small_config(num_hidden_layers=4, **fields).layer_types

    linear, full = "linear_attention", "full_attention"
    # Without keys anywhere, the first layer counts the past.
    assert kinds(branches=["mehta_gss"]) == ["hybrid", linear, linear, linear]
    assert kinds(branches=["gss"], attention_layers=[1, 3]) == [linear, full, linear, full]
    assert kinds(branches=["gss", "attention"], attention_layers=[0]) == [full, *["hybrid"] * 3]
    # Layers that keep nothing are not asked for the length of the past.
    assert kinds(branches=["aux_ffn"], attention_layers=[2]) == [linear, linear, full, linear]
    window = kinds(branches=["gss", "attention"], attention_layers=[3], attention_window=8)
    assert window == [*["hybrid_sliding"] * 3, "sliding_attention"]


def test_the_past_is_counted_where_the_first_layers_keep_nothing() -> None:
    config = small_config(branches=["aux_ffn"], attention_layers=[1], num_hidden_layers=3)
    model = scrambled(config)
    ids = tokens(2, 9)
    cache = model(ids[:, :5]).past_key_values
    assert cache.get_seq_length() == 5
    rest = model(ids[:, 5:], past_key_values=cache).logits
    assert cache.get_seq_length() == 9
    assert_same(rest, model(ids).logits[:, 5:])


@each_main_kind
def test_positions_count_only_as_differences(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids = tokens(2, 9)
    shifted = model(ids, position_ids=torch.arange(100, 109)[None]).logits
    # Angles of up to 109 radians are float32: off by 109 * 6e-8, times a temperature of 10.
    torch.testing.assert_close(shifted, model(ids).logits, rtol=0, atol=1e-4)
