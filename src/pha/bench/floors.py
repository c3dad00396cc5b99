"""What the machine can do, measured in the process that is being timed, and the time it allows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pha.utils.hardware import PRECISIONS, matmul_rate, seconds_of

SDPA_HEADS, SDPA_HEAD_SIZE = 12, 64
SDPA_LONGEST = 8192  # tokens; a longer one takes long and is no faster
BUFFER_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far larger than any cache


@dataclass(frozen=True)
class Need:
    """The least that some piece of work must do.

    Attributes:
        matmul_flops: FLOPs of products with weights.
        attention_flops: FLOPs of q k^T and its product with v over causal pairs.
        read_bytes: bytes of weights and caches read while multiplying.
        moved_bytes: bytes read and written in phases of their own, such as the optimiser's.
    """

    matmul_flops: float = 0.0
    attention_flops: float = 0.0
    read_bytes: float = 0.0
    moved_bytes: float = 0.0


@dataclass(frozen=True)
class Floors:
    """Measured rates, each the best of a few short runs.

    Attributes:
        matmul: FLOP/s of a large square product in the precision of the job.
        sdpa: FLOP/s of PyTorch's causal attention, causal pairs only, in that precision.
        read: bytes/s of a reduction over a large buffer.
        copy: bytes/s of a copy, reads and writes together.
    """

    matmul: float
    sdpa: float
    read: float
    copy: float

    def seconds(self, need: Need) -> float:
        """The time they allow: products and reads overlap, other phases come on top."""
        multiplying = need.matmul_flops / self.matmul + need.attention_flops / self.sdpa
        return max(multiplying, need.read_bytes / self.read) + need.moved_bytes / self.copy


def measure_floors(device: torch.device, precision: str, length: int) -> Floors:
    """Measure all of them, for jobs in fp32 or bf16 whose attention is over `length` tokens."""
    return Floors(
        matmul_rate(device, precision),
        _sdpa_rate(device, precision, min(length, SDPA_LONGEST)),
        *_bandwidths(device),
    )


def _best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Shortest of some runs of `work`, after one that is not counted."""
    work()
    return min(seconds_of(work, device) for _ in range(repeats))


@functools.cache
@torch.no_grad()
def _sdpa_rate(device: torch.device, precision: str, length: int) -> float:
    """FLOP/s of causal attention over `length` tokens with 12 heads of 64, causal pairs only."""
    shape = (1, SDPA_HEADS, length, SDPA_HEAD_SIZE)
    size = SDPA_HEADS * length * SDPA_HEAD_SIZE
    q = torch.arange(size, device=device).sin().view(shape).to(PRECISIONS[precision])
    k, v = q.flip(0, 2), q.flip(2)
    flops = 4 * SDPA_HEADS * SDPA_HEAD_SIZE * length * (length + 1) / 2
    return flops / _best_seconds(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        device,
        repeats=3 if length > 2048 else 5,
    )


@functools.cache
def _bandwidths(device: torch.device) -> tuple[float, float]:
    """Bytes/s of a sum over a large buffer, and of its copy, those read and written together."""
    source = torch.ones(BUFFER_BYTES.get(device.type, BUFFER_BYTES["cpu"]) // 4, device=device)
    target = torch.zeros_like(source)
    reading = _best_seconds(source.sum, device)
    copying = _best_seconds(lambda: target.copy_(source), device)
    return source.nbytes / reading, 2 * source.nbytes / copying
