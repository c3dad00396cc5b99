"""A decoding step as a CUDA graph: hundreds of small kernels started by one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache

WARM_UP = 3


def cache_tensors(cache: Cache) -> list[Tensor]:
    """Every tensor that a static cache keeps: keys, values, recurrent states, lengths."""

    def inside(value: object) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            for item in value.values():
                yield from inside(item)

    return [tensor for layer in cache.layers for x in vars(layer).values() for tensor in inside(x)]


class GraphedStep:
    """Tokens in, logits out, on a static cache that has read its prompt; replayed from a graph.

    Args:
        read: (B, V) logits of tokens (B, 1), which it adds to the cache without asking the host.
        token: (B, 1), of the shape that all will have.
        cache: the cache; afterwards it is as it was.
    """

    def __init__(self, read: Callable[[Tensor], Tensor], token: Tensor, cache: Cache) -> None:
        self.token = token.clone()
        state = cache_tensors(cache)
        before = [tensor.clone() for tensor in state]

        def restore() -> None:
            for tensor, saved in zip(state, before, strict=True):
                tensor.copy_(saved)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                restore()
                read(self.token)
            restore()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = read(self.token)

    def __call__(self, token: Tensor) -> Tensor:
        """(B, V) logits, which the next call overwrites."""
        self.token.copy_(token)
        self.graph.replay()
        return self.logits
