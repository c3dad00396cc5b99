"""torch.compile block by block: one graph serves every block of a kind, so compiling is short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._dynamo.exc import TorchDynamoException

from pha.utils.errors import PHAError


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model of ours or of transformers: what it says never to split.

    Raises:
        PHAError: it has none.
    """
    kinds = {
        name for each in model.modules() for name in getattr(each, "_no_split_modules", None) or ()
    }
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise PHAError(f"{type(model).__name__} does not say what its blocks are")
    return blocks


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each repeated block of the model in place; embedding, head and loss stay eager.

    Blocks of one kind have the same code and the same shapes, so they share graphs: one for each
    shape of the input and for each of training and inference. A block that does not make one graph
    is an error where it first runs, not a slower block; see `compile_errors`.

    Args:
        model: ours or any of transformers.
        options: for `torch.compile`.

    Raises:
        PHAError: see `blocks_of`.
    """
    for block in blocks_of(model):
        block.compile(**{"dynamic": False, "fullgraph": True} | options)


@contextmanager
def compile_errors(option: str) -> Iterator[None]:
    """Say in one line what does not compile, and to leave out the option that asked for it.

    Raises:
        PHAError: torch cannot make one graph of a block, or was asked for too many shapes.
    """
    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise PHAError(
            f"{option}: a layer does not compile ({type(error).__name__}: {reason}); "
            f"leave {option} out"
        ) from error
