"""Triton's scan as a backend, tried first: both forms against torch in float64."""

from __future__ import annotations

import functools

import torch

from pha.ops.backends import OPS, Trial
from pha.ops.gated_scan import triton as triton_scan
from pha.ops.gated_scan.closed_form import torch_backward
from pha.ops.gated_scan.naive import gated_scan_naive
from pha.ops.gated_scan.operator import gated_scan_operator
from pha.ops.gated_scan.sizes import sizes_of
from pha.ops.testing import largest_error, random_numbers


def _largest_error(device: torch.device) -> float:
    """Of both forms, relative to torch's operations in float64; two chunks where chunked."""
    normal, uniform = random_numbers(device)
    B, T, n = 2, sizes_of(device).shortest + 13, 19
    a = uniform(n)
    gate, value, b, h0 = normal(B, T, n), normal(B, T, n), normal(n), normal(B, n)
    starts = uniform(B, T) < 0.02
    dh, dh_last = normal(B, T, n), normal(B, n)
    inputs = gate, value, a, b, h0, starts
    results = []
    for form in ("sequential", "chunked"):
        h, h_last = triton_scan.scan_forward(*inputs, form)
        results += [h, h_last, *triton_scan.scan_backward(dh, dh_last, h, *inputs, form)]
    wide = gate.double(), value.double(), a.double(), b.double(), h0.double()
    states = gated_scan_naive(*wide, starts)
    gradients = torch_backward(dh.double(), dh_last.double(), states[0], *wide, starts)
    return largest_error(results, [*states, *gradients] * 2)


OPS["gated_scan"].add(
    "triton",
    functools.partial(gated_scan_operator, form="auto"),
    "cuda",
    Trial(_largest_error, 1e-5),  # as `pha doctor` has it
    "naive for one step",
    forward=triton_scan.scan_forward,
    backward=triton_scan.scan_backward,
)
