"""The models of the benchmark: their sizes, and what they are said to need."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pha.bench import peers
from pha.bench.peers import (
    VOCABULARY,
    AttentionShape,
    attention_shape,
    build,
    kernels_of,
    model_config,
)
from pha.bench.work import Job, Prefill, Train
from pha.model.parameters import count_parameters
from pha.model.presets import preset_config
from pha.peers import PEERS, count_multiplied, peer_names
from pha.utils.errors import PHAError
from scripts.kernel_times import read_job

META = torch.device("meta")
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", peer_names())
def test_peers_have_the_size_and_vocabulary_they_are_listed_with(name: str) -> None:
    config = model_config(f"hf:{name}", 16384)
    total, _ = count_multiplied(build(model_config(f"hf:{name}", 1024), META))
    target = PEERS[name].parameters
    assert target is not None
    assert abs(total / target - 1) < 0.05
    assert config.vocab_size == VOCABULARY
    assert config.max_position_embeddings >= 16384 if name in ("gpt2", "llama") else True


def test_only_what_multiplies_counts_as_multiplied() -> None:
    gpt2 = build(model_config("hf:gpt2-tiny", 16), META)
    total, multiplied = count_multiplied(gpt2)
    assert total - multiplied == 8192 * 64  # learned positions
    ours = count_multiplied(build(model_config("pha-tiny", 16), META))
    assert ours[0] == ours[1] == sum(count_parameters(preset_config("pha-tiny")).values())


def test_unknown_models_are_refused_with_the_nearest_names() -> None:
    for wrong, near in (("hf:gtp2", "hf:gpt2"), ("pha-125", "pha-125m"), ("gpt2", "hf:gpt2")):
        with pytest.raises(PHAError, match=near):
            model_config(wrong, 64)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (1, 12), (5, 12)])
def test_pairs_are_those_of_the_mask(window: int | None, queries: int, keys: int) -> None:
    reach = keys if window is None else window
    seen = sum(
        0 <= query - key < reach for query in range(keys - queries, keys) for key in range(keys)
    )
    shape = AttentionShape(3, 4, 2, 8, window)
    assert shape.pairs(queries, keys) == seen
    assert shape.flops(queries, keys) == 4 * 3 * 4 * 8 * seen
    assert shape.cached_numbers(keys) == 2 * 3 * 2 * 8 * min(keys, reach)


def test_attention_layers_are_those_with_keys() -> None:
    def layers(name: str) -> int:
        return attention_shape(model_config(name, 64)).layers

    assert layers("pha-125m") == 12
    assert layers("gss-only-180m") == 0
    assert layers("mehta-gss-hybrid-125m") == 2
    assert layers("hf:mamba2") == 0
    assert layers("hf:gpt2") == layers("hf:falcon-h1") == 12
    assert layers("hf:recurrent-gemma") == 4
    assert layers("hf:jamba") == layers("hf:bamba") == 2
    assert layers("hf:mamba") == 0


def matmul_flops(work: Callable[[], Any]) -> float:
    """FLOPs that PyTorch counts for products of matrices; its fused attention is none."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
    return sum(counts.get(op, 0) for op in products)


@pytest.mark.parametrize("model", ["hf:llama-tiny", "hf:gpt2-tiny", "attention-only-tiny"])
def test_needed_flops_are_those_that_pytorch_counts(model: str) -> None:
    # PyTorch does not count products into a given tensor, as our loss makes them.
    ours = not model.startswith("hf:")
    prefill = Prefill(Job("prefill", model, "fp32", 2, 16), CPU)
    # Norms and biases are parameters too, but less than a hundredth.
    assert prefill.need.matmul_flops == pytest.approx(matmul_flops(prefill.unit), rel=0.01)
    if ours:
        return
    train = Train(Job("train", model, "fp32", 2, 16), CPU)
    assert train.need.matmul_flops == pytest.approx(matmul_flops(train.unit), rel=0.01)


def test_presets_can_be_changed_in_their_names() -> None:
    config = model_config("pha-tiny+attention_window=96+state_size=32", 64)
    assert (config.attention_window, config.state_size) == (96, 32)
    job = Job("train", "pha-tiny+state_size=32+gradient_checkpointing", "fp32", 1, 8)
    work = Train(job, CPU)
    assert work.model.model.gradient_checkpointing
    assert work.config.state_size == 32
    assert "chunked loss" in work.setting
    peer = Train(Job("train", "hf:gpt2-tiny+gradient_checkpointing", "fp32", 1, 8), CPU)
    assert peer.model.is_gradient_checkpointing
    assert "loss over all logits" in peer.setting


def test_jobs_of_the_profiler_may_be_of_peers() -> None:
    job = read_job("train:hf:gpt2:32x1024:compiled")
    assert (job.mode, job.model, job.batch, job.length) == ("train", "hf:gpt2", 32, 1024)
    assert job.compiled
    job = read_job("prefill:pha-180m+attention_window=64:1x2048")
    assert (job.model, job.length, job.compiled) == ("pha-180m+attention_window=64", 2048, False)


def test_a_peer_can_be_trained_with_our_loss() -> None:
    losses = []
    for ending in ("", "+chunked_loss"):
        work = Train(Job("train", f"hf:gpt2-tiny{ending}", "fp32", 2, 8), CPU)
        losses.append(float(work.run(input_ids=work.ids, **work.labels).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert "loss over all logits" not in work.setting


@pytest.mark.parametrize(
    ("installed", "device", "said"),
    [
        ((), "cuda", ["scan in plain PyTorch", "convolution in plain PyTorch"]),
        (("mamba_ssm",), "cuda", ["scan by mamba_ssm", "convolution in plain PyTorch"]),
        (("causal_conv1d",), "cuda", ["scan in plain PyTorch", "convolution by causal_conv1d"]),
        (("mamba_ssm",), "cpu", ["scan in plain PyTorch", "convolution in plain PyTorch"]),
    ],
)
def test_rows_say_which_kernels_transformers_takes(
    installed: tuple[str, ...], device: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_can_import", lambda package: package in installed)
    assert kernels_of("mamba2", device, training=False) == said
    assert kernels_of("llama", device, training=False) == []


def test_a_kernel_that_lacks_another_is_refused_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "_can_import", lambda package: package == "mamba_ssm")
    with pytest.raises(PHAError, match="needs causal_conv1d"):
        kernels_of("falcon_h1", "cuda", training=True)


def test_a_package_that_fails_to_load_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mamba_ssm.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    peers._can_import.cache_clear()
    assert not peers._can_import("mamba_ssm")
    assert peers._can_import("json")
    peers._can_import.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pha-tiny+x", "is not FIELD=VALUE"),
        ("pha-tiny+state_sise=3", "did you mean state_size"),
        ("pha-tiny+state_size=[", "is not FIELD=VALUE"),
        ("hf:gpt2+n_layer=3", "only presets take"),
        ("pha-tiny+chunked_loss", "is not FIELD=VALUE"),
        ("pha-tiny+gradient_checkpointing+state_size=32", "comes last"),
    ],
)
def test_changes_that_say_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(PHAError, match=message):
        model_config(name, 64)


def test_peers_of_another_package_are_there_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla.models", None)
    with pytest.raises(PHAError, match="hf:fla-gla needs flash-linear-attention"):
        model_config("hf:fla-gla", 16)
    monkeypatch.setattr(peers, "is_installed", lambda: True)
    assert peers.fla_peers() == ["hf:fla-gla", "hf:fla-gated-deltanet"]
    assert kernels_of("gla", "cuda", True) == ["kernels of flash-linear-attention"]
