"""What a GPU attends with, blocks of FlexAttention, gives the whole model the same logits.

FlexAttention runs on a CPU too, where it writes everything out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from pha.modeling import PHAForCausalLM
from pha.ops import OPS
from pha.ops.attention import flex as attention_flex
from tests.modeling.common import scrambled, small_config, starts_of, tokens

T = 150  # more than a block
WINDOWS: dict[str, dict[str, Any]] = {
    "all keys": {},
    "a window": {"attention_window": 40},
    "windows": {
        "attention_window": 60,
        "branch_options": {"attention": {"window": 20}},
        "branches": ["gss", "attention"],
    },
    "scaled by length": {
        "branch_options": {"attention": {"length_scaling": 40}},
        "branches": ["attention"],
    },
}
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")


def whole(model: PHAForCausalLM, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def documents(model: PHAForCausalLM, ids: Tensor) -> Tensor:
    starts = torch.cat([starts_of([70, T - 70]), starts_of([11, 120, T - 131])])
    return model(ids, use_cache=False, document_starts=starts).logits


def padding(model: PHAForCausalLM, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    return model(ids, use_cache=False, attention_mask=mask).logits * mask[..., None]


def chunks(model: PHAForCausalLM, ids: Tensor) -> Tensor:
    cache = model.new_cache()
    return torch.cat([model(x, past_key_values=cache).logits for x in ids.split(140, 1)], 1)


def long_chunk(model: PHAForCausalLM, ids: Tensor) -> Tensor:
    cache = model.new_cache()
    return torch.cat([model(x, past_key_values=cache).logits for x in ids.split([15, 135], 1)], 1)


def static(model: PHAForCausalLM, ids: Tensor) -> Tensor:
    cache = StaticCache(config=model.config, max_cache_len=200)
    return torch.cat([model(x, past_key_values=cache).logits for x in ids.split([140, 10], 1)], 1)


@pytest.mark.parametrize("read", [whole, documents, padding, chunks, long_chunk, static])
@pytest.mark.parametrize("windows", WINDOWS)
def test_blocks_give_the_logits_of_masks(
    windows: str, read: Callable[[PHAForCausalLM, Tensor], Tensor]
) -> None:
    model = scrambled(small_config(**WINDOWS[windows])).double().requires_grad_(False)
    ids = tokens(2, T)
    expected = read(model, ids)
    with (
        OPS["attention"].force("flex"),
        mock.patch.object(attention_flex, "flex", wraps=attention_flex.flex) as asked,
    ):
        actual = read(model, ids)
    assert asked.called or (read is whole and "window" not in windows) or read is chunks
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_weights_of_attention_are_to_be_had_as_well() -> None:
    model = scrambled(small_config(attention_window=40)).requires_grad_(False)
    ids, starts = tokens(1, T), starts_of([70, T - 70])
    with OPS["attention"].force("flex"):
        weights = model(ids, document_starts=starts, output_attentions=True).attentions
    assert all(float(w[0, :, 75, :70].abs().max()) == 0 for w in weights)
