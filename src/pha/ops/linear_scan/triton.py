"""The linear scan on a GPU: Triton's kernels, cut and launched as those of the gated scan.

Bytes moved, in units of B * T * n elements: the sequential form reads u and a and writes h; its
backward reads dh, a and h and writes du and da. The chunked form reads u and a, or dh and a, twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pha.ops.backends import OPS, Trial, on_device_of
from pha.ops.gated_scan.sizes import Sizes, sizes_of
from pha.ops.gated_scan.triton import Launch, flags_of, is_paired, rows_of
from pha.ops.linear_scan import linear_scan_naive, linear_scan_operator, torch_backward
from pha.ops.precision import accumulation_type
from pha.ops.testing import largest_error


def scan_forward(
    u: Tensor,
    a: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    form: str,
    sizes: Sizes | None = None,
) -> tuple[Tensor, Tensor]:
    """h and the last state, as `linear_scan` says; `sizes` are those of the device when absent."""
    from pha.ops.linear_scan import triton_kernels

    launch, dtype = Launch(u, form, sizes), accumulation_type(u)
    h = u.new_empty(u.shape)
    h_last = u.new_empty(launch.B, launch.n, dtype=dtype)
    u, a = rows_of(u), rows_of(a)
    initial = None if h0 is None else h0.to(dtype).contiguous()
    flags, paired = flags_of(starts, h), is_paired(u, a)

    def walk(initial: Tensor | None, last: Tensor, product: Tensor, summary: bool) -> None:
        launch.run(
            triton_kernels.forward,
            *(u, *u.stride()[:2], a, *a.stride()[:2]),
            *(h_last if initial is None else initial, flags, h, last, product),
            PAIRED=paired,
            HAS_INITIAL=initial is not None,
            HAS_STARTS=starts is not None,
            SUMMARY=summary,
        )

    with on_device_of(u):
        if launch.chunks > 1:
            last, product = launch.partial(u), launch.partial(u)
            walk(None, last, product, True)
            initial = launch.combine(initial, last, product, reverse=False)
        walk(initial, h_last, h_last, False)
    return h, h_last


def scan_backward(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    a: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    form: str,
    sizes: Sizes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """du, da and dh0, from what `scan_forward` took and returned; without h0 that of zeros."""
    from pha.ops.linear_scan import triton_kernels

    du, da = h.new_empty(h.shape), a.new_empty(a.shape)
    launch, dtype = Launch(h, form, sizes), dh_last.dtype
    dh, a = rows_of(dh), rows_of(a)
    incoming = dh_last.contiguous()
    initial = incoming if h0 is None else h0.to(dtype).contiguous()
    leaving = torch.empty_like(incoming)
    flags, paired = flags_of(starts, h), is_paired(dh, a)

    def walk(incoming: Tensor, leaving: Tensor, product: Tensor, summary: bool) -> None:
        launch.run(
            triton_kernels.backward,
            *(dh, *dh.stride()[:2], incoming, h, a, *a.stride()[:2]),
            *(initial, flags, du, da, leaving, product),
            PAIRED=paired,
            HAS_H0=h0 is not None,
            HAS_STARTS=starts is not None,
            SUMMARY=summary,
        )

    with on_device_of(h):
        if launch.chunks > 1:
            last, product = launch.partial(h), launch.partial(h)
            walk(incoming, last, product, True)
            incoming = launch.combine(incoming, last, product, reverse=True)
        walk(incoming, leaving, leaving, False)
    return du, da, leaving if h0 is None else leaving.to(h0.dtype)


def _largest_error(device: torch.device) -> float:
    """Of both forms, relative to torch's operations in float64; two chunks where chunked."""
    generator = torch.Generator().manual_seed(0)
    B, T, n = 2, sizes_of(device).shortest + 13, 19

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    u, a, h0 = normal(B, T, n), normal(B, T, n).sigmoid(), normal(B, n)
    starts = (torch.rand(B, T, generator=generator) < 0.02).to(device)
    dh, dh_last = normal(B, T, n), normal(B, n)
    results: list[Tensor] = []
    for form in ("sequential", "chunked"):
        h, h_last = scan_forward(u, a, h0, starts, form)
        results += [h, h_last, *scan_backward(dh, dh_last, h, a, h0, starts, form)]
    wide: Callable[[Tensor], Tensor] = Tensor.double
    states = linear_scan_naive(wide(u), wide(a), wide(h0), starts)
    given = wide(dh), wide(dh_last), states[0], wide(a), wide(h0), starts
    return largest_error(results, [*states, *torch_backward(*given)] * 2)


OPS["linear_scan"].add(
    "triton",
    functools.partial(linear_scan_operator, form="auto"),
    "cuda",
    Trial(_largest_error, 1e-5),
    "naive for one step; not yet timed on a GPU",
    if_asked=True,
    forward=scan_forward,
    backward=scan_backward,
)
