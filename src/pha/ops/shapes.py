"""One check of what goes together, for every op."""

from __future__ import annotations

from torch import Tensor

from pha.utils.errors import PHAError


def require_shapes(
    op: str, to: str, tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]]
) -> None:
    """Refuse what has another shape than goes with the input called `to`.

    Args:
        op: its name.
        to: the input from which the shapes are.
        tensors: name -> what was given, None where nothing was, and the shape that it must have.

    Raises:
        PHAError: naming the first that does not fit, with both shapes.
    """
    for name, (given, shape) in tensors.items():
        if given is not None and given.shape != shape:
            raise PHAError(f"{op}: {name} is {tuple(given.shape)}; {shape} goes with {to}")
