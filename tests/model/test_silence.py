"""Branches silenced, shortened and cut off, against forward passes written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pha.model import ParallelBlock, SequentialBlock
from pha.model.silence import averages, branches_of, cut, horizon, silenced
from pha.modeling import PHAForCausalLM
from pha.ops.attention import attention_mask
from pha.utils.errors import PHAError
from tests.model.common import plain_context
from tests.modeling.common import scrambled, small_config, tokens

BRANCHES = ["gss", "attention", "aux_ffn"]
MIXERS: dict[str, dict[str, Any]] = {
    "mamba2": {"state_size": 8, "head_size": 8},
    "gated_deltanet": {"heads": 2, "key_size": 8, "value_size": 12},
    "extended_gss": {"output_gate": True, "convolution": True, "input_dt": True},
    "compressive_attention": {"window": 3, "slots": 2, "rate": 2},
}
HORIZONS = ["gss", "attention", *MIXERS]


def model_of(branches: list[str] = BRANCHES, **fields: Any) -> PHAForCausalLM:
    options = {name: MIXERS[name] for name in branches if name in MIXERS}
    config = small_config(branches=branches, branch_options=options, **fields)
    return scrambled(config).double().requires_grad_(False).eval()


def by_hand(model: PHAForCausalLM, ids: Tensor, instead: Any) -> Tensor:
    """Logits where `instead(layer, name, part, weights)` is what a branch adds to a sublayer."""
    config, body = model.config, model.model
    x = body.embed_tokens(ids) * config.hidden_size**0.5
    context = plain_context(config, ids.shape[1])
    for i, block in enumerate(body.layers):
        if isinstance(block, ParallelBlock):
            z, w = block.mix_residual.enter(x), block.mixing.weights()
            shares = dict(zip(block.mixing.names, w, strict=True))
            parts = [
                instead(i, name, shares[name] * block.mixing.norms[name](b(z, context)), shares)
                for name, b in block.branches.items()
            ]
            x = block.mix_residual(x, sum(parts))
        else:
            assert isinstance(block, SequentialBlock)
            for name, b in block.branches.items():
                residual: Any = block.residuals[name]
                x = residual(x, instead(i, name, b(residual.enter(x), context), {}))
        x = block.feed_forward(x)
    return model.lm_head(body.norm(x))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("block", ["parallel", "sequential"])
@pytest.mark.parametrize("places", [[(1, "gss")], [(0, "attention"), (1, "attention")]])
@pytest.mark.parametrize("mode", ["mean", "resample", "zero", "renormalised"])
def test_silencing_equals_a_forward_by_hand(block: str, places: Any, mode: str) -> None:
    model, ids = model_of(block=block), tokens(3, 12)
    if (block, mode) == ("sequential", "renormalised"):
        with silenced(model.model, places, "zero"):
            zero = model(ids).logits
        with pytest.raises(PHAError, match="mixes nothing else"):
            silenced(model.model, places, mode).__enter__()
        assert not torch.equal(model(ids).logits, zero)
        return
    with averages(model.model, places) as means:
        model(tokens(2, 30, seed=1))

    def instead(layer: int, name: str, part: Tensor, shares: dict[str, Tensor]) -> Tensor:
        kept: Any = 1.0
        if mode == "renormalised":
            gone = [n for n in shares if (layer, n) in places]
            kept = 1 - sum(shares[n] for n in gone)
        if (layer, name) not in places:
            return part / kept
        if mode == "mean":
            return means[layer, name].expand_as(part)
        return part.roll(1, 0) if mode == "resample" else torch.zeros_like(part)

    before = model(ids).logits
    with silenced(model.model, places, mode, means):
        actual = model(ids).logits
    close(actual, by_hand(model, ids, instead), 1e-6 if mode == "renormalised" else 1e-10)
    assert (actual - before).abs().max() > 1e-3
    assert torch.equal(model(ids).logits, before)


def test_means_are_of_what_a_branch_adds() -> None:
    model, ids = model_of(), tokens(2, 9)
    added: list[Tensor] = []

    def note(layer: int, name: str, part: Tensor, _: Any) -> Tensor:
        if (layer, name) == (1, "attention"):
            added.append(part)
        return part

    by_hand(model, ids, note)
    with averages(model.model, [(1, "attention")]) as means:
        model(ids[:1]), model(ids[1:])
    close(means[1, "attention"], added[0].mean((0, 1)))


@pytest.mark.parametrize("branch", HORIZONS)
@pytest.mark.parametrize("documents", [False, True])
def test_a_horizon_truncates_what_each_token_reads(branch: str, documents: bool) -> None:
    model = model_of([branch, "aux_ffn"], num_hidden_layers=1)
    layer, T = branches_of(model.model)[0, branch], 11
    z = torch.randn(2, T, 32, dtype=torch.float64)
    starts = torch.zeros(2, T, dtype=torch.bool)
    starts[:, [0, 4]] = documents
    positions = torch.arange(T)[None].expand(2, T)
    if documents:
        positions = torch.where(positions >= 4, positions - 4, positions)
    mask = attention_mask(torch.arange(T), torch.arange(T), starts) if documents else None
    given = {"document_starts": starts if documents else None, "attention_mask": mask}
    context = plain_context(model.config, T, positions, **given)
    plain = layer(z, context)
    for window in (1, 2, 5, T, T + 3):
        expected = torch.zeros_like(z)
        for t in range(T):
            first = max(0, t + 1 - window, 4 if documents and t >= 4 else 0)
            inner = plain_context(model.config, t + 1 - first, positions[:1, first : t + 1])
            expected[:, t] = layer(z[:, first : t + 1], inner)[:, -1]
        with horizon(model.model, branch, window):
            shortened = layer(z, context)
        # Angles and decays are float32, and so is what is taken back of the state.
        close(shortened, expected, 1e-6)
        if window >= T:
            assert torch.equal(shortened, plain)
    assert torch.equal(layer(z, context), plain)


@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_a_horizon_of_one_is_a_layer_on_each_token(block: str) -> None:
    model, ids = model_of(block=block), tokens(2, 9)
    with horizon(model.model, "gss", 1), horizon(model.model, "attention", 1):
        whole = model(ids, use_cache=False).logits
        for t in range(9):
            alone = model(ids[:, t : t + 1], use_cache=False).logits
            close(alone[:, 0], whole[:, t], 1e-6)


@pytest.mark.parametrize("branch", HORIZONS)
@pytest.mark.parametrize("place", [6, 7])
def test_nothing_comes_through_a_cut(branch: str, place: int) -> None:
    model = model_of([branch, "aux_ffn"], num_hidden_layers=1)
    ids, other = tokens(2, 15), tokens(2, 15)
    other[:, :place] = tokens(2, place, seed=1)
    with cut(model.model, [branch], place):
        close(model(other).logits[:, place:], model(ids).logits[:, place:])


@pytest.mark.parametrize("branches", [BRANCHES, ["mamba2", "attention"]])
@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_a_past_that_is_cut_off_is_one_dropped_from_the_cache(
    branches: list[str], block: str
) -> None:
    model, ids = model_of(branches, block=block), tokens(2, 20)
    with cut(model.model, branches, 12):
        nothing_left = model(ids).logits
    close(nothing_left[:, 12:], model(ids[:, 12:]).logits, 1e-6)
    close(nothing_left[:, :12], model(ids[:, :12]).logits)
    with cut(model.model, branches[:1], 12):
        no_state = model(ids).logits
    cache = model(ids[:, :12], use_cache=True).past_key_values
    for layer in cache.layers:
        for state in layer.recurrent_states.values():
            if state is not None:
                state.zero_()
    close(no_state[:, 12:], model(ids[:, 12:], past_key_values=cache).logits)
    assert (no_state - nothing_left)[:, 12:].abs().max() > 1e-3
    with cut(model.model, ["attention"], 12):
        no_keys = model(ids).logits
    cache = model(ids[:, :12], use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    cache._pha_left = None  # which would refuse it
    places = torch.arange(12, 20)[None]
    after = model(ids[:, 12:], past_key_values=cache, position_ids=places).logits
    close(no_keys[:, 12:], after, 1e-6)


def test_the_compiled_decoder_sees_it(steps: list[int]) -> None:
    model = scrambled(small_config()).requires_grad_(False).eval()
    ids = tokens(2, 5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, **options)
    assert steps
    steps.clear()
    for context in (
        silenced(model.model, [(0, "attention"), (1, "attention")], "zero"),
        horizon(model.model, "attention", 2),
    ):
        with context:
            written = model.generate(ids, **options)
            assert torch.equal(written, model.generate(ids, use_cache=False, **options))
    assert not steps


def test_what_cannot_be_asked_is_refused() -> None:
    model, ids = model_of(), tokens(1, 5)
    every = list(branches_of(model.model))
    assert every == [(layer, name) for layer in (0, 1) for name in BRANCHES]
    for context, words in (
        (silenced(model.model, every, "loud"), "is silenced by mean, resample"),
        (silenced(model.model, every, "renormalised"), "mixes nothing else"),
        (silenced(model.model, every, "resample"), "no other sequence"),
        (horizon(model.model, "gss", 0), "a horizon of 0"),
        (horizon(model.model, "aux_ffn", 3), "a horizon of 3 for branch aux_ffn"),
        (horizon(model.model, "gss", 3), "without a cache"),
    ):
        with pytest.raises(PHAError, match=words), context:
            model(ids, use_cache=True)
    close(model(ids).logits, by_hand(model, ids, lambda *given: given[2]))
