"""When a number stops being one: find where it happened first. What cannot be repeated: refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pha.train.sharding import whole
from pha.utils.errors import PHAError


def first_bad_gradient(model: nn.Module) -> str | None:
    """Name of the first parameter whose gradient is not finite, in the model's own order."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(whole(parameter.grad).isfinite().all()):
            return f"the gradient of {name}"
    return None


def first_bad_value(model: nn.Module, **inputs: Any) -> str | None:
    """Name of the first parameter, or else of the first module's output, that is not finite.

    The forward pass is repeated without gradients, on the model as it was when the loss went bad.
    """
    for name, parameter in model.named_parameters():
        if not bool(whole(parameter).isfinite().all()):
            return f"the weight {name}"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            bad = isinstance(output, Tensor) and not bool(output.isfinite().all())
            if bad and not found:
                found.append(f"the output of {name}")

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(watch(name)))
        model(**inputs)
    return found[0] if found else None


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Where it is wanted, let torch run deterministic kernels only inside the block.

    Raises:
        PHAError: something has none here.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        what = " ".join(str(error).split()).split(". ")[0]
        raise PHAError(
            f"run.deterministic: {what}; leave run.deterministic out, or train on a CPU"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
