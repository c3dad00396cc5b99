"""What is timed of an op: one backend, forward or forward and backward, at a preset's shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from pha.bench.floors import Need
from pha.bench.peers import AttentionShape, model_config
from pha.bench.work import Job, Work
from pha.ops import OPS
from pha.ops.attention import attention_mask, block_mask, takes_blocks
from pha.ops.attention.naive import Mask
from pha.ops.linear_attention.chunked import chunked_flops
from pha.utils.hardware import PRECISIONS

OP_MODES = {
    "gated-scan": "gated_scan",
    "loss": "linear_cross_entropy",
    "attention": "attention",
    "documents": "attention",
    "short-convolution": "short_convolution",
    "long-convolution": "long_convolution",
    "linear-scan": "linear_scan",
    "selective-scan": "selective_scan",
    "linear-attention": "linear_attention",
    "delta-rule": "linear_attention",
}
"""Mode -> name of the op in `pha.ops.OPS`."""

MODES = 16  # of a channel, in the selective scan
DOCUMENTS = 8  # of equal length in a sequence of the mode `documents`

PASSES = ("forward", "forward+backward")


def op_backends(mode: str, device_type: str) -> list[str]:
    """Backends of the op that are worth timing on a device: all of its own but the oracle."""
    op = OPS[OP_MODES[mode]]
    # Within documents these are FlexAttention, as flex is.
    left_out = {"naive"} | ({"flash", "cudnn"} if mode == "documents" else set())
    return [name for name in op.backends if name not in left_out and op.runs_on(name, device_type)]


@dataclass
class OpWork(Work):
    """A function of tensors, with or without the gradients of all of them.

    Attributes:
        job: `backend` is `NAME` or `NAME, forward+backward`.
        function: of the inputs, returning a tensor or a tuple of which the first counts.
        inputs: floating tensors.
        need: of one unit.
        setting: in words.
        autocast: the type of matrix products, None for that of the inputs.
    """

    job: Job
    function: Callable[..., Any]
    inputs: list[Tensor]
    need: Need
    setting: str
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.tokens = self.job.batch * self.job.length
        self.backward = _is_backward(self.job)
        self.output_gradient: Tensor | None = None
        for x in self.inputs:
            x.requires_grad_(self.backward)

    def unit(self) -> None:
        """Forward, and backward if asked for."""
        device = self.inputs[0].device.type
        with (
            torch.set_grad_enabled(self.backward),
            torch.autocast(device, self.autocast, enabled=self.autocast is not None),
        ):
            output = self.function(*self.inputs)
        if not self.backward:
            return
        first = output[0] if isinstance(output, tuple) else output
        if self.output_gradient is None:
            self.output_gradient = torch.ones_like(first)
        torch.autograd.grad(first, self.inputs, self.output_gradient)


def make_op_work(job: Job, device: torch.device) -> OpWork:
    """The work of a job whose mode is an op."""
    config = model_config(job.model, job.length)
    function = OPS[OP_MODES[job.mode]].backends[job.backend.partition(", ")[0]]
    makers = {
        **{"gated-scan": _gated_scan, "loss": _loss},
        **{"attention": _attention, "documents": _attention},
        **{"linear-attention": _linear_attention, "delta-rule": _linear_attention},
    }
    return makers.get(job.mode, _elementwise)(job, config, device, function)


def _is_backward(job: Job) -> bool:
    return job.backend.endswith(PASSES[1])


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def _gated_scan(
    job: Job, config: PreTrainedConfig, device: torch.device, function: Callable[..., Any]
) -> OpWork:
    """Must read gate and value and write h; backward reads dh, h, both, and writes their like."""
    dtype = PRECISIONS[job.precision]
    shape = job.batch, job.length, config.state_size
    gate, value = _random(device, dtype, *shape), _random(device, dtype, *shape).flip(0)
    a = torch.linspace(0.9, 0.999, config.state_size, device=device)
    return OpWork(
        job,
        function,
        [gate, value, a, (1 - a * a).sqrt()],
        Need(moved_bytes=(9.0 if _is_backward(job) else 3.0) * value.nbytes),
        f"gate and value ({job.batch}, {job.length}, {config.state_size})",
    )


def _loss(
    job: Job, config: PreTrainedConfig, device: torch.device, function: Callable[..., Any]
) -> OpWork:
    """Must multiply for the logits, and for dx and dW backward. Weights are fp32 as in training."""
    dtype = PRECISIONS[job.precision]
    rows = job.batch * job.length
    x = _random(device, dtype, rows, config.hidden_size)
    weight = 0.02 * _random(device, torch.float32, config.vocab_size, config.hidden_size)
    targets = torch.arange(rows, device=device) % config.vocab_size
    products = 3 if _is_backward(job) else 1
    return OpWork(
        job,
        lambda x, weight: function(x, weight, targets),
        [x, weight],
        Need(matmul_flops=2.0 * products * x.numel() * config.vocab_size),
        f"x ({rows}, {config.hidden_size}), V {config.vocab_size}",
        autocast=dtype if job.precision == "bf16" else None,
    )


def _attention(
    job: Job, config: PreTrainedConfig, device: torch.device, function: Callable[..., Any]
) -> OpWork:
    """Must multiply over causal pairs, at best at the matmul rate; backward twice as much again.

    In the mode `documents` only over those within one of several documents of equal length.
    """
    dtype = PRECISIONS[job.precision]
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    head_size = config.head_dim
    # Unit-length queries and keys make moderate logits, as in the model.
    q, k, v = (
        torch.nn.functional.normalize(
            _random(device, dtype, job.batch, h, job.length, head_size), dim=-1
        )
        for h in (heads, key_heads, key_heads)
    )
    window = config.attention_window
    shape = AttentionShape(1, heads, key_heads, head_size, window)
    mask: Mask | None = None
    setting, sizes = "", [job.length]
    if job.mode == "documents":
        size = max(1, job.length // DOCUMENTS)
        places = torch.arange(job.length, device=device)
        by_blocks = takes_blocks(job.backend.partition(", ")[0], job.length, device.type)
        make = block_mask if by_blocks else attention_mask
        mask = make(places, places, places.expand(job.batch, -1) % size == 0)
        whole, rest = divmod(job.length, size)
        sizes, setting = [size] * whole + [rest], f", documents of {size}"
    flops = job.batch * sum(shape.flops(size, size) for size in sizes)
    return OpWork(
        job,
        lambda q, k, v: function(q, k, v, mask, window),
        [q, k, v],
        Need(matmul_flops=flops * (3 if _is_backward(job) else 1)),
        f"H {heads}, G {key_heads}, K {head_size}, T {job.length}{setting}",
    )


def _linear_attention(
    job: Job, config: PreTrainedConfig, device: torch.device, function: Callable[..., Any]
) -> OpWork:
    """Must multiply over pairs within chunks and with the state; backward twice as much again.

    With a decay for each head, and with the delta rule where that is the mode.
    """
    dtype, delta = PRECISIONS[job.precision], job.mode == "delta-rule"
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    shape = job.batch, job.length, heads
    q, k, v = (_random(device, dtype, *shape, size) for _ in range(3))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g = torch.nn.functional.logsigmoid(4 + _random(device, torch.float32, *shape))
    rest = [_random(device, torch.float32, *shape).sigmoid()] if delta else []
    flops = chunked_flops(heads, heads, size, size, job.length, delta)
    tokens = job.batch * job.length
    return OpWork(
        job,
        function,
        [q, k, v, g, *rest],
        Need(matmul_flops=flops * tokens * (3 if _is_backward(job) else 1)),
        f"H {heads}, K and P {size}, T {job.length}",
    )


def _elementwise(
    job: Job, config: PreTrainedConfig, device: torch.device, function: Callable[..., Any]
) -> OpWork:
    """Must read the inputs and write an output; backward reads both with dy, and writes gradients.

    At the sizes of the mixers: d channels, in Mamba's scan 2 d with 16 modes each.
    """
    dtype, d = PRECISIONS[job.precision], config.hidden_size
    batch, words = (job.batch, job.length), f"({job.batch}, {job.length}, {d})"
    if job.mode == "short-convolution":
        inputs = [_random(device, dtype, *batch, d), _random(device, dtype, d, 4)]
        words += ", 4 taps"
    elif job.mode == "long-convolution":
        inputs = [_random(device, dtype, *batch, d), _random(device, dtype, job.length, d)]
        words += f", {job.length} taps"
    elif job.mode == "linear-scan":
        decays = torch.sigmoid(4 + _random(device, torch.float32, *batch, d))
        inputs = [_random(device, dtype, *batch, d), decays]
    else:
        x = _random(device, dtype, *batch, 2 * d)
        dt = torch.nn.functional.softplus(_random(device, torch.float32, *batch, 2 * d) - 4)
        A = -torch.arange(1.0, MODES + 1, device=device).expand(2 * d, -1).contiguous()
        inputs = [x, dt, A, *(_random(device, dtype, *batch, MODES) for _ in range(2))]
        words = f"({job.batch}, {job.length}, {2 * d}), {MODES} modes"
    read, written = sum(x.nbytes for x in inputs), inputs[0].nbytes
    moved = read + written + (_is_backward(job) and 2 * read + written)
    return OpWork(job, function, inputs, Need(moved_bytes=float(moved)), words)
