"""What is timed of a model: a training step, the reading of a prompt, the writing of tokens."""

from __future__ import annotations

import importlib.util
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
from pha.bench.peers import CHECKPOINTING, attention_shape, build, is_ours, model_config
from pha.modeling import PHAForCausalLM
from pha.peers import count_multiplied
from pha.train.config import OptimizerConfig
from pha.train.optim import make_optimizer
from pha.utils.errors import PHAError
from pha.utils.hardware import PRECISIONS, seconds_of

DECODE_TOKENS = 8  # new tokens of each sequence in one timed unit
DECODE_UNITS = 32  # more would be decoding after a much longer prompt
TRIAL_UNITS = 2  # of each kind of cache, the first to warm up
STATIC_CACHES = ("pha", "gpt2", "llama")  # model types that can fill keys in place
STATE_SPACES = ("mamba", "mamba2", "jamba", "falcon_h1", "bamba")
KERNEL_PACKAGES = ("mamba_ssm", "causal_conv1d")


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
        self.setting = ", ".join(["sdpa"] * bool(self.attention.layers) + [notes, *self._kernels()])
        self.run: Any = torch.compile(self.model) if job.compiled else self.model
        generator = torch.Generator().manual_seed(1)
        shape = (job.batch, job.length)
        self.ids = torch.randint(self.config.vocab_size, shape, generator=generator).to(device)

    def _kernels(self) -> list[str]:
        """How transformers runs the state spaces of this model."""
        if self.config.model_type not in STATE_SPACES:
            return []
        fast = self.device.type == "cuda" and all(map(importlib.util.find_spec, KERNEL_PACKAGES))
        return ["mamba_ssm kernels" if fast else "scan in plain PyTorch"]


class Train(ModelWork):
    """Forward, loss, backward, clipping and an AdamW step on B sequences of T tokens.

    The weights are fp32, bf16 is by autocast. Our loss never forms all logits; those of
    transformers do.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        ours = is_ours(job.model)
        loss = "chunked loss" if ours else "loss over all logits"
        autocast = "autocast bf16, " if job.precision == "bf16" else ""
        super().__init__(job, device, torch.float32, f"{autocast}{loss}, fused AdamW")
        self.model.train()
        if job.model.endswith(CHECKPOINTING):
            self.model.gradient_checkpointing_enable()
            self.setting += ", gradient checkpointing"
        config = OptimizerConfig()
        self.optimizer: torch.optim.Optimizer
        if ours:
            self.optimizer = make_optimizer(self.model, config)
            shifted = torch.nn.functional.pad(self.ids[:, 1:], (0, 1), value=-100)
            items = job.batch * (job.length - 1)
            self.labels: dict[str, Any] = {"shift_labels": shifted, "num_items_in_batch": items}
        else:
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(),
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                weight_decay=config.weight_decay,
                fused=True,
            )
            self.labels = {"labels": self.ids}
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
            loss = self.run(input_ids=self.ids, use_cache=False, **self.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _Inference(ModelWork):
    """Reading tokens into a cache, with weights of the job's precision."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device, PRECISIONS[job.precision], f"weights in {job.precision}")
        if job.chunk and self.config.model_type == "recurrent_gemma":
            raise PHAError("recurrent-gemma cannot read a prompt in pieces; leave --chunk out")
        self.model.eval()
        self.setting += f", prompt {job.chunk} at a time" if job.chunk else ""
        self.cache_argument = (
            "cache_params" if self.config.model_type in ("mamba", "mamba2") else "past_key_values"
        )

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
        kinds = ["growing cache"]
        if self.config.model_type in STATIC_CACHES:
            kinds.append("static cache")
            if device.type == "cuda":
                kinds.append("static cache, CUDA graph")
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
