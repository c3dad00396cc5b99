"""Every mode on tiny models in this process, and what the floors are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from pha.bench import floors as floors_module
from pha.bench import memory, peers
from pha.bench import work as work_module
from pha.bench.floors import Floors, Need
from pha.bench.graphs import cache_tensors
from pha.bench.op_work import OP_MODES, OpWork, op_backends
from pha.bench.work import DECODE_TOKENS, TRIAL_UNITS, Decode, Job, Prefill, Train, Work
from pha.bench.worker import _one_line, attempt, measure, time_units
from pha.ops import OPS
from pha.utils.errors import PHAError

CPU = torch.device("cpu")
MODELS = (
    *("pha-tiny", "gss-only-tiny", "hf:gpt2-tiny", "hf:llama-tiny"),
    *("hf:falcon-h1-tiny", "hf:mamba2-tiny", "hf:recurrent-gemma-tiny"),
)


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Bandwidths of small buffers and a small vocabulary, to be quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(floors_module.BUFFER_BYTES, "cpu", 1 << 22)
        patch.setattr(peers, "VOCABULARY", 512)
        yield


def test_the_time_allowed_is_the_slower_of_products_and_reads_plus_what_is_moved() -> None:
    rates = Floors(matmul=100.0, sdpa=10.0, read=5.0, copy=2.0)
    assert rates.seconds(Need(matmul_flops=200, attention_flops=10)) == 3.0
    assert rates.seconds(Need(matmul_flops=200, attention_flops=10, read_bytes=20)) == 4.0
    assert rates.seconds(Need(matmul_flops=200, read_bytes=5, moved_bytes=6)) == 5.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_decoding_goes_on_where_the_prompt_ends(model: str, precision: str) -> None:
    """The cache holds what was read: the next tokens are those of one pass over everything."""
    work = Prefill(Job("prefill", model, precision, 2, 16), CPU)
    work.unit()
    first = work.logits.argmax(-1, keepdim=True)
    with torch.inference_mode():
        step = work.read(first, work.cache)
        whole = work.read(torch.cat([work.ids, first], dim=1), work.new_cache())
    error = (whole.float() - step.float()).abs().max()
    assert error < (0.05 if precision == "bf16" else 1e-3) * whole.float().abs().max()


@pytest.mark.parametrize("model", ["pha-tiny", "hf:gpt2-tiny", "hf:llama-tiny"])
def test_both_caches_write_the_same_and_the_faster_is_used(model: str) -> None:
    work = Decode(Job("decode", model, "fp32", 2, 16), CPU)
    caches = (StaticCache, DynamicCache)
    assert isinstance(work.decoding.cache, caches["growing" in work.setting])
    tokens = []
    for index, kind in enumerate(("static cache", "growing cache")):
        work.choose_cache([kind])
        assert isinstance(work.decoding.cache, caches[index])
        work.unit()
        tokens.append(work.decoding.token)
    assert tokens[0].equal(tokens[1])


@pytest.mark.parametrize("model", ["pha-tiny", "gss-only-tiny", "hf:gpt2-tiny", "hf:llama-tiny"])
def test_a_static_cache_put_back_goes_on_as_before(model: str) -> None:
    """All that a step changes is among the tensors that a CUDA graph's warm-up puts back."""
    work = Decode(Job("decode", model, "fp32", 2, 16), CPU)
    work.choose_cache(["static cache"])
    decoding = work.decoding
    with torch.inference_mode():
        tensors = cache_tensors(decoding.cache)
        before = [tensor.clone() for tensor in tensors]
        first = decoding.step(decoding.token)
        assert not all(map(torch.equal, tensors, before))
        for tensor, saved in zip(tensors, before, strict=True):
            tensor.copy_(saved)
        assert torch.equal(decoding.step(decoding.token), first)


