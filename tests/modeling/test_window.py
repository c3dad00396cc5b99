"""Attention windows: exact, constant in memory, and behind them the state space."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pha.modeling import PHAConfig, PHAForCausalLM
from pha.utils.errors import PHAError
from tests.modeling.common import (
    assert_same,
    each_main_kind,
    padded_batch,
    run_in_pieces,
    scrambled,
    small_config,
    starts_of,
    tokens,
)
from tests.modeling.test_generation import generate, greedy

WINDOW = 5


@functools.cache
def windowed(
    block: str,
    branches: tuple[str, ...],
    window: int | None = WINDOW,
    dtype: torch.dtype = torch.float32,
) -> PHAForCausalLM:
    config = small_config(block=block, branches=list(branches), attention_window=window)
    return scrambled(config).requires_grad_(False).to(dtype)


def in_pieces(model: PHAForCausalLM, ids: Tensor, sizes: list[int], **masks: Tensor) -> Tensor:
    return run_in_pieces(model, ids, list(itertools.accumulate(sizes))[:-1], **masks)


@each_main_kind
def test_what_lies_behind_the_window_reaches_attention_only_models_not_at_all(
    block: str, branches: tuple[str, ...]
) -> None:
    model = windowed(block, branches)
    ids = tokens(1, 40)
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 31
    before, after = model(ids).logits, model(changed).logits
    # Two layers see (WINDOW - 1) tokens back each.
    reach = 2 * (WINDOW - 1)
    same = torch.equal(before[:, reach + 1 :], after[:, reach + 1 :])
    assert same == (not {"gss", "mehta_gss"} & set(branches))
    assert not torch.equal(before[:, reach], after[:, reach])


@each_main_kind
def test_a_window_of_the_whole_length_is_none(block: str, branches: tuple[str, ...]) -> None:
    ids = tokens(2, 23)
    assert_same(
        windowed(block, branches, 23)(ids).logits, windowed(block, branches, None)(ids).logits
    )


@each_main_kind
@settings(max_examples=12)
@given(sizes=st.lists(st.integers(1, 13), min_size=1, max_size=8))
def test_any_split_equals_the_whole(
    block: str, branches: tuple[str, ...], sizes: list[int]
) -> None:
    model = windowed(block, branches, dtype=torch.float64)
    ids = tokens(2, sum(sizes))
    assert_same(in_pieces(model, ids, sizes), model(ids).logits)


@each_main_kind
@pytest.mark.parametrize("sizes", [[29], [0, 8, 1, 1, 1, 0, 1, 1, 9, 7]])
def test_splits_with_padding_and_documents(
    block: str, branches: tuple[str, ...], sizes: list[int]
) -> None:
    model = windowed(block, branches)
    ids, mask = padded_batch((29, 20), 29)
    pieces = in_pieces(model, ids, sizes, attention_mask=mask)
    for row, real in enumerate(mask.bool()):
        assert_same(pieces[row, real], model(ids[row : row + 1, real]).logits[0])
    starts = starts_of([3, 9, 1, 16])
    pieces = in_pieces(model, ids[:1], sizes, document_starts=starts)
    done = 0
    for length in (3, 9, 1, 16):
        document = ids[:1, done : done + length]
        assert_same(pieces[:, done : done + length], model(document).logits)
        done += length


@each_main_kind
def test_the_cache_does_not_grow(block: str, branches: tuple[str, ...]) -> None:
    model = windowed(block, branches)
    output = model(tokens(2, 300), use_cache=True)
    layers = output.past_key_values.layers
    assert output.past_key_values.get_seq_length() == 300
    if "attention" in branches:
        assert all(layer.keys.shape[2] == WINDOW - 1 for layer in layers)


@each_main_kind
@pytest.mark.parametrize("settings_", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_generation_equals_an_uncached_loop(
    block: str, branches: tuple[str, ...], settings_: dict[str, int]
) -> None:
    model = windowed(block, branches)
    ids = tokens(2, 9)
    if "num_beams" in settings_:
        expected = generate(model, ids, 8, use_cache=False, **settings_)
    else:
        expected = greedy(model, ids, 8)
    assert torch.equal(generate(model, ids, 8, **settings_), expected)


def test_training_sees_the_window() -> None:
    config = small_config(attention_window=WINDOW, branches=["attention"], num_hidden_layers=1)
    model = scrambled(config)
    embedded = model.model.embed_tokens(tokens(1, 20)).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[0, 15].sum().backward()
    reached = embedded.grad[0].abs().amax(-1) > 0
    assert reached.tolist() == [15 - WINDOW < t <= 15 for t in range(20)]


@pytest.mark.parametrize("window", [0, 1, -3])
def test_windows_too_small_are_refused(window: int) -> None:
    with pytest.raises(PHAError, match="attention_window"):
        PHAConfig(attention_window=window)


def test_padding_between_tokens_would_fill_the_window() -> None:
    model = scrambled(small_config(attention_window=WINDOW))
    ids, mask = padded_batch((9, 4), 9, "right")
    alone = model(ids[1:, :4]).logits
    assert_same(model(ids, attention_mask=mask, use_cache=False).logits[1:, :4], alone)
    with pytest.raises(PHAError, match="takes padding on the left only"):
        model(ids, attention_mask=mask, use_cache=True)


def test_the_window_is_saved() -> None:
    config = small_config(attention_window=WINDOW)
    assert PHAConfig.from_dict(config.to_dict()).attention_window == WINDOW
    assert config.sliding_window == WINDOW
    assert "sliding_window" not in config.to_dict()
