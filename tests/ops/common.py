"""What the tests of all ops share: which backends run here, values with all gradients, errors.

Triton's kernels run on a GPU or, where TRITON_INTERPRET=1, in Triton's interpreter on the CPU;
`test_triton.py` runs the marked tests there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.ops import OPS
from pha.ops.attention import attention_mask

Inputs = dict[str, Any]
Function = Callable[..., Any]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernels = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not INTERPRETED,
        reason="needs a CUDA device or Triton's interpreter",
    ),
]
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def with_marks(name: str, *values: Any) -> Any:
    """A parameter set that begins with a backend: where Triton runs, if it is one of Triton's."""
    return pytest.param(name, *values, marks=kernels if is_triton(name) else [])


def is_triton(backend: str) -> bool:
    return backend.startswith("triton")


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if is_triton(backend) and torch.cuda.is_available() else "cpu")


def cpu_backends(op: str) -> list[str]:
    """The oracle first, then the others, none of Triton's."""
    names = [name for name in OPS[op].backends if OPS[op].runs_on(name, "cpu")]
    return sorted(names, key=lambda name: (name != "naive", name))


def outcome(
    function: Function, inputs: Inputs, wanted: str | None = None, scale: float = 1.0
) -> dict[str, Tensor]:
    """All outputs and the gradients of a fixed weighting of them, as float64 on the CPU.

    A scalar is differentiated as it is. The first output is called y, a second one `last`; the
    gradient of an input has a d before its name. Inputs are given as they lie in memory; none may
    be written to, and outputs may share no memory.

    Args:
        function: takes `inputs` by name; returns a tensor or several.
        inputs: tensors and whatever else it takes.
        wanted: the one input to differentiate; all of floating type when absent.
        scale: of the gradient that comes from above.
    """
    leaves = {
        name: x.detach().requires_grad_()
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point() and wanted in (None, name)
    }
    before = {name: x.detach().clone() for name, x in inputs.items() if isinstance(x, Tensor)}
    outputs = function(**(inputs | leaves))
    outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]
    places = [x.untyped_storage().data_ptr() for x in outputs if x.numel()]
    assert len(set(places)) == len(places)
    generator = torch.Generator().manual_seed(7)
    # Rounded to bfloat16, so that every precision is given the same upstream gradient exactly.
    weights = [
        (torch.randn(x.shape, generator=generator) if x.dim() else torch.ones(())).bfloat16()
        for x in outputs
    ]
    total = sum(
        (x.double() * w.double().to(x.device)).sum() for x, w in zip(outputs, weights, strict=True)
    )
    gradients = torch.autograd.grad(scale * total, list(leaves.values()))
    for name, x in before.items():
        assert torch.equal(inputs[name], x), f"{name} was written to"
    results = dict(zip(("y", "last"), outputs, strict=False))
    results |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach().double().cpu() for name, x in results.items()}


def magnitudes(results: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(x.abs().max().clamp_min(1e-30)) for name, x in results.items()}


def errors(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    sizes: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The largest error of each tensor over its size: its largest magnitude unless given.

    What is not a number is wrong by infinity, as a largest value would pass over it.
    """
    assert actual.keys() == expected.keys()
    sizes = magnitudes(expected) | dict(sizes or {})
    wrong = {name: (actual[name] - y).abs().nan_to_num(torch.inf) for name, y in expected.items()}
    return {name: float(x.max()) / sizes[name] for name, x in wrong.items()}


def worst(*arguments: Any) -> float:
    return max(errors(*arguments).values())


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same numbers in another type, where they are of floating type."""
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def is_rounded_once(actual: Tensor, exact: Tensor, slack: float) -> bool:
    """Whether each element is within half a unit of bfloat16, and `slack` of the largest."""
    wrong = (actual - exact).abs() - 2**-8 * exact.abs()
    return float(wrong.max()) <= slack * float(exact.abs().max())


def in_pieces(
    function: Function, lengths: list[int], over_time: tuple[str, ...], h0: str = "h0"
) -> Function:
    """A recurrence over pieces of time, whose first state is called `h0`.

    With `starts` among the inputs the state is carried from piece to piece. Without, each piece is
    a document of its own.
    """

    def run(**inputs: Any) -> tuple[Tensor, Tensor]:
        pieces = {name: inputs[name].split(lengths, 1) for name in over_time if name in inputs}
        state, outputs = inputs.get(h0), []
        for i in range(len(lengths)):
            y, last = function(**(inputs | {k: x[i] for k, x in pieces.items()} | {h0: state}))
            state = last if "starts" in inputs else None
            outputs.append(y)
        return torch.cat(outputs, 1), last

    return run


def starts_of(lengths: list[int]) -> Tensor:
    """(1, T) bool, true where a document of one of these lengths begins."""
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, [sum(lengths[:i]) for i in range(len(lengths))]] = True
    return starts


def mask_of(
    T: int, S: int, starts: Tensor | None = None, tokens: Tensor | None = None
) -> Tensor | None:
    """What the last T of S positions may attend to; None where causality says it all."""
    key = torch.arange(S)
    if starts is None and tokens is None:
        return None
    return attention_mask(key[S - T :], key, starts, tokens)


def gradcheck(function: Function, inputs: Inputs, atol: float = 1e-7) -> None:
    """Hold all gradients to central differences, together: in float64, with a step of 1e-6."""
    names = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    assert torch.autograd.gradcheck(
        lambda *x: function(**(inputs | dict(zip(names, x, strict=True)))),
        [inputs[name].clone().requires_grad_() for name in names],
        eps=1e-6,
        atol=atol,
        rtol=1e-7,
    )
