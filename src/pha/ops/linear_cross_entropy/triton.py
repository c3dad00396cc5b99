"""The chunked loss with its softmax and gradient in one kernel of Triton, as a backend."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops.backends import OPS, Trial
from pha.ops.linear_cross_entropy import (
    IGNORE_INDEX,
    chunk_by_torch,
    linear_cross_entropy_chunked,
    padded,
)
from pha.ops.testing import largest_error, random_numbers


def _by_triton(
    x: Tensor, w: Tensor, y: Tensor, buffer: Tensor, gradient: bool, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """`chunk_by_torch` with softmax and gradient in one kernel, on logits of the type of x.

    The rows of w from `vocabulary` on are zeros that pad it: dz is zero there.
    """
    from pha.ops.linear_cross_entropy.triton_kernel import softmax_gradient_

    z = torch.mm(x, w.T, out=buffer[: x.shape[0]])
    return softmax_gradient_(z, y, vocabulary, IGNORE_INDEX, gradient).sum(), z


def _largest_error(device: torch.device) -> float:
    """Of Triton's kernel, on a padded problem of a whole block and a part of one."""
    normal, _ = random_numbers(device)
    x, w = normal(7, 16), normal(4100, 16)
    y = torch.tensor([0, 4099, IGNORE_INDEX, 4096, 17, 5, 6], device=device)
    loss, dz = chunk_by_torch(x, w, y, x.new_empty(7, 4100), True)
    wide = padded(w, w.dtype, 4160), y, x.new_empty(7, 4160)
    return largest_error(_by_triton(x, *wide, True, 4100), (loss, F.pad(dz, (0, 60))))


OPS["linear_cross_entropy"].add(
    "triton",
    functools.partial(linear_cross_entropy_chunked, triton=True),
    "cuda",
    Trial(_largest_error, 1e-3),
    "chunked for float64",
    chunk=_by_triton,
)
