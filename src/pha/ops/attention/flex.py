"""Attention within documents and windows by PyTorch's FlexAttention, which skips what is masked.

Scaled dot-product attention reads a mask in full and, with shared key heads, leaves its fast path.
FlexAttention compiles a kernel that visits only the blocks in which some query sees some key.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from pha.ops.backends import OPS, Trial
from pha.ops.testing import largest_error

SHORTEST = 128  # tokens, the size of a block; with fewer there is nothing to skip

_masks = WeakTensorKeyDictionary()


def serves(q: Tensor, k: Tensor, mask: Tensor | None, window: int | None) -> bool:
    """Whether this is a whole sequence with documents or a window, on a device with kernels."""
    T, S = q.shape[2], k.shape[2]
    bounded = mask is not None or (window is not None and window < S)
    if not bounded or T < SHORTEST or S != T or q.device.type != "cuda":
        return False
    OPS["attention"].require("flex", q)
    return True


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int | None) -> Tensor:
    """softmax(q k^T) v where the mask, the window and causality allow; shapes as in `attention`."""
    # In a graph of torch.compile it is compiled with everything else.
    compiling = torch.compiler.is_compiling()
    function: Any = flex_attention if compiling else _compiled(q.device.type)
    blocks = block_mask(mask, window, q.shape[2], k.shape[2], q.device)
    gqa = q.shape[1] != k.shape[1]
    return function(q, k, v, block_mask=blocks, scale=1.0, enable_gqa=gqa)


@functools.cache
def _compiled(device_type: str) -> Any:
    # On a CPU it has no compiled backward pass; as it is, it writes the whole matrix out.
    function: Any = flex_attention
    return function if device_type == "cpu" else torch.compile(function)


def block_mask(
    mask: Tensor | None, window: int | None, queries: int, keys: int, device: torch.device
) -> BlockMask:
    """Which blocks of the last `queries` of `keys` positions are needed, and which in full.

    All layers share a mask, so the blocks of each are found once and kept for as long as it lives.
    """
    if torch.compiler.is_compiling():
        return _make(mask, window, queries, keys, device)
    if mask is None:
        return _unmasked(window, queries, keys, device)
    kept: dict[int | None, BlockMask] = _masks.setdefault(mask, {})
    if window not in kept:
        kept[window] = _make(mask, window, queries, keys, device)
    return kept[window]


@functools.lru_cache(maxsize=8)
def _unmasked(window: int | None, queries: int, keys: int, device: torch.device) -> BlockMask:
    # An evaluation may be the first to ask; what is made in inference mode could not train.
    with torch.inference_mode(False):
        return _make(None, window, queries, keys, device)


def _make(
    mask: Tensor | None, window: int | None, queries: int, keys: int, device: torch.device
) -> BlockMask:
    past = keys - queries
    # Not the tensor that is the key under which the blocks are kept: it would never go.
    allowed = None if mask is None else mask.detach()[:, 0]
    rows = 1 if allowed is None else allowed.shape[0]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k <= q + past
        if window is not None:
            seen = seen & (k > q + past - window)
        if allowed is not None:
            seen = seen & allowed[b if rows > 1 else 0, q, k]
        return seen

    return create_block_mask(visible, None if rows == 1 else rows, None, queries, keys, device)


def _largest_error(device: torch.device) -> float:
    """Relative, of values and gradients in bfloat16 on a small problem."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((2, 4, 160, 60), (2, 2, 160, 60), (2, 2, 160, 60))
    leaves = [torch.randn(s, generator=generator, device=device) for s in shapes]
    document = torch.arange(160, device=device) // 50
    mask = (document[:, None] == document).tril().expand(2, 1, -1, -1).contiguous()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = ((x * 0.3).to(torch.bfloat16).to(dtype).requires_grad_() for x in leaves)
        if dtype == torch.bfloat16:
            y = flex(q, k, v, mask, None)
        else:
            logits = q @ k.repeat_interleave(2, 1).mT
            weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
            y = weights @ v.repeat_interleave(2, 1)
        gradients = torch.autograd.grad(y.float().square().sum(), (q, k, v))
        results.append([x.detach().float() for x in (y, *gradients)])
    return largest_error(*results)


TRIAL = Trial(_largest_error, 1e-2)
