"""What is timed of a model: a training step, the reading of a prompt, the writing of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from pha.bench.floors import Need
from pha.bench.graphs import GraphedStep
from pha.bench.peers import (
    CHECKPOINTING,
    CHUNKED,
    FLA_TYPES,
    attention_shape,
    build,
    is_ours,
    kernels_of,
    model_config,
)
from pha.foreign import ForeignModel
from pha.modeling import PHAForCausalLM
from pha.peers import count_multiplied
from pha.train.config import OptimizerConfig
from pha.train.optim import make_optimizer
from pha.utils.compiling import compile_blocks
from pha.utils.errors import PHAError
from pha.utils.hardware import PRECISIONS, seconds_of

DECODE_TOKENS = 8  # new tokens of each sequence in one timed unit
DECODE_UNITS = 32  # more would be decoding after a much longer prompt
TRIAL_UNITS = 2  # of each kind of cache, the first to warm up
STATIC_CACHES = ("pha", "gpt2", "llama")  # model types that can fill keys in place


@dataclass(frozen=True)
class Job:
    """One measurement: what a worker process is asked for.

    Attributes:
        mode: train, prefill or decode of a model; scan, loss or attention of an op.
        model: a preset or `hf:` and a peer; for an op, the preset whose shapes it takes.
        precision: fp32 or bf16.
        batch: B.
        length: T; for decode, tokens of the prompt.
        seconds: how long to go on measuring, at least one unit.
        compiled: whether torch.compile is applied first.
        compiler: its backend; one without code generation, for a rehearsal.
        chunk: tokens of a prompt read at a time; 0 reads it whole.
        backend: of an op, or for people which kernels of a model are on.
        without: kernels of a model that are off.
    """

    mode: str
    model: str
    precision: str
    batch: int
    length: int
    seconds: float = 2.0
    compiled: bool = False
    compiler: str = "inductor"
    chunk: int = 0
    backend: str = ""
    without: Sequence[str] = ()


class Work(ABC):
    """Something to time, in units.

    Attributes:
        tokens: of one unit.
        need: the least that one unit must do.
        setting: how it is run, in words.
        parameters: of the model; 0 for an op.
        weight_bytes: of the parameters that multiply every token; 0 for an op.
        weight_reads: how often a unit has to read all of them, where that is what takes time.
        most_units: how many may be timed, and how many done before that to warm up.
    """

    tokens: int
    need: Need
    setting: str
    parameters = 0
    weight_bytes = 0
    weight_reads = 0
    most_units = 1 << 20

    @abstractmethod
    def unit(self) -> None:
        """Do it once."""


class ModelWork(Work):
    """A model in place, with its sizes and random tokens (B, T)."""

    def __init__(self, job: Job, device: torch.device, dtype: torch.dtype, notes: str) -> None:
        self.job, self.device = job, device
        self.reach = job.length
        if job.mode == "decode":
            self.reach += (2 * DECODE_UNITS + TRIAL_UNITS) * DECODE_TOKENS
        self.config = model_config(job.model, self.reach)
        self.model: PreTrainedModel = build(self.config, device, dtype)
        self.attention = attention_shape(self.config)
        self.parameters, self.multiplied = count_multiplied(self.model)
        self.weight_bytes = self.multiplied * dtype.itemsize
        kernels = kernels_of(self.config.model_type, device.type, job.mode == "train")
        self.setting = ", ".join(["sdpa"] * bool(self.attention.layers) + [notes, *kernels])
        self.run: Any = self.model
        generator = torch.Generator().manual_seed(1)
        shape = (job.batch, job.length)
        self.ids = torch.randint(self.config.vocab_size, shape, generator=generator).to(device)

    def compile(self) -> None:
        """Compile the model where the job says so; what does not make one graph is an error.

        Block by block, unless a peer reads into its cache: that gives each layer a graph of its
        own, so they go into one together.
        """
        if not self.job.compiled:
            return
        if is_ours(self.job.model) or self.job.mode == "train":
            compile_blocks(self.model, backend=self.job.compiler)
            self.setting += ", compiled block by block"
        else:
            self.run = torch.compile(
                self.model, dynamic=False, fullgraph=True, backend=self.job.compiler
            )
            self.setting += ", compiled as a whole"


class Train(ModelWork):
    """Forward, loss, backward, clipping and an AdamW step on B sequences of T tokens.

    The weights are fp32, bf16 is by autocast. Our loss never forms all logits; those of
    transformers do, unless the name of the peer asks for ours.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        ours = is_ours(job.model)
        chunked = ours or job.model.endswith(CHUNKED)
        loss = "chunked loss" if chunked else "loss over all logits"
        autocast = "autocast bf16, " if job.precision == "bf16" else ""
        super().__init__(job, device, torch.float32, f"{autocast}{loss}, fused AdamW")
        self.model.train()
        if job.model.endswith(CHECKPOINTING):
            self.model.gradient_checkpointing_enable()
            self.setting += ", gradient checkpointing"
        config = OptimizerConfig()
        self.optimizer: torch.optim.Optimizer
        if chunked:
            shifted = torch.nn.functional.pad(self.ids[:, 1:], (0, 1), value=-100)
            items = job.batch * (job.length - 1)
            self.labels: dict[str, Any] = {"shift_labels": shifted, "num_items_in_batch": items}
        else:
            self.labels = {"labels": self.ids, "use_cache": False}
        if ours:
            self.optimizer = make_optimizer(self.model, config)
        else:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(),
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                weight_decay=config.weight_decay,
                fused=True,
            )
        if chunked and not ours:
            self.run = foreign = ForeignModel(self.model).look()
            if not foreign.chunked:
                raise PHAError(f"{job.model}: its logits are no plain product; choose no {CHUNKED}")
        self.compile()
        self.clip = config.gradient_clip
        self.tokens = job.batch * job.length
        self.need = Need(
            matmul_flops=6.0 * self.multiplied * self.tokens,
            attention_flops=3.0 * job.batch * self.attention.flops(job.length, job.length),
            # AdamW reads weights, gradients and two moments, and writes all but the gradients.
            moved_bytes=7.0 * 4 * self.parameters,
        )

    def unit(self) -> None:
        """One step."""
        enabled = self.job.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            loss = self.run(input_ids=self.ids, **self.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _Inference(ModelWork):
    """Reading tokens into a cache, with weights of the job's precision."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device, PRECISIONS[job.precision], f"weights in {job.precision}")
        if self.config.model_type in FLA_TYPES:
            raise PHAError(f"{job.model} has a cache of its own kind; it is measured in training")
        if job.chunk and self.config.model_type == "recurrent_gemma":
            raise PHAError("recurrent-gemma cannot read a prompt in pieces; leave --chunk out")
        self.model.eval()
        self.setting += f", prompt {job.chunk} at a time" if job.chunk else ""
        self.cache_argument = (
            "cache_params" if self.config.model_type in ("mamba", "mamba2") else "past_key_values"
        )
        self.compile()

    def new_cache(self, static: bool = False) -> Cache:
        """An empty cache of the model's kind; a static one has room for all that may follow."""
        if static:
            return StaticCache(config=self.config, max_cache_len=self.reach)
        if isinstance(self.model, PHAForCausalLM):
            return self.model.new_cache()
        return DynamicCache(config=self.config)

    def read(self, ids: Tensor, cache: Cache) -> Tensor:
        """(B, V) logits after `ids` (B, T), which go into `cache`."""
        arguments = {self.cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
        logits: Tensor = self.run(input_ids=ids, **arguments).logits
        return logits[:, -1]

    def read_prompt(self, cache: Cache) -> Tensor:
        """(B, V) logits after the whole prompt."""
        pieces = self.ids.split(self.job.chunk or self.job.length, dim=1)
        for piece in pieces:
            logits = self.read(piece, cache)
        return logits


class Prefill(_Inference):
    """The logits of the last of T positions, and the cache kept."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        self.tokens = job.batch * job.length
        head = self.config.vocab_size * self.config.hidden_size
        self.need = Need(
            matmul_flops=2.0 * job.batch * ((self.multiplied - head) * job.length + head),
            attention_flops=job.batch * self.attention.flops(job.length, job.length),
            read_bytes=self.weight_bytes,
        )

    @torch.inference_mode()
    def unit(self) -> None:
        """One prompt."""
        self.cache = self.new_cache()
        self.logits = self.read_prompt(self.cache)


class Decode(_Inference):
    """Greedy decoding after a prompt of T tokens, which is read beforehand.

    A static cache saves copying all keys at every token, but has every query look at the room that
    is left; on a GPU its steps can also be replayed from a CUDA graph. Where a model can use it,
    the fastest way is chosen by trial.
    """

    weight_reads = DECODE_TOKENS
    most_units = DECODE_UNITS

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        self.tokens = job.batch * DECODE_TOKENS
        cached = job.batch * self.attention.cached_numbers(job.length)
        self.need = Need(
            matmul_flops=2.0 * self.multiplied * self.tokens,
            attention_flops=self.tokens * self.attention.flops(1, job.length),
            read_bytes=DECODE_TOKENS
            * (self.weight_bytes + cached * PRECISIONS[job.precision].itemsize),
        )
        # Every length of a growing one would be compiled for itself.
        kinds = [] if job.compiled else ["growing cache"]
        if self.config.model_type in STATIC_CACHES:
            kinds.append("static cache")
            if device.type == "cuda":
                kinds.append("static cache, CUDA graph")
        if not kinds:
            raise PHAError(f"{job.model} decodes with a cache that grows; leave --compile out")
        self.choose_cache(kinds)

    def choose_cache(self, kinds: Sequence[str]) -> None:
        """Read the prompt into a cache of each kind, and go on with the fastest.

        A kind that fails is left out, unless it is the first.
        """
        trials: list[tuple[float, str, _Decoding]] = []
        for kind in kinds:
            try:
                self.decoding = self._begin(kind)
                seconds = [seconds_of(self.unit, self.device) for _ in range(TRIAL_UNITS)]
                trials.append((seconds[-1], kind, self.decoding))
            except RuntimeError as error:
                if not trials:
                    raise
                self.setting += f", no {kind} ({' '.join(str(error).split())[:80]})"
        _, kind, self.decoding = min(trials, key=lambda trial: trial[0])
        self.setting += f", {kind}"

    @torch.inference_mode()
    def _begin(self, kind: str) -> _Decoding:
        cache = self.new_cache(static=kind != "growing cache")
        token = self.read_prompt(cache).argmax(-1, keepdim=True)

        def step(token: Tensor) -> Tensor:
            return self.read(token, cache)

        if "graph" in kind:
            return _Decoding(cache, token, GraphedStep(step, token, cache))
        return _Decoding(cache, token, step)

    @torch.inference_mode()
    def unit(self) -> None:
        """`DECODE_TOKENS` more of each sequence."""
        decoding = self.decoding
        for _ in range(DECODE_TOKENS):
            decoding.token = decoding.step(decoding.token).argmax(-1, keepdim=True)


@dataclass
class _Decoding:
    """One way to go on after the prompt: its cache, the last token (B, 1), what gives logits."""

    cache: Cache
    token: Tensor
    step: Callable[[Tensor], Tensor]


MODEL_MODES: dict[str, type[Train] | type[Prefill] | type[Decode]] = {
    "train": Train,
    "prefill": Prefill,
    "decode": Decode,
}
