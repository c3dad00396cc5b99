"""What transformers and its users expect of every model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, StaticCache

from pha.modeling import PHAForCausalLM
from pha.utils.errors import PHAError
from tests.modeling.common import (
    FLOAT32_PARAMETERS,
    assert_same,
    cached_model,
    each_main_kind,
    padded_batch,
    scrambled,
    small_config,
    starts_of,
    tokens,
)
from tests.modeling.test_generation import generate, greedy

# Loading


def test_import_pha_is_enough_for_the_auto_classes_and_imports_no_numba(tmp_path: Path) -> None:
    scrambled(small_config()).save_pretrained(tmp_path)
    program = (
        "import sys, pha, pha.decoder; from transformers import AutoConfig, AutoModelForCausalLM\n"
        "assert 'numba' not in sys.modules\n"  # it is slow to import, and not needed yet
        "print(AutoConfig.from_pretrained(sys.argv[1]).model_type)\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pha", "PHAForCausalLM"]


@each_main_kind
def test_decays_and_mixing_stay_in_float32(block: str, branches: tuple[str, ...]) -> None:
    config = small_config(block=block, branches=list(branches))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        is_kept = name.rpartition(".")[2] in FLOAT32_PARAMETERS
        assert parameter.dtype == (torch.float32 if is_kept else torch.bfloat16), name
    assert model(tokens(1, 9)).logits.dtype == torch.bfloat16


# bfloat16


@each_main_kind
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sizes", [[1] * 24, [7, 1, 16]])
def test_splits_in_bfloat16(
    block: str, branches: tuple[str, ...], window: int | None, sizes: list[int]
) -> None:
    config = small_config(block=block, branches=list(branches), attention_window=window)
    exact = scrambled(config).requires_grad_(False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.requires_grad_(False)
    model.load_state_dict(exact.state_dict())
    ids = tokens(2, sum(sizes))
    cache = model.new_cache()
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)]
    states = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "conv_states")]
    assert all(state is None or state.dtype == torch.float32 for state in states)
    # Logits are of order one and rounded to 2^-9 at some ten places on their way, at the same
    # places by any split but not always to the same side.
    expected = exact(ids).logits
    spread = float((model(ids).logits.float() - expected).abs().max())
    assert spread < 0.2
    split = torch.cat(pieces, 1).float()
    assert float((split - expected).abs().max()) < max(1.5 * spread, 0.05)
    assert float((split - model(ids).logits.float()).abs().max()) < max(1.5 * spread, 0.05)


# Static caches


@each_main_kind
@pytest.mark.parametrize("window", [None, 5])
@settings(max_examples=8)
@given(sizes=st.lists(st.integers(1, 13), min_size=1, max_size=6))
def test_any_split_with_a_static_cache_equals_the_whole(
    block: str, branches: tuple[str, ...], window: int | None, sizes: list[int]
) -> None:
    config = small_config(block=block, branches=list(branches), attention_window=window)
    model = scrambled(config).requires_grad_(False).double()
    ids = tokens(2, sum(sizes))
    cache = StaticCache(config=model.config, max_cache_len=80)
    logits, done = [], 0
    for size in sizes:
        logits.append(model(ids[:, done : done + size], past_key_values=cache).logits)
        done += size
    assert_same(torch.cat(logits, 1), model(ids).logits)


@each_main_kind
@pytest.mark.parametrize("window", [None, 5])
def test_generation_with_a_static_cache(
    block: str, branches: tuple[str, ...], window: int | None
) -> None:
    config = small_config(block=block, branches=list(branches), attention_window=window)
    model = scrambled(config).requires_grad_(False)
    ids, mask = padded_batch((8, 3), 8)
    result = generate(
        model,
        ids,
        10,
        attention_mask=mask,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile=True,
    )
    for row, real in enumerate(mask.bool()):
        alone = greedy(model, ids[row : row + 1, real], 10)
        assert torch.equal(result[row, 8:], alone[0, -10:])


@each_main_kind
def test_documents_with_a_static_cache(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids, starts = tokens(1, 20), starts_of([3, 9, 8])
    cache = StaticCache(config=model.config, max_cache_len=30)
    first = model(ids[:, :7], document_starts=starts[:, :7], past_key_values=cache).logits
    rest = model(ids[:, 7:], document_starts=starts, past_key_values=cache).logits
    assert_same(torch.cat([first, rest], 1), model(ids, document_starts=starts).logits)


# What would need the state back


@each_main_kind
def test_what_crops_or_repeats_the_cache_is_refused(block: str, branches: tuple[str, ...]) -> None:
    model = cached_model(block, branches)
    ids = tokens(1, 6)
    with pytest.raises(ValueError, match="not supported with stateful"):
        generate(model, ids, 4, assistant_model=model)
    with pytest.raises(PHAError, match="num_beams"):
        generate(model, ids, 4, prompt_lookup_num_tokens=2)
    with pytest.raises(PHAError, match=r"contrastive search .*do_sample=True"):
        generate(model, ids, 4, penalty_alpha=0.6, top_k=4)
    for kind in ("quantized", "paged"):
        with pytest.raises(PHAError, match=rf"{kind} cache .*attention_window"):
            generate(model, ids, 4, cache_implementation=kind)
    if "gss" not in branches:
        return
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-2)
    cache.layers[0].batch_repeat_interleave(2)
    with pytest.raises(PHAError, match="states of 1 sequences"):
        model(tokens(2, 1), past_key_values=cache)


# Outputs


@each_main_kind
def test_hidden_states_are_the_stream_and_what_the_head_sees(
    block: str, branches: tuple[str, ...]
) -> None:
    model = cached_model(block, branches)
    output = model(tokens(2, 9), output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert all(x.shape == (2, 9, 32) for x in output.hidden_states)
    assert_same(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(tokens(2, 9)).hidden_states is None


@each_main_kind
def test_attention_implementations_agree(block: str, branches: tuple[str, ...]) -> None:
    model = scrambled(small_config(block=block, branches=list(branches)))
    ids = tokens(2, 17)
    fused = model(ids).logits
    model.set_attn_implementation("eager")
    assert_same(model(ids).logits, fused)


@each_main_kind
def test_attention_weights_of_each_layer_that_has_them(
    block: str, branches: tuple[str, ...]
) -> None:
    model = cached_model(block, branches)
    ids, mask = padded_batch((9, 4), 9)
    if "attention" not in branches and block == "parallel":
        with pytest.raises(PHAError, match="no layer of this model has attention"):
            model(ids, output_attentions=True)
        return
    whole = model(ids, attention_mask=mask, output_attentions=True).attentions
    names = [model.config.layer_branches(layer) for layer in range(2)]
    assert len(whole) == sum("attention" in layer for layer in names)
    assert model(ids).attentions is None
    model.config._output_attentions = (
        True  # as loaded with attention `eager`, which alone allows it
    )
    try:
        assert len(model(ids).attentions) == len(whole)
    finally:
        model.config._output_attentions = False
    cache = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
    last = model(
        ids[:, 8:], attention_mask=mask, past_key_values=cache, output_attentions=True
    ).attentions
    for weights, row in zip(whole, last, strict=True):
        assert weights.shape == (2, 6, 9, 9)
        assert_same(weights[mask.bool()[:, None].expand(2, 6, 9)].sum(-1), torch.ones(78))
        assert not weights[1, :, 5:, :5].any()
        assert not weights.triu(1).any()
        assert_same(row, weights[:, :, 8:])


@pytest.mark.parametrize("how", ["trace", "export"])
@each_main_kind
def test_the_forward_pass_in_a_graph(how: str, block: str, branches: tuple[str, ...]) -> None:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = cached_model(block, branches)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    program: Any
    if how == "trace":
        program, T = torch.jit.trace(Logits(), tokens(2, 12), check_trace=False), 12
    else:
        shapes = ({1: torch.export.Dim("length", min=2, max=512)},)
        if "mehta_gss" in branches:
            with pytest.raises(PHAError, match="is of one length"):
                torch.export.export(Logits(), (tokens(2, 12),), dynamic_shapes=shapes)
            return
        exported = torch.export.export(Logits(), (tokens(2, 12),), dynamic_shapes=shapes)
        program, T = exported.module(), 31
    ids = tokens(2, T, seed=1)
    assert_same(program(ids), cached_model(block, branches)(ids).logits)


# Training


@each_main_kind
@pytest.mark.parametrize("by_transformers", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    block: str, branches: tuple[str, ...], by_transformers: bool
) -> None:
    config = small_config(block=block, branches=list(branches), dropout=0.1)
    model = scrambled(config).train()
    ids = tokens(2, 33)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(5)  # the same dropout
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = model.model.layers[0].register_forward_pre_hook(count)
    if by_transformers:
        model.gradient_checkpointing_enable()
    else:
        model.model.gradient_checkpointing = True
    for actual, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    assert calls == 2  # forward, and again in backward
    handle.remove()


def test_checkpointing_is_off_in_evaluation() -> None:
    model = PHAForCausalLM(small_config()).eval()
    model.gradient_checkpointing_enable()
    output = model(tokens(1, 9), use_cache=True)
    assert output.past_key_values.get_seq_length() == 9


# Compilation


def test_decoding_with_a_static_cache_compiles_without_a_break() -> None:
    model = cached_model("parallel", ("gss", "attention", "aux_ffn"))
    ids = tokens(2, 20)
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(ids[:, :12], past_key_values=cache)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # Without a compiler of C++: the graph is captured whole and then run as it is.
    logits = [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in range(12, 20)]
    assert_same(torch.cat(logits, 1), model(ids).logits[:, 12:])
