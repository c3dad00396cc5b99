"""Whether Triton's scan can be used on a device: found out once in each process, by trying."""

from __future__ import annotations

import torch
from torch import Tensor

from pha.ops.backends import find_fault
from pha.ops.gated_scan import triton as triton_scan
from pha.ops.gated_scan.closed_form import torch_backward
from pha.ops.gated_scan.naive import gated_scan_naive
from pha.ops.testing import largest_error

TOLERANCE = 1e-5  # Of the largest magnitude, in float32 against float64; as `pha doctor` has it.
_FAULTS: dict[torch.device, str | None] = {}


def usable(device: torch.device) -> bool:
    """Whether the kernels run on `device` and agree with torch there.

    Not while a CUDA graph is being recorded, which cannot wait for the device: then the answer is
    yes, and the comparison comes later.
    """
    recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (recording and device not in _FAULTS) or fault(device) is None


def fault(device: torch.device) -> str | None:
    """Why torch computes in place of the kernels; None if it does not.

    The first question on a device compiles the kernels and compares them, and waits for the device.
    """
    if device not in _FAULTS:
        _FAULTS[device] = find_fault(
            lambda: _largest_error(device),
            TOLERANCE,
            "scans run many times slower, in torch alone, because Triton cannot be used",
        )
    return _FAULTS[device]


def _largest_error(device: torch.device) -> float:
    """Of both forms, relative to torch's operations in float64; two chunks where chunked."""
    generator = torch.Generator().manual_seed(0)
    B, T, n = 2, triton_scan.SHORTEST + 13, 19

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    a = torch.rand(n, generator=generator).to(device)
    gate, value, b, h0 = normal(B, T, n), normal(B, T, n), normal(n), normal(B, n)
    starts = (torch.rand(B, T, generator=generator) < 0.02).to(device)
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
