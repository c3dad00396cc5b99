"""Attention by distance, without positions, and in a window of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.model import Backbone, GroupedQueryAttention
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops.attention.distances import alibi_slopes, key_with_positions, query_with_slopes
from pha.utils.errors import PHAError
from tests.model.common import plain_context, scramble, small
from tests.modeling.common import (
    padded_batch,
    run_in_pieces,
    scrambled,
    small_config,
    starts_of,
    tokens,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "alibi": {"positions": "alibi"},
    "none": {"positions": "none"},
    "window": {"window": 7},
    "alibi in a window": {"positions": "alibi", "window": 7},
    "base": {"theta": 30},
    "scaled by length": {"length_scaling": 4},
    "scaled by length in a window": {"length_scaling": 4, "window": 7},
}
each_option = pytest.mark.parametrize("which", OPTIONS)


def config_of(options: dict[str, Any], **fields: Any) -> PHAConfig:
    return small_config(
        branches=["gss", "attention"],
        branch_options={"attention": options},
        attention_logits="scaled-cosine" if "length_scaling" in options else "dot-product",
        **fields,
    )


def model_of(options: dict[str, Any], **fields: Any) -> PHAForCausalLM:
    return scrambled(config_of(options, **fields)).double().requires_grad_(False)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # Rotary angles alone are float32, the same for all.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def literal(layer: GroupedQueryAttention, z: Tensor, slopes: list[float]) -> Tensor:
    """softmax of products less slope times distance, one query head and token at a time."""
    H, G, K = layer.heads, layer.kv_heads, layer.head_dim
    q, k, v = (W(z).unflatten(-1, (-1, K)) for W in (layer.W_q, layer.W_k, layer.W_v))
    y = torch.zeros_like(q)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        g = h // (H // G)
        logits = k[b, : t + 1, g] @ q[b, t, h] / math.sqrt(K)
        distances = t - torch.arange(t + 1)
        weights = (logits - slopes[h] * distances).softmax(0)
        y[b, t, h] = weights @ v[b, : t + 1, g]
    return layer.W_o(y.flatten(2))


@pytest.mark.parametrize("positions", ["alibi", "none"])
@pytest.mark.parametrize("heads", [4, 6])
def test_equals_the_formula(positions: str, heads: int) -> None:
    config = small(attention_logits="dot-product", num_attention_heads=heads)
    layer = scramble(GroupedQueryAttention(config, 0, positions=positions)).double()
    z = torch.randn(2, 9, 24, dtype=torch.float64)
    slopes = alibi_slopes(heads) if positions == "alibi" else [0.0] * heads
    # Logits are float32.
    torch.testing.assert_close(
        layer(z, plain_context(config, 9)), literal(layer, z, slopes), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("window", [None, 5])
def test_cosines_are_scaled_by_the_keys_that_a_query_sees(window: int | None) -> None:
    config = small(num_attention_heads=4)
    layer = GroupedQueryAttention(config, 0, "none", window, length_scaling=3)
    layer = scramble(layer).double().requires_grad_(False)
    z, H, K = torch.randn(1, 9, 24, dtype=torch.float64), 4, config.head_dim
    q, k, v = (W(z)[0].unflatten(-1, (-1, K)) for W in (layer.W_q, layer.W_k, layer.W_v))
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    y = torch.zeros_like(q)
    for t, h in torch.cartesian_prod(torch.arange(9), torch.arange(H)).tolist():
        seen = slice(0 if window is None else max(0, t + 1 - window), t + 1)
        n = t + 1 - seen.start
        tau = layer.logit_scale[h].exp() + max(0.0, math.log(n / 3))
        weights = (tau * (k[seen, h // 2] @ q[t, h])).softmax(0)
        y[t, h] = weights @ v[seen, h // 2]
    # Temperatures are float32.
    expected = layer.W_o(y.flatten(1))
    torch.testing.assert_close(layer(z, plain_context(config, 9))[0], expected, rtol=0, atol=2e-5)


def test_a_base_of_its_own_is_that_of_the_model() -> None:
    ids = tokens(2, 40)
    own, model = model_of({"theta": 30}), model_of({}, rope_theta=30.0)
    assert_close(own(ids).logits, model(ids).logits)
    assert (own(ids).logits - model_of({})(ids).logits).abs().max() > 0.01


def test_a_scaling_beyond_the_keys_does_nothing() -> None:
    ids, plain = tokens(2, 20), model_of({"length_scaling": 99})
    assert_close(plain(ids).logits, model_of({"length_scaling": 20})(ids).logits)
    assert (plain(ids).logits - model_of({"length_scaling": 4})(ids).logits).abs().max() > 0.001


@each_option
def test_a_later_token_changes_nothing_earlier(which: str) -> None:
    model, ids = model_of(OPTIONS[which]), tokens(2, 30)
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 31
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20], after[:, 20])


def test_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8) == [2**-h for h in range(1, 9)]
    assert alibi_slopes(16)[::2] == [2 ** (-h / 2) for h in range(1, 17, 2)]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert alibi_slopes(1) == [2**-8]


def test_without_slopes_it_is_attention_without_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pha.model.attention.alibi_slopes", lambda heads: [0.0] * heads)
    ids = tokens(2, 30)
    assert_close(model_of(OPTIONS["alibi"])(ids).logits, model_of(OPTIONS["none"])(ids).logits)


def test_far_keys_in_half_precision() -> None:
    config = config_of(OPTIONS["alibi"])
    layer = scramble(GroupedQueryAttention(config, 0, positions="alibi"))
    z, context = 0.3 * torch.randn(1, 3000, 32), plain_context(config, 3000)
    exact = layer.double()(z.bfloat16().double(), context)
    rough = layer.bfloat16()(z.bfloat16(), context)
    assert (rough - exact).abs().mean() <= 2**-7 * exact.abs().mean()


@each_option
def test_splits_documents_and_padding(which: str) -> None:
    model, ids = model_of(OPTIONS[which]), tokens(2, 40)
    whole = model(ids).logits
    assert_close(run_in_pieces(model, ids, [1, 2, 20]), whole)
    lengths = [15, 1, 24]
    packed = model(ids[:1], document_starts=starts_of(lengths)).logits
    apart = [model(piece).logits for piece in ids[:1].split(lengths, 1)]
    assert_close(packed, torch.cat(apart, 1))
    ids, mask = padded_batch((40, 5, 12), 40, "left" if "window" in which else "holes")
    rows = run_in_pieces(model, ids, [7, 30], mask)
    for row, real in enumerate(mask.bool()):
        assert_close(rows[row, real], model(ids[row : row + 1, real]).logits[0])


@pytest.mark.parametrize("others", [{}, {"positions": "alibi"}])
def test_a_window_of_its_own_is_that_of_the_model(others: dict[str, Any]) -> None:
    own, ids = model_of({"window": 7} | others), tokens(2, 40)
    whole = model_of(others, attention_window=7)(ids).logits
    assert_close(own(ids).logits, whole)
    assert (whole - model_of(others)(ids).logits).abs().max() > 0.01
    both = model_of({"window": 9} | others, attention_window=7)
    assert_close(both(ids).logits, whole)
    with pytest.raises(PHAError, match="takes padding on the left only"):
        own(ids, attention_mask=padded_batch((40, 5), 40, "holes")[1], use_cache=True)


@pytest.mark.parametrize(
    ("windows", "kept"), [([4, 9], 8), ([4, None], 40), ([9, None], 40), ([None, None], 40)]
)
def test_keys_behind_all_windows_are_dropped(windows: list[int | None], kept: int) -> None:
    pattern = [["gss", {"attention": {"window": window}}] for window in windows]
    model = scrambled(small_config(layer_pattern=pattern)).double().requires_grad_(False)
    ids, cache = tokens(2, 40), model.new_cache()
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([1, 20, 2, 17], 1)]
    assert_close(torch.cat(pieces, 1), model(ids, use_cache=False).logits)
    assert [layer.keys.shape[2] for layer in cache.layers] == [kept, kept]
    model.config.attention_window = 3
    assert [layer.keys.shape[2] for layer in model(ids).past_key_values.layers] == [2, 2]


@pytest.mark.parametrize("which", ["rotary", "alibi"])
@pytest.mark.parametrize("first", [10**6, 2**24 - 20, 2**31])
def test_only_distances_matter_however_far(which: str, first: int) -> None:
    model, ids = model_of({"positions": which}), tokens(2, 40)
    far = model(ids, position_ids=torch.arange(first, first + 40)[None]).logits
    torch.testing.assert_close(far, model(ids).logits, rtol=0, atol=2e-5)


def test_distances_are_exact_in_float16() -> None:
    slopes = alibi_slopes(16)
    at = torch.tensor([[0, 255, 256, 65_535, 65_536, 10**6, 2**31]])
    q = query_with_slopes(torch.zeros(1, 16, 1, 2, dtype=torch.float16), slopes)
    k = key_with_positions(torch.zeros(1, 1, 7, 2, dtype=torch.float16), at)
    rounded = torch.tensor(slopes).half().double()[:, None, None]
    torch.testing.assert_close(q[0].double() @ k[0].double().mT, rounded * at, rtol=0, atol=0)


@each_option
@pytest.mark.usefixtures("seed")
def test_tokens_are_written_by_the_layers(which: str, steps: list[int]) -> None:
    model, ids = scrambled(config_of(OPTIONS[which])).eval(), tokens(2, 9)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert not steps


@pytest.mark.parametrize(
    ("options", "logits", "message"),
    [
        ({"positions": "learned"}, "dot-product", "choose rotary or alibi or none"),
        ({"positions": "alibi"}, "scaled-cosine", "alibi need attention_logits dot-product"),
        ({"window": 1}, "dot-product", "window of branch attention is 1; at least 2"),
        ({"window": 2.5}, "dot-product", "window of branch attention is 2.5"),
        ({"theta": 0}, "dot-product", "theta of branch attention is 0; a number above 0"),
        ({"length_scaling": 1}, "scaled-cosine", "length_scaling of branch attention is 1"),
        ({"length_scaling": 64}, "dot-product", "length_scaling needs attention_logits scaled"),
    ],
)
def test_bad_options_are_refused(options: Any, logits: Any, message: str) -> None:
    config = small(
        branches=["attention"], branch_options={"attention": options}, attention_logits=logits
    )
    with pytest.raises(PHAError, match=message):
        Backbone(config)


def test_a_window_of_words_beside_that_of_the_model_is_refused() -> None:
    options = {"attention": {"window": "9"}}
    with pytest.raises(PHAError, match="window of branch attention is '9'; at least 2"):
        PHAForCausalLM(small_config(attention_window=7, branch_options=options))
