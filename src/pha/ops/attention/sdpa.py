"""PyTorch's scaled_dot_product_attention, in blocks of queries where there is a window.

On a GPU its kernels are named, so that the one that writes all logits out is never taken: flash
attention and cuDNN's for half precision without a mask, which share key heads, and otherwise the
memory-efficient one, which shares none. They want head sizes in multiples of 8. For a few queries
each would first copy all cached keys, with zeros behind or once for each head: products do without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pha.ops.attention.naive import Mask, within, written_out

WINDOW_BLOCK = 256  # queries at a time under a window: each block reads this many keys too many
FEW = 128  # queries below which each key head takes those of all its heads as queries of its own
SINGLE = 8  # queries up to which keys are read once, as they lie, by plain products
MULTIPLE, LARGEST = 8, 256  # head sizes of the fused kernels
# cuDNN's is the faster one on Hopper, but its backward pass is younger.
TRAINING = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
INFERENCE = TRAINING[::-1]


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    window: int | None = None,
    kernels: Sequence[SDPBackend] | None = None,
) -> Tensor:
    """PyTorch's scaled_dot_product_attention, any head size, key heads shared without copies.

    On a GPU `kernels` are tried for half precision without a mask; see `attention_flex`.
    """
    queries, keys, mask = q.shape[2], k.shape[2], written_out(mask)
    if window is not None and keys > window and queries:
        return _windowed_sdpa(q, k, v, mask, window)
    # One new token sees every cached one, so causality needs no mask there.
    causal = bool(mask is None and queries == keys and queries > 1)  # also where they are traced
    if mask is None and not causal and queries > 1:
        if torch.is_grad_enabled():  # masks of all blocks would be kept
            return checkpoint(_windowed_sdpa, q, k, v, None, keys, use_reentrant=False)
        return _windowed_sdpa(q, k, v, None, keys)
    return _sdpa(q, k, v, mask, causal, kernels)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    kernels: Sequence[SDPBackend] | None = None,
) -> Tensor:
    if q.device.type == "cuda" and q.dtype != torch.float64:
        return _by_named_kernels(q, k, v, mask, causal, kernels)
    shared = bool(q.shape[1] != k.shape[1])
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=1.0, enable_gqa=shared
    )


def _by_named_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    kernels: Sequence[SDPBackend] | None = None,
) -> Tensor:
    (_, H, T, K), G, wide = q.shape, k.shape[1], v.shape[3]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    # The product of mixed types has no derivative; and who names a kernel gets it.
    if T <= SINGLE and not differentiated and kernels is None:
        return few_queries(q, k, v, within(T, T, T, q.device) if causal else mask)
    if mask is None and q.dtype != torch.float32 and K <= LARGEST and _has_flash(q.device):
        kernels = list(kernels or (TRAINING if q.requires_grad else INFERENCE))
        return _padded(q, k, v, None, causal, kernels)[..., :wide]
    efficient = [SDPBackend.EFFICIENT_ATTENTION]
    if H == G or T >= FEW:
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
        return _padded(q, k, v, mask, causal, efficient)[..., :wide]
    if causal:
        mask = within(T, T, T, q.device)
    if mask is not None:
        mask = mask.view(-1, 1, 1, *mask.shape[-2:]).expand(-1, -1, H // G, -1, -1).flatten(2, 3)
    y = _padded(q.unflatten(1, (G, -1)).flatten(2, 3), k, v, mask, False, efficient)
    return y[..., :wide].unflatten(2, (-1, T)).flatten(1, 2)


def few_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T) v with the logits written out: each key and value is read once, where it lies.

    The queries of all heads that share a key head are the rows of one product. Logits and their
    softmax are in float32, or float64 where that is given; only a GPU has the mixed product.
    """
    (B, H, T, _), (G, S) = q.shape, k.shape[1:3]
    rows = q.unflatten(1, (G, -1)).flatten(2, 3).flatten(0, 1)  # (B G, H / G T, K)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    if q.dtype in (torch.float32, torch.float64):
        logits = torch.bmm(rows, keys.mT)
    else:
        logits = torch.bmm(rows, keys.mT, out_dtype=torch.float32)
    if mask is not None:
        seen = mask.view(-1, 1, 1, T, S)
        logits = logits.view(B, G, -1, T, S).masked_fill(~seen, -torch.inf).view_as(logits)
    y = torch.bmm(logits.softmax(-1).to(v.dtype), values)
    return y.view(B, G, H // G, T, -1).flatten(1, 2)


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    kernels: list[SDPBackend],
) -> Tensor:
    """By the first of these kernels that can, with zeros behind the entries of each head."""
    q, k, v = (F.pad(x, (0, -x.shape[3] % MULTIPLE)) for x in (q, k, v))
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=1.0, enable_gqa=bool(q.shape[1] != k.shape[1])
        )


@torch.compiler.assume_constant_result
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _windowed_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """Blocks of queries, each against the stretch of keys that its window reaches."""
    queries, keys = q.shape[2], k.shape[2]
    past = keys - queries
    bands: dict[tuple[int, int], Tensor] = {}
    outputs = []
    for begin in range(0, queries, WINDOW_BLOCK):
        end = min(begin + WINDOW_BLOCK, queries)
        low, high = max(0, past + begin - window + 1), past + end
        shape = (end - begin, high - low)
        if shape not in bands:  # all blocks but the first and last few have the same
            bands[shape] = within(*shape, window, q.device)
        allowed = bands[shape]
        if mask is not None:
            allowed = allowed & mask[:, :, begin:end, low:high]
        outputs.append(
            _sdpa(q[:, :, begin:end], k[:, :, low:high], v[:, :, low:high], allowed, False)
        )
    return torch.cat(outputs, dim=2)
