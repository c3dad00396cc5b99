"""torch.compile takes the training step of every preset as one graph, once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.model.presets import PRESETS
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops.linear_cross_entropy import CHUNK_LOGITS

TINY = [name for name in PRESETS if "-tiny" in name]
V, B, T = 61, 2, 24


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs of other tests, and none for them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(preset: str, layers: int = 2) -> PHAForCausalLM:
    changes: dict[str, Any] = {"vocab_size": V, "num_hidden_layers": layers}
    if "hybrid" in preset:
        changes["attention_layers"] = [1]
    torch.manual_seed(0)
    return PHAForCausalLM(PHAConfig.from_preset(preset, **changes)).train()


def batch(seed: int, documents: bool) -> dict[str, Tensor | float | None]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (B, T + 1), generator=generator)
    # The first batch has no document start, the others some, and never as many.
    starts = torch.rand(B, T, generator=generator) < 0.06 * seed
    return {
        "input_ids": ids[:, :-1].contiguous(),
        "shift_labels": ids[:, 1:].contiguous(),
        "document_starts": starts if documents else None,
        "num_items_in_batch": float(B * T),
    }


def step(model: torch.nn.Module, seed: int, documents: bool) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch(seed, documents)).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def check(preset: str, documents: bool) -> None:
    model = make(preset)
    plain = [step(model, seed, documents) for seed in range(3)]
    model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    for seed, (loss, gradients) in enumerate(plain):
        # A graph break is an error always, for `fullgraph` is asked for; after the first step
        # compiling is one too.
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            got, own = step(model, seed, documents)
        torch.testing.assert_close(got, loss)
        for (name, _), x, y in zip(model.named_parameters(), own, gradients, strict=True):
            torch.testing.assert_close(x, y, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("preset", ["pha-tiny", "mehta-gss-hybrid-tiny"])
def test_a_step_with_documents_is_one_graph(preset: str) -> None:
    check(preset, documents=True)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("preset", TINY)
def test_a_step_of_every_preset_is_one_graph(preset: str, documents: bool) -> None:
    check(preset, documents)


def test_under_autocast_the_compiled_step_is_that_of_autocast() -> None:
    model = make("pha-tiny", layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        plain = [step(model, seed, False) for seed in range(2)]
        model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        for seed, (loss, gradients) in enumerate(plain):
            got, own = step(model, seed, False)
            torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-5)
            for x, y in zip(own, gradients, strict=True):
                torch.testing.assert_close(x, y, rtol=0.05, atol=1e-3)


def test_the_graph_does_not_grow_with_the_chunks_of_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    for rows in (B * T, 1):
        torch._dynamo.reset()
        monkeypatch.setitem(CHUNK_LOGITS, "cpu", rows * V)
        model = make("attention-only-tiny", layers=1)
        model.compile(backend=count, fullgraph=True, dynamic=False)
        step(model, 0, False)
    assert sizes[0] == sizes[1]
