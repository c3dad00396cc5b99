"""The gated scan on a GPU: what Triton's kernels are given, and in which form they run.

`operator.py` makes an opaque operator of torch of these functions. There is nothing around a scan
to fuse with it, and an operator may check itself at its first use and may leave the work to torch.
Grids follow from shapes alone and nothing waits for the device, so that CUDA graphs can record
them.

Bytes moved, in units of B * T * n elements: the sequential form reads gate and value and writes h
(3); its backward reads dh, h, gate and value and writes dgate and dvalue (6). The chunked form
reads gate and value, or dh, once more (5 and 7), from the L2 cache where they fit in it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pha.ops.backends import on_device_of
from pha.ops.precision import accumulation_type

BLOCK = 64  # States of a program, by one warp: two neighbours a thread, a transaction of bf16.
UNROLL = 8  # Steps whose loads are issued together.
STAGES = 3  # Of the pipeline of loads: those of two more groups of UNROLL steps are under way.
# About 29 kB in flight on each SM of an H200 (4.8 TB/s for some 800 ns) keep its memory busy. A
# program in bf16 has 4 kB, so 8 programs are wanted. With fewer the time of the sequential form
# grows in proportion; the chunked one moves 5/3 of the bytes.
WANTED = 8  # Programs per SM that the chunked form aims at.
ENOUGH = 5  # Programs per SM from which on the sequential form is taken.
SHORTEST = 64  # Steps of a chunk, at least.


def chunk_length(B: int, T: int, n: int, processors: int, form: str = "auto") -> int:
    """Steps of a chunk: T for the sequential form.

    Args:
        B: batch.
        T: steps.
        n: states.
        processors: SMs of the device.
        form: `"sequential"`, `"chunked"` or `"auto"`, which takes the chunked form where the
            programs of the sequential one, B * ceil(n / BLOCK), are fewer than ENOUGH a processor.
    """
    programs = B * -(-n // BLOCK)
    if form == "sequential" or (form == "auto" and programs >= ENOUGH * processors):
        return T
    chunks = -(-WANTED * processors // max(1, programs))
    if form == "chunked":
        chunks = max(chunks, 2)
    steps = -(-T // chunks)
    return min(T, max(SHORTEST, -(-steps // UNROLL) * UNROLL))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: Tensor) -> Tensor:
    """`x` (B, T, n) itself where its states are adjacent, else a copy."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _flags(x: Tensor | None, absent: Tensor) -> Tensor:
    return absent if x is None else x.contiguous().view(torch.uint8)


class _Launch:
    """The grid of one problem, and what all its launches have in common."""

    def __init__(self, x: Tensor, form: str) -> None:
        self.B, self.T, self.n = x.shape
        self.length = chunk_length(self.B, self.T, self.n, _processors(x.device), form)
        self.chunks = -(-self.T // max(1, self.length))
        self.blocks = self.B * -(-self.n // BLOCK)
        self.sizes = self.T, self.n, self.chunks, self.length
        self.walk = {"BLOCK": BLOCK, "UNROLL": UNROLL, "STAGES": STAGES, "num_warps": 1}

    def partial(self, x: Tensor) -> Tensor:
        """(B, chunks, n), empty, in the type of the states."""
        return x.new_empty(self.B, self.chunks, self.n, dtype=accumulation_type(x))

    def run(self, kernel: Any, *arguments: Any, **flags: Any) -> None:
        kernel[(self.blocks * self.chunks,)](*arguments, *self.sizes, **self.walk, **flags)

    def combine(
        self, initial: Tensor | None, last: Tensor, product: Tensor, reverse: bool
    ) -> Tensor:
        """What comes into each chunk (B, chunks, n)."""
        from pha.ops.gated_scan import triton_kernels

        incoming = torch.empty_like(last)
        triton_kernels.combine[(self.blocks,)](
            last if initial is None else initial,
            last,
            product,
            incoming,
            self.n,
            self.chunks,
            BLOCK=BLOCK,
            UNROLL=UNROLL,
            HAS_INITIAL=initial is not None,
            REVERSE=reverse,
            num_warps=1,
        )
        return incoming


def scan_forward(
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor]:
    """h and the last state, as `gated_scan` says."""
    from pha.ops.gated_scan import triton_kernels

    launch, dtype = _Launch(value, form), accumulation_type(value)
    h = value.new_empty(value.shape)
    h_last = value.new_empty(launch.B, launch.n, dtype=dtype)
    gate, value = _rows(gate), _rows(value)
    a, b = (x.to(dtype).contiguous() for x in (a, b))
    initial = None if h0 is None else h0.to(dtype).contiguous()
    inputs = gate, *gate.stride()[:2], value, *value.stride()[:2], a, b
    flags = _flags(starts, h)

    def walk(initial: Tensor | None, last: Tensor, product: Tensor, summary: bool) -> None:
        launch.run(
            triton_kernels.forward,
            *inputs,
            a if initial is None else initial,
            flags,
            h,
            last,
            product,
            HAS_INITIAL=initial is not None,
            HAS_STARTS=starts is not None,
            SUMMARY=summary,
        )

    with on_device_of(value):
        if launch.chunks > 1:
            last, product = launch.partial(value), launch.partial(value)
            walk(None, last, product, True)
            initial = launch.combine(initial, last, product, reverse=False)
        walk(initial, h_last, h_last, False)
    return h, h_last


def scan_backward(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    gate: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dgate, dvalue, da, db and dh0, from what `scan_forward` took and returned.

    Without h0 dh0 is that of zeros.
    """
    from pha.ops.gated_scan import triton_kernels

    dgate, dvalue = gate.new_empty(gate.shape), value.new_empty(value.shape)
    launch, dtype = _Launch(h, form), dh_last.dtype
    dh, gate, value = _rows(dh), _rows(gate), _rows(value)
    decay, scale = (x.to(dtype).contiguous() for x in (a, b))
    incoming = dh_last.contiguous()
    initial = incoming if h0 is None else h0.to(dtype).contiguous()
    parts_a = launch.partial(h)
    parts_b = torch.empty_like(parts_a)
    leaving = torch.empty_like(incoming)
    flags = _flags(starts, h)
    with on_device_of(h):
        if launch.chunks > 1:
            last, product = torch.empty_like(parts_a), torch.empty_like(parts_a)
            launch.run(
                triton_kernels.backward_summary,
                dh,
                *dh.stride()[:2],
                decay,
                flags,
                last,
                product,
                HAS_STARTS=starts is not None,
            )
            incoming = launch.combine(incoming, last, product, reverse=True)
        launch.run(
            triton_kernels.backward,
            dh,
            *dh.stride()[:2],
            incoming,
            h,
            gate,
            *gate.stride()[:2],
            value,
            *value.stride()[:2],
            decay,
            scale,
            initial,
            flags,
            dgate,
            dvalue,
            parts_a,
            parts_b,
            leaving,
            HAS_H0=h0 is not None,
            HAS_STARTS=starts is not None,
        )
    da, db = (parts.sum((0, 1)).to(x.dtype) for parts, x in ((parts_a, a), (parts_b, b)))
    return dgate, dvalue, da, db, leaving if h0 is None else leaving.to(h0.dtype)
