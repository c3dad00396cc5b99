"""torch.compile block by block: one graph serves every block of a kind, so compiling is short."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def compile_blocks(model: PreTrainedModel, **options: Any) -> None:
    """Compile each repeated block of the model in place; embedding, head and loss stay eager.

    Blocks of one kind have the same code and the same shapes, so they share graphs: one for each
    shape of the input and for each of training and inference. A block that does not make one graph
    is an error, not a slower block.

    Args:
        model: ours or any of transformers; its blocks are the modules that it says never to split.
        options: for `torch.compile`.
    """
    kinds = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.compile(**{"dynamic": False, "fullgraph": True} | options)
