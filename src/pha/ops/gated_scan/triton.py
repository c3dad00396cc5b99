"""The gated scan, and the linear one, on a GPU: what Triton's kernels are given, and in which form.

`operator.py`, and `linear_scan`, make opaque operators of torch of these functions. There is
nothing around a scan to fuse with it, and an operator may check itself at its first use. Grids
follow from shapes alone and nothing waits for the device, so that CUDA graphs can record them.

Bytes moved, in units of B * T * n elements: the sequential form reads gate and value and writes h
(3); its backward reads dh, h, gate and value and writes dgate and dvalue (6). The chunked form
reads gate and value, or dh, once more (5 and 7), from the L2 cache where they fit in it. The linear
scan has what is added in the place of gate and decays in the place of value; its backward reads one
fewer, and one more where it is chunked.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pha.ops.backends import on_device_of
from pha.ops.gated_scan.sizes import Sizes, sizes_of
from pha.ops.precision import accumulation_type


def chunk_length(B: int, T: int, n: int, processors: int, form: str, sizes: Sizes) -> int:
    """Steps of a chunk: T for the sequential form.

    Args:
        B: batch.
        T: steps.
        n: states.
        processors: SMs of the device.
        form: `"sequential"`, `"chunked"` or `"auto"`, which takes the chunked form where the
            programs of the sequential one, B * ceil(n / block), are not enough.
        sizes: of programs and chunks.
    """
    programs = B * -(-n // sizes.block)
    if form == "sequential" or (form == "auto" and programs >= sizes.enough * processors):
        return T
    chunks = -(-sizes.wanted * processors // max(1, programs))
    if form == "chunked":
        chunks = max(chunks, 2)
    steps = -(-T // chunks)
    return min(T, max(sizes.shortest, -(-steps // sizes.unroll) * sizes.unroll))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: Tensor) -> Tensor:
    """`x` (B, T, n) itself where its states are adjacent and can be loaded in pairs, else a copy.

    A pair of two bytes each begins at a multiple of four bytes. Nothing smaller is loaded ahead of
    its use, so rows are copied that have no pairs though n is even. An odd n has none in any case.
    """
    adjacent = x.stride(2) == 1 or x.shape[2] == 1
    odd = x.stride(0) % 2 or x.stride(1) % 2 or x.data_ptr() % 4
    if adjacent and not (odd and x.shape[2] % 2 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _paired(*rows: Tensor) -> bool:
    """Whether the compiler must be told of pairs: there are, and it sees no multiples of 16."""
    n = rows[0].shape[2]
    numbers = (y for x in rows for y in (n, *x.stride()[:2], x.data_ptr()))
    return n % 2 == 0 and any(y % 16 for y in numbers)


def _flags(x: Tensor | None, absent: Tensor) -> Tensor:
    """Starts as bytes; any tensor stands for none."""
    return absent if x is None else x.contiguous().view(torch.uint8)


class _Launch:
    """The grid of one problem, and what all its launches have in common."""

    def __init__(self, x: Tensor, form: str, sizes: Sizes | None) -> None:
        sizes = sizes or sizes_of(x.device)
        self.B, self.T, self.n = x.shape
        self.length = chunk_length(self.B, self.T, self.n, _processors(x.device), form, sizes)
        self.chunks = -(-self.T // max(1, self.length))
        self.blocks = self.B * -(-self.n // sizes.block)
        self.extents = self.T, self.n, self.chunks, self.length
        self.cut = {"BLOCK": sizes.block, "UNROLL": sizes.unroll, "num_warps": 1}
        self.walk = self.cut | {"STAGES": sizes.stages}

    def partial(self, x: Tensor) -> Tensor:
        """(B, chunks, n), empty, in the type of the states."""
        return x.new_empty(self.B, self.chunks, self.n, dtype=accumulation_type(x))

    def run(self, kernel: Any, *arguments: Any, **flags: Any) -> None:
        """Launch a kernel that walks: a program for each chunk and block of states."""
        kernel[(self.blocks * self.chunks,)](*arguments, *self.extents, **self.walk, **flags)

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
            HAS_INITIAL=initial is not None,
            REVERSE=reverse,
            **self.cut,
        )
        return incoming


def scan_forward(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    h0: Tensor | None,
    starts: Tensor | None,
    form: str,
    sizes: Sizes | None = None,
) -> tuple[Tensor, Tensor]:
    """h and the last state, as `gated_scan` says of gate x, value y, a and b; or `linear_scan`.

    That has x for what is added, y for the decays, and neither a nor b. `sizes` are those of the
    device when absent.
    """
    from pha.ops.gated_scan import triton_kernels

    launch, dtype = _Launch(x, form, sizes), accumulation_type(x)
    h = x.new_empty(x.shape)
    h_last = x.new_empty(launch.B, launch.n, dtype=dtype)
    x, y = _rows(x), _rows(y)
    constants = [h_last if c is None else c.to(dtype).contiguous() for c in (a, b)]
    initial = None if h0 is None else h0.to(dtype).contiguous()
    flags, paired = _flags(starts, h), _paired(x, y)

    def walk(initial: Tensor | None, last: Tensor, product: Tensor, summary: bool) -> None:
        launch.run(
            triton_kernels.forward,
            *(x, *x.stride()[:2], y, *y.stride()[:2], *constants),
            *(h_last if initial is None else initial, flags, h, last, product),
            PAIRED=paired,
            HAS_INITIAL=initial is not None,
            HAS_STARTS=starts is not None,
            SUMMARY=summary,
            GATED=a is not None,
        )

    with on_device_of(x):
        if launch.chunks > 1:
            last, product = launch.partial(x), launch.partial(x)
            walk(None, last, product, True)
            initial = launch.combine(initial, last, product, reverse=False)
        walk(initial, h_last, h_last, False)
    return h, h_last


def scan_backward(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    h0: Tensor | None,
    starts: Tensor | None,
    form: str,
    sizes: Sizes | None = None,
) -> tuple[Tensor, ...]:
    """dx, dy, da, db and dh0, from what `scan_forward` took and returned; dx, dy, dh0 without a, b.

    Without h0 dh0 is that of zeros. Of x the linear scan looks at the type alone.
    """
    from pha.ops.gated_scan import triton_kernels

    dx, dy = x.new_empty(h.shape), y.new_empty(h.shape)
    launch, dtype = _Launch(h, form, sizes), dh_last.dtype
    dh, y = _rows(dh), _rows(y)
    x = y if a is None else _rows(x)
    incoming = dh_last.contiguous()
    constants = [incoming if c is None else c.to(dtype).contiguous() for c in (a, b)]
    initial = incoming if h0 is None else h0.to(dtype).contiguous()
    parts_a, parts_b = (incoming if c is None else launch.partial(h) for c in (a, b))
    leaving = torch.empty_like(incoming)
    flags, paired = _flags(starts, h), _paired(dh, x, y)
    kind = {"PAIRED": paired, "HAS_STARTS": starts is not None, "GATED": a is not None}
    with on_device_of(h):
        if launch.chunks > 1:
            last, product = launch.partial(h), launch.partial(h)
            decay = (y, *y.stride()[:2]) if a is None else (constants[0], 0, 0)
            launch.run(
                triton_kernels.backward_summary,
                *(dh, *dh.stride()[:2], *decay, flags, last, product),
                **kind,
            )
            incoming = launch.combine(incoming, last, product, reverse=True)
        launch.run(
            triton_kernels.backward,
            *(dh, *dh.stride()[:2], incoming, h, x, *x.stride()[:2], y, *y.stride()[:2]),
            *(*constants, initial, flags, dx, dy, parts_a, parts_b, leaving),
            HAS_H0=h0 is not None,
            **kind,
        )
    both = ((parts_a, a), (parts_b, b))
    sums = (parts.sum((0, 1)).to(c.dtype) for parts, c in both if c is not None)
    return dx, dy, *sums, leaving if h0 is None else leaving.to(h0.dtype)
