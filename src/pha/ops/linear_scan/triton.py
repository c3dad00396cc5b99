"""The linear scan by the kernels of the gated one, as a backend that is tried first."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pha.ops.backends import OPS, Trial
from pha.ops.gated_scan import triton as triton_scan
from pha.ops.gated_scan.sizes import sizes_of
from pha.ops.linear_scan import linear_scan_naive, linear_scan_operator, torch_backward
from pha.ops.testing import largest_error, random_numbers


def scan_forward(
    u: Tensor, a: Tensor, h0: Tensor | None, starts: Tensor | None, form: str
) -> tuple[Tensor, Tensor]:
    """h and the last state, as `linear_scan` says."""
    return triton_scan.scan_forward(u, a, None, None, h0, starts, form)


def scan_backward(
    dh: Tensor,
    dh_last: Tensor,
    h: Tensor,
    a: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    form: str,
) -> tuple[Tensor, ...]:
    """du, da and dh0, from what `scan_forward` took and returned; without h0 that of zeros."""
    return triton_scan.scan_backward(dh, dh_last, h, h, a, None, None, h0, starts, form)


def _largest_error(device: torch.device) -> float:
    """Of both forms, relative to torch's operations in float64; two chunks where chunked."""
    normal, uniform = random_numbers(device)
    B, T, n = 2, sizes_of(device).shortest + 13, 19
    u, a, h0 = normal(B, T, n), normal(B, T, n).tanh(), normal(B, n)
    starts = uniform(B, T) < 0.02
    dh, dh_last = normal(B, T, n), normal(B, n)
    results: list[Tensor] = []
    for form in ("sequential", "chunked"):
        h, h_last = scan_forward(u, a, h0, starts, form)
        results += [h, h_last, *scan_backward(dh, dh_last, h, a, h0, starts, form)]
    wide_u, wide_a, wide_h0 = u.double(), a.double(), h0.double()
    states = linear_scan_naive(wide_u, wide_a, wide_h0, starts)
    given = dh.double(), dh_last.double(), states[0], wide_a, wide_h0, starts
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
