"""The model on a GPU computes what it computes on a CPU, as a whole and in pieces."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from pha.data import TokenStore
from pha.evals.generation import Sampling, generate
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.loading import LoadedModel
from pha.modeling import PHAConfig, PHAForCausalLM

pytestmark = pytest.mark.gpu

PRESETS = ["pha-tiny", "sequential-tiny", "gss-only-tiny", "mehta-gss-hybrid-tiny"]
V = 257


def make(preset: str, **changes: object) -> PHAForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": V, "num_hidden_layers": 2} | changes
    if "hybrid" in preset:
        fields["attention_layers"] = [1]
    return PHAForCausalLM(PHAConfig.from_preset(preset, **fields)).eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradients_are_those_of_a_cpu(
    preset: str, documents: bool, window: int | None, device: torch.device
) -> None:
    cpu = make(preset, attention_window=window).train()
    gpu = copy.deepcopy(cpu).to(device)
    ids = tokens(2, 37)
    starts = torch.rand(2, 37, generator=torch.Generator().manual_seed(2)) < 0.1
    losses = []
    for model, where in ((cpu, torch.device("cpu")), (gpu, device)):
        x = ids.to(where)
        marks = starts.to(where) if documents else None
        loss = model(x, labels=x, document_starts=marks).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, a), b in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        error = (a.grad - b.grad.cpu()).abs().max()
        assert error <= 1e-3 * a.grad.abs().max() + 1e-7, name


@pytest.mark.parametrize("preset", PRESETS)
def test_pieces_with_the_cache_are_the_whole(preset: str, device: torch.device) -> None:
    model = make(preset).to(device)
    ids = tokens(2, 40).to(device)
    with torch.inference_mode():
        whole = model(ids).logits
        cache, pieces = model.new_cache(), []
        for piece in ids.split([17, 1, 22], dim=1):
            pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_text_is_that_of_a_cpu(
    preset: str, store: TokenStore, tmp_path: Path, device: torch.device
) -> None:
    cpu = make(preset)
    texts = []
    for model in (cpu, copy.deepcopy(cpu).to(device)):
        loaded = LoadedModel(tmp_path, model, store.tokenizer(), None)
        sampling = Sampling(max_new_tokens=12, temperature=0)
        texts.append([c.text for c in generate(loaded, ["one two", "three four five"], sampling)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_perplexity_is_that_of_a_cpu(
    store: TokenStore, device: torch.device, precision: str
) -> None:
    cpu = make("pha-tiny")
    results = [
        evaluate(model, store, "validation", Protocol(64, 64, True), precision=p)
        for model, p in ((cpu, "fp32"), (copy.deepcopy(cpu).to(device), precision))
    ]
    limit = 1e-5 if precision == "fp32" else 5e-3
    assert results[1].loss == pytest.approx(results[0].loss, rel=limit)
    assert results[1].tokens == results[0].tokens