def test_a_way_to_decode_that_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Decode(Job("decode", "pha-tiny", "fp32", 2, 16), CPU)

    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(work_module, "GraphedStep", fail)
    work.setting = ""
    work.choose_cache(["growing cache", "static cache, CUDA graph"])
    assert work.setting == (
        ", no static cache, CUDA graph (operation not permitted when stream is capturing)"
        ", growing cache"
    )
    work.unit()
    with pytest.raises(RuntimeError, match="capturing"):
        work.choose_cache(["static cache, CUDA graph"])


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["pha-tiny", "gss-only-tiny", "hf:gpt2-tiny"])
def test_a_graph_writes_what_its_steps_do(model: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a CPU has no graphs")
    work = Decode(Job("decode", model, "fp32", 2, 16), device)
    tokens = []
    for kind in ("static cache", "static cache, CUDA graph"):
        work.choose_cache([kind])
        work.unit()
        work.unit()
        tokens.append(work.decoding.token)
    assert tokens[0].equal(tokens[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_training_steps_lower_the_loss(model: str, precision: str) -> None:
    work = Train(Job("train", model, precision, 2, 12), CPU)
    before = [p.detach().clone() for p in work.model.parameters()]

    def loss() -> float:
        with torch.no_grad():
            return float(work.model(input_ids=work.ids, labels=work.ids, use_cache=False).loss)

    start = loss()
    for _ in range(3):
        work.unit()
    assert loss() < start
    pairs = zip(before, work.model.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)


@pytest.mark.parametrize(
    "model", ["pha-tiny", "hf:gpt2-tiny", "hf:falcon-h1-tiny", "hf:mamba2-tiny"]
)
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(model: str) -> None:
    whole = Prefill(Job("prefill", model, "fp32", 2, 13), CPU)
    pieces = Prefill(Job("prefill", model, "fp32", 2, 13, chunk=5), CPU)
    whole.unit()
    pieces.unit()
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=1e-4, atol=1e-5)


COMPILED: dict[str, Any] = {"compiled": True, "compiler": "eager"}


def test_compiled_steps_are_those_of_the_model() -> None:
    """By blocks in training, a peer as a whole where it fills a cache; a static cache to decode."""
    ours = "pha-tiny+num_hidden_layers=2"
    for mode, model, said in (
        ("train", ours, "block by block"),
        ("train", "hf:gpt2-tiny", "block by block"),
        ("prefill", ours, "block by block"),
        ("prefill", "hf:gpt2-tiny", "as a whole"),
    ):
        torch._dynamo.reset()
        works = [
            work_module.MODEL_MODES[mode](Job(mode, model, "fp32", 2, 8, **more), CPU)
            for more in ({}, COMPILED)
        ]
        assert said in works[1].setting
        results = []
        for work in works:
            work.unit()
            if isinstance(work, Train):
                results.append(work.run(input_ids=work.ids, **work.labels).loss.detach())
            elif isinstance(work, Prefill):
                results.append(work.logits)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(PHAError, match="cache that grows"):
        Decode(Job("decode", "hf:mamba2-tiny", "fp32", 1, 8, **COMPILED), CPU)


def test_what_would_stop_compiling_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own answer to too many graphs is a line in a log, and eager work."""

    class Growing(Work):
        tokens, need, setting = 1, Need(), ""

        def __init__(self, job: Job, device: torch.device) -> None:
            self.size, self.run = 1, torch.compile(torch.sin, backend="eager", dynamic=False)

        def unit(self) -> None:
            self.size += 1
            self.run(torch.ones(self.size))

    monkeypatch.setitem(work_module.MODEL_MODES, "train", Growing)
    torch._dynamo.reset()
    row = attempt(Job("train", "pha-tiny", "fp32", 1, 8, 60, **COMPILED))
    torch._dynamo.reset()
    assert "limit" in row["error"]


def test_decoding_stops_before_learned_positions_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "POSITIONS", 1)
    monkeypatch.setattr(work_module, "DECODE_UNITS", 2)
    monkeypatch.setattr(Decode, "most_units", 2)
    work = Decode(Job("decode", "hf:gpt2-tiny", "fp32", 1, 8), CPU)
    assert work.config.n_positions == 8 + (2 * 2 + TRIAL_UNITS) * DECODE_TOKENS
    assert len(time_units(work, CPU, 60.0)) == 2


def test_what_cannot_be_read_in_pieces_says_so() -> None:
    with pytest.raises(PHAError, match="recurrent-gemma cannot read"):
        Prefill(Job("prefill", "hf:recurrent-gemma-tiny", "fp32", 1, 8, chunk=4), CPU)


@pytest.mark.parametrize("mode", ["train", "prefill", "decode"])
def test_a_measurement_of_a_model_is_complete(mode: str) -> None:
    result = measure(Job(mode, "pha-tiny", "fp32", 2, 16, seconds=0.01))
    tokens = 2 * (DECODE_TOKENS if mode == "decode" else 16)
    assert result["tokens_per_second"] == pytest.approx(tokens / result["unit_seconds"])
    assert result["of_floor"] == pytest.approx(result["floor_seconds"] / result["unit_seconds"])
    assert result["utilisation"] > 0
    assert result["peak_memory"] > result["work_memory"] >= 0
    assert result["weight_bytes"] == 4 * result["parameters"]
    expected = DECODE_TOKENS * result["weight_bytes"] / result["unit_seconds"]
    assert result["weight_bandwidth"] == pytest.approx(expected if mode == "decode" else 0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    ("mode", "backend"),
    [(mode, backend) for mode in OP_MODES for backend in op_backends(mode, "cpu")],
)
def test_every_backend_of_every_op_can_be_measured(
    mode: str, backend: str, passes: str, precision: str
) -> None:
    job = Job(mode, "pha-tiny", precision, 2, 12, backend=f"{backend}, {passes}")
    work = OpWork(job, CPU)
    (seconds,) = time_units(work, CPU, 1e-9)
    assert seconds > 0
    assert work.tokens == 24
    assert 0 < Floors(1.0, 1.0, 1.0, 1.0).seconds(work.need) < math.inf


def test_ops_need_what_their_shapes_say() -> None:
    def need(mode: str, passes: str, precision: str = "fp32", length: int = 12) -> Need:
        backend = next(name for name in OPS[OP_MODES[mode]].backends if name != "naive")
        job = Job(mode, "pha-tiny", precision, 2, length, backend=f"{backend}, {passes}")
        return OpWork(job, CPU).need

    inputs = 2 * 12 * 544
    assert need("gated-scan", "forward").moved_bytes == 3 * 4 * inputs
    assert need("gated-scan", "forward+backward").moved_bytes == 9 * 4 * inputs
    assert need("gated-scan", "forward+backward", "bf16").moved_bytes == 9 * 2 * inputs
    assert need("loss", "forward").matmul_flops == 2 * 24 * 160 * 512
    assert need("loss", "forward+backward").matmul_flops == 6 * 24 * 160 * 512
    assert need("attention", "forward").matmul_flops == 2 * 4 * 4 * 40 * (12 * 13 / 2)
    documents = need("documents", "forward+backward", length=19).matmul_flops
    assert documents == 3 * 2 * 4 * 4 * 40 * (9 * 3 + 1)  # nine documents of two, one of one


def test_errors_become_one_line() -> None:
    with pytest.raises(RuntimeError) as too_much:
        torch.empty(1 << 50)
    assert _one_line(too_much.value) == "out of memory"
    assert _one_line(KeyError("no\nsuch")) == r"KeyError: 'no\nsuch'"
    assert _one_line(PHAError("this  is wrong")) == "this is wrong"


def test_the_peak_is_that_of_the_work_alone() -> None:
    size = 1 << 26
    torch.ones(3 * size // 4)  # freed at once, before the peak is reset
    held = memory.held(CPU)
    forgotten = memory.reset_peak(CPU)
    kept = torch.ones(size // 4)
    peak = memory.peak(CPU)
    assert peak >= held + 0.9 * kept.nbytes
    if forgotten:
        assert peak < held + 1.5 * kept.nbytes
