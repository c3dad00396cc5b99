"""Attention within documents, windows and caches by PyTorch's FlexAttention, which skips the rest.

Scaled dot-product attention reads a mask in full and, with shared key heads, leaves its fast path.
FlexAttention's kernel visits only the blocks in which some query may see some key, and asks of each
pair in those that are not seen in full. What is asked follows from numbers of each token, so
nothing of the size of the logits is made, nor one bit for each of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pha.ops.backends import OPS, Trial
from pha.ops.testing import largest_error

BLOCK = 128  # tokens; with fewer queries there is nothing to skip
MOST_COMPILED = 64  # forms of the kernel in a process: of head sizes, types, masks, shapes


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """softmax(q k^T) v for the pairs that `blocks` names; shapes as in `attention`."""
    shared = q.shape[1] != k.shape[1]
    function: Any = flex_attention
    # In a graph of torch.compile it is compiled with everything else. On a CPU it has no compiled
    # backward pass; as it is, it writes the whole matrix out.
    if torch.compiler.is_compiling() or q.device.type == "cpu":
        return function(q, k, v, block_mask=blocks, scale=1.0, enable_gqa=shared)
    # One form more than the limit would be the whole matrix too, unless it must be compiled; and so
    # would be whatever those who have the layers run uncompiled for a while ask for.
    limit = torch._dynamo.config.patch(recompile_limit=MOST_COMPILED)
    with limit, torch.compiler.set_stance("default"):
        return _compiled(q, k, v, block_mask=blocks, scale=1.0, enable_gqa=shared)


def tried_flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """`flex`, whose kernel is tried first."""
    if q.is_cuda:  # elsewhere there is no kernel
        OPS["attention"].require("flex", q)
    return flex(q, k, v, blocks)


_compiled: Any = torch.compile(flex_attention, fullgraph=True)


def block_mask(
    query: Tensor,
    key: Tensor,
    document_starts: Tensor | None = None,
    token_mask: Tensor | None = None,
    window: int | None = None,
) -> BlockMask:
    """What `attention_mask` says of the same arguments; positions must grow.

    A block may be visited for nothing, but is only taken as seen in full where it is.
    """
    q, k = _Blocks(query), _Blocks(key)
    some = (k.low <= q.high[:, None]) & (k.high >= 0)
    whole = (k.high <= q.low[:, None]) & (k.low >= 0) & k.whole & q.whole[:, None]
    if window is not None:
        some = some & (k.high > q.low[:, None] - window)
        whole = whole & (k.low > q.high[:, None] - window)
    some, whole = some[None], whole[None]
    of_query = of_key = present = None
    if document_starts is not None:
        document = document_starts.cumsum(-1, dtype=torch.int32)
        of_query, of_key = document[:, query], document[:, key.clamp(0, document.shape[1] - 1)]
        first, last = q.ends(of_query, 2)
        first_key, last_key = k.ends(of_key, 1)
        some = some & (last_key >= first) & (first_key <= last)
        # Where some is seen, both are then of one document.
        whole = whole & (first == last) & (first_key == last_key)
    if token_mask is not None:
        present = token_mask[:, key.clamp(0, token_mask.shape[1] - 1)]
        in_blocks = F.pad(present, (0, -len(key) % BLOCK)).unflatten(1, (-1, BLOCK))
        itself = (k.low <= q.high[:, None]) & (k.high >= q.low[:, None])
        some = some & (in_blocks.any(2)[:, None] | itself)
        whole = whole & in_blocks.all(2)[:, None]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at, there = query[i], key[j]
        seen = (there <= at) & (there >= 0)
        if window is not None:
            seen = seen & (there > at - window)
        if of_query is not None and of_key is not None:
            seen = seen & (of_query[b, i] == of_key[b, j])
        if present is not None:
            seen = seen & (present[b, j] | (there == at))
        return seen

    partly, fully = (_ordered(x[:, None]) for x in (some & ~whole, some & whole))
    lengths = len(query), len(key)
    return BlockMask.from_kv_blocks(
        *partly, *fully, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=lengths
    )


class _Blocks:
    """The first and the last position of each block of tokens, and whether it is no rest."""

    def __init__(self, positions: Tensor) -> None:
        size = len(positions)
        self.first = torch.arange(0, size, BLOCK, device=positions.device)
        self.last = (self.first + BLOCK - 1).clamp(max=size - 1)
        self.low, self.high = positions[self.first], positions[self.last]
        self.whole = self.last - self.first == BLOCK - 1

    def ends(self, rows: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """What `rows` (B, N) say of both ends of each block, with a new axis."""
        return rows[:, self.first].unsqueeze(axis), rows[:, self.last].unsqueeze(axis)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the last axis are true, and their places before those of the others."""
    places = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), places.to(torch.int32)


def _largest_error(device: torch.device) -> float:
    """Relative, of values and gradients in bfloat16 on a small problem."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((2, 4, 160, 60), (2, 2, 160, 60), (2, 2, 160, 60))
    leaves = [torch.randn(s, generator=generator, device=device) for s in shapes]
    places = torch.arange(160, device=device)
    starts = (places % 50 == 0).expand(2, -1)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = ((x * 0.3).to(torch.bfloat16).to(dtype).requires_grad_() for x in leaves)
        if dtype == torch.bfloat16:
            y = flex(q, k, v, block_mask(places, places, starts))
        else:
            document = starts.cumsum(-1)
            mask = (document[:, None, :, None] == document[:, None, None]).tril()
            logits = q @ k.repeat_interleave(2, 1).mT
            y = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        gradients = torch.autograd.grad(y.float().square().sum(), (q, k, v))
        results.append([x.detach().float() for x in (y, *gradients)])
    return largest_error(*results)


TRIAL = Trial(_largest_error, 1e-2)
