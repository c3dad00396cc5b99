"""What is timed of an op: one backend, forward or forward and backward, at a preset's shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    return [
        name
        for name in op.backends
        if name not in left_out
        and op.runs_on(name, device_type)
        and op.is_at_hand(name, device_type)
    ]


class OpWork(Work):
    """A function of tensors at a preset's shapes, with or without the gradients of all of them.

    Args:
        job: whose mode is an op; `backend` is `NAME` or `NAME, forward+backward`.
        device: of the tensors.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.backend, _, passes = job.backend.partition(", ")
        self.backward = passes == PASSES[1]
        self.tokens = job.batch * job.length
        self.dtype = PRECISIONS[job.precision]
        self.autocast: torch.dtype | None = None  # type of matrix products, else of the inputs
        self.config = model_config(job.model, job.length)
        self.function: Callable[..., Any] = OPS[OP_MODES[job.mode]].backends[self.backend]
        makers = {
            **{"gated-scan": self._gated_scan, "loss": self._loss},
            **{"attention": self._attention, "documents": self._attention},
            **{"linear-attention": self._linear_attention, "delta-rule": self._linear_attention},
        }
        self.inputs, self.need, self.setting = makers.get(job.mode, self._elementwise)()
        self.output_gradient: Tensor | None = None
        for x in self.inputs:
            x.requires_grad_(self.backward)

    def unit(self) -> None:
        """Forward, and backward if asked for."""
        with (
            torch.set_grad_enabled(self.backward),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
        ):
            output = self.function(*self.inputs)
        if not self.backward:
            return
        first = output[0] if isinstance(output, tuple) else output
        if self.output_gradient is None:
            self.output_gradient = torch.ones_like(first)
        torch.autograd.grad(first, self.inputs, self.output_gradient)

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        drawn = torch.randn(*shape, generator=generator, device=self.device)
        return drawn.to(dtype or self.dtype)

    def _gated_scan(self) -> tuple[list[Tensor], Need, str]:
        """Must read gate and value and write h; backward reads dh, h, both, and writes as much."""
        shape = self.job.batch, self.job.length, self.config.state_size
        gate, value = self._random(*shape), self._random(*shape).flip(0)
        a = torch.linspace(0.9, 0.999, shape[-1], device=self.device)
        need = Need(moved_bytes=(9.0 if self.backward else 3.0) * value.nbytes)
        return [gate, value, a, (1 - a * a).sqrt()], need, f"gate and value {shape}"

    def _loss(self) -> tuple[list[Tensor], Need, str]:
        """Must multiply for the logits, backward for dx and dW. Weights are fp32 as in training."""
        function, rows, config = self.function, self.tokens, self.config
        x = self._random(rows, config.hidden_size)
        weight = 0.02 * self._random(config.vocab_size, config.hidden_size, dtype=torch.float32)
        targets = torch.arange(rows, device=self.device) % config.vocab_size
        self.function = lambda x, weight: function(x, weight, targets)
        self.autocast = self.dtype if self.job.precision == "bf16" else None
        products = 3 if self.backward else 1
        need = Need(matmul_flops=2.0 * products * x.numel() * config.vocab_size)
        return [x, weight], need, f"x ({rows}, {config.hidden_size}), V {config.vocab_size}"

    def _attention(self) -> tuple[list[Tensor], Need, str]:
        """Must multiply over causal pairs, at the matmul rate at best; backward as much twice more.

        In the mode `documents` only over those within one of several documents of equal length.
        """
        job, config, function = self.job, self.config, self.function
        heads, key_heads, size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        # Unit-length queries and keys make moderate logits, as in the model.
        q, k, v = (
            F.normalize(self._random(job.batch, h, job.length, size), dim=-1)
            for h in (heads, key_heads, key_heads)
        )
        window = config.attention_window
        shape = AttentionShape(1, heads, key_heads, size, window)
        mask: Mask | None = None
        setting, sizes = "", [job.length]
        if job.mode == "documents":
            document = max(1, job.length // DOCUMENTS)
            places = torch.arange(job.length, device=self.device)
            by_blocks = takes_blocks(self.backend, job.length, self.device.type)
            make = block_mask if by_blocks else attention_mask
            mask = make(places, places, places.expand(job.batch, -1) % document == 0)
            whole, rest = divmod(job.length, document)
            sizes, setting = [document] * whole + [rest], f", documents of {document}"
        self.function = lambda q, k, v: function(q, k, v, mask, window)
        flops = job.batch * sum(shape.flops(each, each) for each in sizes)
        need = Need(matmul_flops=flops * (3 if self.backward else 1))
        return [q, k, v], need, f"H {heads}, G {key_heads}, K {size}, T {job.length}{setting}"

    def _linear_attention(self) -> tuple[list[Tensor], Need, str]:
        """Must multiply over pairs within chunks and with the state; backward twice as much again.

        With a decay for each head, and with the delta rule where that is the mode.
        """
        job, delta, heads = self.job, self.job.mode == "delta-rule", self.config.num_attention_heads
        size, shape = self.config.hidden_size // heads, (job.batch, job.length, heads)
        q, k, v = (self._random(*shape, size) for _ in range(3))
        q, k = (F.normalize(x, dim=-1) for x in (q, k))
        g = F.logsigmoid(4 + self._random(*shape, dtype=torch.float32))
        rest = [self._random(*shape, dtype=torch.float32).sigmoid()] if delta else []
        flops = chunked_flops(heads, heads, size, size, job.length, delta)
        need = Need(matmul_flops=flops * self.tokens * (3 if self.backward else 1))
        return [q, k, v, g, *rest], need, f"H {heads}, K and P {size}, T {job.length}"

    def _elementwise(self) -> tuple[list[Tensor], Need, str]:
        """Must read the inputs and write an output; backward reads both with dy, writes gradients.

        At the sizes of the mixers: d channels, in Mamba's scan 2 d with 16 modes each.
        """
        job, d = self.job, self.config.hidden_size
        batch, words = (job.batch, job.length), f"({job.batch}, {job.length}, {d})"
        if job.mode == "short-convolution":
            inputs = [self._random(*batch, d), self._random(d, 4)]
            words += ", 4 taps"
        elif job.mode == "long-convolution":
            inputs = [self._random(*batch, d), self._random(job.length, d)]
            words += f", {job.length} taps"
        elif job.mode == "linear-scan":
            decays = torch.sigmoid(4 + self._random(*batch, d, dtype=torch.float32))
            inputs = [self._random(*batch, d), decays]
        else:
            x = self._random(*batch, 2 * d)
            dt = F.softplus(self._random(*batch, 2 * d, dtype=torch.float32) - 4)
            A = -torch.arange(1.0, MODES + 1, device=self.device).expand(2 * d, -1).contiguous()
            inputs = [x, dt, A, *(self._random(*batch, MODES) for _ in range(2))]
            words = f"({job.batch}, {job.length}, {2 * d}), {MODES} modes"
        read, written = sum(x.nbytes for x in inputs), inputs[0].nbytes
        moved = read + written + (self.backward and 2 * read + written)
        return inputs, Need(moved_bytes=float(moved)), words
