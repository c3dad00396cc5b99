"""Whether Triton's scan can be used on a device: found out once in each process, by trying."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from pha.ops.gated_scan import triton as triton_scan
from pha.ops.testing import largest_error

TOLERANCE = 1e-5  # Of the largest magnitude, in float32 against float64; as `pha doctor` has it.
_FAULTS: dict[torch.device, str | None] = {}


def usable(device: torch.device) -> bool:
    """Whether the kernels run on `device` and agree with torch there.

    The first question on a device compiles the kernels and compares them, and waits for the device;
    not while a CUDA graph is being recorded, when the answer is yes and the comparison comes later.
    The answer no is announced with a RuntimeWarning.
    """
    if device not in _FAULTS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True
        _FAULTS[device] = _fault(device)
    reason = _FAULTS[device]
    if reason is not None:
        _warn(reason)
    return reason is None


def fault(backend: str, device_type: str) -> str | None:
    """Why torch computes in place of a `backend` on the current device; None if it does not.

    Only Triton's can have a fault of this kind.
    """
    if not backend.startswith("triton"):
        return None
    device = torch.empty(0, device=device_type).device
    if device not in _FAULTS:
        _FAULTS[device] = _fault(device)
    return _FAULTS[device]


def _fault(device: torch.device) -> str | None:
    try:
        from triton.runtime import JITFunction

        from pha.ops.gated_scan import triton_kernels

        if device.type != "cuda" and isinstance(triton_kernels.forward, JITFunction):
            return f"it does not run on {device.type}"
        off = [_largest_error(device, form) for form in ("sequential", "chunked")]
    except Exception as error:  # Whatever it is, the same can be computed with torch.
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if not all(error <= TOLERANCE for error in off):
        return f"its self-check is off by {max(off):.1g}"
    return None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"scans run many times slower, in torch alone, because Triton cannot be used ({reason}); "
        "see pha doctor",
        RuntimeWarning,
        stacklevel=2,
    )


def _largest_error(device: torch.device, form: str) -> float:
    """Of the kernels, relative to torch's operations in float64; two chunks where chunked."""
    from pha.ops.gated_scan.closed_form import torch_backward
    from pha.ops.gated_scan.naive import gated_scan_naive

    generator = torch.Generator().manual_seed(0)
    B, T, n = 2, triton_scan.SHORTEST + 13, 19

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    a = torch.rand(n, generator=generator).to(device)
    gate, value, b, h0 = normal(B, T, n), normal(B, T, n), normal(n), normal(B, n)
    starts, mask = ((torch.rand(B, T, generator=generator) < p).to(device) for p in (0.02, 0.9))
    dh, dh_last = normal(B, T, n), normal(B, n)
    h, h_last = triton_scan.scan_forward(gate, value, a, b, h0, starts, mask, form)
    gradients = triton_scan.scan_backward(dh, dh_last, h, gate, value, a, b, h0, starts, mask, form)
    dh, dh_last, gate, value, a, b, h0 = (x.double() for x in (dh, dh_last, gate, value, a, b, h0))
    states = gated_scan_naive(gate, value, a, b, h0, starts, mask)
    expected = torch_backward(dh, dh_last, states[0], gate, value, a, b, h0, starts, mask)
    return largest_error((h, h_last, *gradients), (*states, *expected))
