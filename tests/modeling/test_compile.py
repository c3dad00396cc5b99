"""torch.compile takes each block of every preset as one graph, which serves all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import StaticCache

from pha.model.branches import BRANCHES
from pha.model.ffn import AuxiliaryFFN
from pha.model.presets import PRESETS
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops import OPS
from pha.ops.linear_cross_entropy import CHUNK_LOGITS
from pha.utils.compiling import compile_blocks, compile_errors
from pha.utils.errors import PHAError

TINY = [name for name in PRESETS if name.endswith("-tiny") and "pha-125m-" not in name]
V, B, T, LAYERS = 61, 2, 24, 4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs of other tests, and none for them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(preset: str, layers: int = LAYERS, **changes: Any) -> PHAForCausalLM:
    changes |= {"vocab_size": V, "num_hidden_layers": layers}
    if PRESETS[preset].get("attention_layers"):
        changes["attention_layers"] = [1, 2]
    torch.manual_seed(0)
    return PHAForCausalLM(PHAConfig.from_preset(preset, **changes))


def batch(seed: int, documents: bool, length: int = T) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (B, length + 1), generator=generator)
    # The first batch has no document start, the others some, and never as many.
    starts = torch.rand(B, length, generator=generator) < 0.06 * seed
    return {
        "input_ids": ids[:, :-1].contiguous(),
        "shift_labels": ids[:, 1:].contiguous(),
        "document_starts": starts if documents else None,
        "num_items_in_batch": float(B * length),
    }


def step(model: nn.Module, seed: int, documents: bool) -> tuple[Tensor, list[Tensor | None]]:
    model.train().zero_grad(set_to_none=True)
    loss = model(**batch(seed, documents)).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@torch.inference_mode()
def states(model: PHAForCausalLM, seed: int) -> Tensor:
    return model.eval().states(batch(seed, False)["input_ids"])


def read(model: PHAForCausalLM, seed: int, cache: Any = None) -> Tensor:
    ids = batch(seed, False)["input_ids"]
    return model.eval()(ids, past_key_values=cache or model.new_cache(), logits_to_keep=1).logits


def kinds(model: PHAForCausalLM, with_cache: bool = False) -> int:
    """How many blocks there are that differ in more than their weights, or in what they keep."""
    config = model.config
    kept = config.layer_types if with_cache else [""] * config.num_hidden_layers
    return len(
        {
            (str(block), str(config.layer_branches(i)), each)
            for i, (block, each) in enumerate(zip(model.model.layers, kept, strict=True))
        }
    )


class Graphs:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        compiled: Callable[..., Any] = aot_eager(graph, inputs)
        return compiled


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def check_training(preset: str, documents: bool) -> None:
    model, graphs = make(preset), Graphs()
    plain = [step(model, seed, documents) for seed in range(3)]
    expected = states(model, 0)
    compile_blocks(model, backend=graphs)
    for seed, (loss, gradients) in enumerate(plain):
        got, own = step(model, seed, documents)
        same(got, loss)
        for (name, _), x, y in zip(model.named_parameters(), own, gradients, strict=True):
            torch.testing.assert_close(
                x, y, rtol=1e-4, atol=2e-5, msg=partial("{}: {}".format, name)
            )
    assert graphs.count == kinds(model)
    same(states(model, 0), expected)
    states(model, 1)
    assert graphs.count == 2 * kinds(model)


def check_reading(preset: str, mode: Callable[[], Any]) -> None:
    model, graphs = make(preset), Graphs()
    model.requires_grad_(False)
    caches = [model.new_cache]
    if model.config.keeps_keys:
        caches.append(partial(StaticCache, config=model.config, max_cache_len=40))
    for cache in caches:
        with mode():
            expected = read(model, 1, cache())
            compile_blocks(model, backend=graphs)
            before = graphs.count
            for seed in (1, 0, 1):
                logits = read(model, seed, cache())
            same(logits, expected)
            assert graphs.count <= before + kinds(model, with_cache=True)
        for block in model.model.layers:
            block._compiled_call_impl = None


@pytest.mark.parametrize("preset", ["pha-tiny", "mehta-gss-hybrid-tiny"])
def test_training_and_evaluation_are_a_graph_each(preset: str) -> None:
    check_training(preset, documents=True)


def test_reading_into_a_cache_is_a_graph() -> None:
    check_reading("pha-tiny", torch.inference_mode)


@pytest.mark.slow
@pytest.mark.parametrize("preset", TINY)
def test_training_and_reading_of_every_preset(preset: str) -> None:
    check_training(preset, documents=PRESETS[preset].get("attention_window") is None)
    torch._dynamo.reset()
    check_reading(preset, torch.inference_mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("preset", ["pha-tiny", "mamba2-tiny"])
def test_reading_with_and_without_gradients(preset: str, mode: Callable[[], Any]) -> None:
    check_reading(preset, mode)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("documents", [False, True])
def test_blocks_of_attention_do_not_ask_for_new_graphs(documents: bool, window: int | None) -> None:
    """Forward alone: FlexAttention has no backward pass on a CPU."""
    model, graphs = make("pha-tiny", attention_window=window).eval(), Graphs()
    ids = [batch(seed, documents, 150) for seed in range(3)]

    def run() -> list[Tensor]:
        return [model.states(each["input_ids"], each["document_starts"]) for each in ids]

    with torch.inference_mode():
        expected = run()
        compile_blocks(model, backend=graphs)
        with OPS["attention"].force("flex"):
            actual = run()
    for x, y in zip(actual, expected, strict=True):
        same(x, y)
    assert graphs.count == 1


def test_writing_into_a_static_cache_is_a_graph() -> None:
    model, graphs = make("pha-tiny"), Graphs()
    ids = batch(0, False)["input_ids"]
    written = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(model, backend=graphs)
        cache, logits = StaticCache(config=model.config, max_cache_len=40), []
        with torch.inference_mode():
            for place in range(5):
                logits.append(model.eval()(ids[:, place : place + 1], past_key_values=cache).logits)
        written.append(torch.cat(logits, 1))
    same(written[1], written[0])
    # The first token finds an empty cache.
    assert graphs.count == 2


@pytest.mark.slow
def test_under_autocast_the_compiled_step_is_that_of_autocast() -> None:
    model = make("pha-tiny", layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        plain = [step(model, seed, False) for seed in range(2)]
        compile_blocks(model, backend="aot_eager")
        for seed, (loss, gradients) in enumerate(plain):
            got, own = step(model, seed, False)
            torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-5)
            for x, y in zip(own, gradients, strict=True):
                torch.testing.assert_close(x, y, rtol=0.05, atol=1e-3)


def test_with_gradient_checkpointing_too() -> None:
    model, graphs = make("pha-tiny", layers=2), Graphs()
    loss, gradients = step(model, 1, True)
    model.gradient_checkpointing_enable()
    compile_blocks(model, backend=graphs)
    got, own = step(model, 1, True)
    same(got, loss)
    for x, y in zip(own, gradients, strict=True):
        same(x, y)
    assert graphs.count == 1


@pytest.mark.slow
def test_a_whole_model_is_one_graph_whatever_its_loss_goes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CHUNK_LOGITS, "cpu", V)  # a row at a time
    model, graphs = make("pha-tiny", layers=2), Graphs()
    loss, _ = step(model, 1, True)
    model.compile(backend=graphs, fullgraph=True, dynamic=False)
    same(step(model, 1, True)[0], loss)
    assert graphs.count == 1


def test_a_branch_that_does_not_compile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Printing(AuxiliaryFFN):
        def forward(self, z: Tensor, context: Any) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(z, context)

    monkeypatch.setitem(BRANCHES, "printing", Printing)
    model = make("pha-tiny", layers=1, branches=["gss", "printing"])
    compile_blocks(model, backend="aot_eager")
    with (
        pytest.raises(
            PHAError, match=r"run\.compile: a layer does not compile .*leave run\.compile"
        ),
        compile_errors("run.compile"),
    ):
        step(model, 0, False)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(PHAError, match="Linear does not say"):
        compile_blocks(nn.Linear(2, 2))
