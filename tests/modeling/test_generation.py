"""Generation through transformers, with the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pha.modeling import PHAForCausalLM
from tests.modeling.common import cached_model, each_kind, each_main_kind, padded_batch, tokens


def greedy(model: PHAForCausalLM, ids: Tensor, count: int) -> Tensor:
    """Without any cache: the whole sequence again for each new token."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def generate(model: PHAForCausalLM, ids: Tensor, count: int, **kwargs: Any) -> Any:
    """The tokens, unless `return_dict_in_generate` asks for more."""
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
