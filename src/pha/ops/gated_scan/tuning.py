"""A sweep over the sizes of Triton's scan on one device, in one process.

On a CPU, in Triton's interpreter, it can be rehearsed; times mean nothing there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from pha.ops.gated_scan import triton as triton_scan
from pha.ops.gated_scan.closed_form import torch_backward, torch_forward
from pha.ops.gated_scan.sizes import Sizes
from pha.ops.testing import largest_error
from pha.utils.errors import PHAError
from pha.utils.hardware import default_device, seconds_of

REPEATS = 10  # calls between two waits for the device, so that the host can run ahead
# Kernels that are compiled, and with the best of them, the programs that are aimed at.
WALKS = [
    Sizes(block=block, unroll=unroll, stages=stages)
    for block in (64, 128)
    for unroll, stages in ((4, 3), (4, 5), (8, 2), (8, 3), (8, 4), (16, 2), (16, 3))
]
PROGRAMS = [(4, 3), (4, 5), (8, 3), (8, 8), (16, 5), (16, 8)]


def sweep(
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 0.05,
    *,
    walks: Sequence[Sizes] = WALKS,
    device: torch.device | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], Sizes]:
    """Measure forward and backward with every size, first those of the kernels, then the programs.

    Args:
        shapes: (B, T, n) of the problems.
        dtype: of gate and value.
        seconds: of measuring each size on each shape, after one call to warm up; at least one call.
        walks: the sizes of the kernels to try.
        device: where; by default the GPU, if there is one.
        progress: is told of each size.

    Returns:
        Rows, one for each size and shape: `sizes`, `shape`, `seconds` of one forward and backward
        (the median), `error` against torch's form relative to the largest magnitude, and where it
        failed or was wrong `reason` and no `seconds`. And the sizes with the least seconds in the
        geometric mean over all shapes.

    Raises:
        PHAError: no size works on all shapes.
    """
    device = device or default_device()
    problems = [_Problem(shape, dtype, device) for shape in shapes]
    rows: list[dict[str, Any]] = []

    def best(candidates: Iterable[Sizes]) -> Sizes:
        for sizes in candidates:
            progress(" ".join(f"{name} {value}" for name, value in asdict(sizes).items()))
            rows.extend(problem.measure(sizes, seconds) for problem in problems)
        found: dict[Sizes, list[Any]] = {}
        for row in rows:
            found.setdefault(Sizes(**row["sizes"]), []).append(row["seconds"])
        whole = {
            sizes: statistics.fmean(map(math.log, times))
            for sizes, times in found.items()
            if None not in times
        }
        if not whole:
            raise PHAError(f"no size of the scan works on all shapes: {rows[-1]['reason']}")
        return min(whole, key=whole.__getitem__)

    walk = best(walks)
    return rows, best(replace(walk, wanted=wanted, enough=enough) for wanted, enough in PROGRAMS)


class _Problem:
    """Random inputs of one shape, and what torch computes of them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
        B, T, n = self.shape = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device)

        gate, value, self.dh = (normal(B, T, n).to(dtype) for _ in range(3))
        self.inputs = gate, value, torch.rand(n, generator=generator, device=device), normal(n)
        self.dh_last = normal(B, n)
        self.limit = 1e-5 if dtype == torch.float32 else 2e-2
        gate, value, a, b = (x.float() for x in self.inputs)
        h, last = torch_forward(gate, value, a, b, None, None)
        gradients = torch_backward(self.dh.float(), self.dh_last, h, gate, value, a, b, None, None)
        self.expected = h, last, *gradients

    def run(self, sizes: Sizes) -> tuple[Tensor, ...]:
        """All outputs and gradients."""
        given = *self.inputs, None, None, "auto", sizes
        h, last = triton_scan.scan_forward(*given)
        return h, last, *triton_scan.scan_backward(self.dh, self.dh_last, h, *given)

    def measure(self, sizes: Sizes, seconds: float) -> dict[str, Any]:
        """The row of one size."""
        row: dict[str, Any] = {"sizes": asdict(sizes), "shape": list(self.shape)}
        row |= {"seconds": None, "error": None, "reason": None}
        try:
            row["error"] = error = largest_error(self.run(sizes), self.expected)
            if not error <= self.limit:
                return row | {"reason": f"it is off by {error:.1g}"}
            return row | {"seconds": self._time(sizes, seconds)}
        except Exception as failure:  # Whatever the compiler says, the other sizes remain.
            # Triton writes the source first and what is wrong with it last.
            said = " ".join(str(failure).split())[-200:]
            return row | {"reason": f"{type(failure).__name__}: {said}"}

    def _time(self, sizes: Sizes, seconds: float) -> float:
        device = self.dh.device
        repeats = REPEATS if device.type == "cuda" else 1

        def work() -> None:
            for _ in range(repeats):
                self.run(sizes)

        times: list[float] = []
        while not times or sum(times) < seconds:
            times.append(seconds_of(work, device))
        return statistics.median(times) / repeats
