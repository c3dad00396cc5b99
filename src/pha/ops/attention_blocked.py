"""Causal attention in blocks that stay in the cache, compiled for the processor; see the kernels.

The softmax is taken over blocks of keys, with a running maximum and sum for each query, and only
the logarithm of the sum is kept for the backward pass, which computes the weights again:

    P = exp(q k^T - lse),  dS = P * (dy v^T - sum_j dy_j y_j),
    dq = dS k,  dk = dS^T q,  dv = P^T dy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pha.ops import numba_runtime

# Below so many queries, packing keys for products costs more than it saves, as measured.
FEWEST_QUERIES = 128
_MODULE = "numba_attention"
_PANEL = 6  # Vectors of 16 head dimensions that fit the registers beside their sums.
_WORDS = {torch.float32: torch.float32, torch.bfloat16: torch.uint32}


def serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether `blocked_attention` is right and fast: the one place for the rule.

    It needs float32 or bfloat16, AVX-512 with the instructions for that type, no mask but
    causality and a window, and FEWEST_QUERIES queries. Shapes that do not fit each other are left
    to torch, which says what is wrong with them.
    """
    return (
        mask is None
        and q.dtype in _WORDS
        and q.dtype == k.dtype == v.dtype
        and k.shape[2] >= q.shape[2] >= FEWEST_QUERIES
        and k.shape == v.shape
        and q.shape[::3] == k.shape[::3]
        and q.shape[1] % k.shape[1] == 0
        and q.numel() > 0
        and _available(q.dtype, _vectors(int(q.shape[3])))
    )


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """softmax(q k^T) v, causal, on the CPU.

    Args:
        q: (B, H, T, K) queries of the last T of S positions.
        k: (B, G, S, K) keys, H a multiple of G.
        v: (B, G, S, K) values.
        window: how many keys a query may see, its own included; None means all.

    Returns:
        (B, H, T, K), in memory as (B, T, H, K). Scores and sums are float32.
    """
    y, _ = _forward(q, k, v, window)
    return y


@torch.compiler.assume_constant_result
def _available(dtype: torch.dtype, vectors: int) -> bool:
    return _compiled(dtype, vectors)  # torch.compile would trace what is cached


@functools.cache
def _compiled(dtype: torch.dtype, vectors: int) -> bool:
    """Whether the kernels run here: no for some processors, no with a warning without numba."""
    try:
        from pha.ops.numba_tiles import supported
    except ImportError:
        pass
    else:
        if not supported(dtype == torch.bfloat16):
            return False
    return all(
        _kernel(name, dtype, vectors) for name in ("pack", "forward", "backward", "sum_heads")
    )


def _kernel(name: str, dtype: torch.dtype, vectors: int) -> Callable[..., None] | None:
    return numba_runtime.kernel(name, dtype, _MODULE, vectors)


def _vectors(size: int) -> int:
    """Vectors in each of the equal panels, at most _PANEL wide, that hold a head dimension."""
    vectors = -(-size // 16)
    return -(-vectors // -(-vectors // _PANEL))


class _Problem:
    """The sizes of one problem, and its operands as the kernels take them."""

    def __init__(self, q: Tensor, k: Tensor, window: int | None) -> None:
        from pha.ops.numba_attention import PANEL, QUERIES

        self.B, self.H, T, K = q.shape
        self.G, S = k.shape[1:3]
        self.dtype, self.vectors = q.dtype, _vectors(K)
        self.padded = -(-S // PANEL) * PANEL
        panel = 16 * self.vectors
        self.width = -(-K // panel) * panel
        self.heads, self.blocks = self.B * self.H, -(-T // QUERIES)
        reach = S if window is None else min(window, S)
        groups = self.H // self.G
        self.sizes = self.H, groups, T, S, K, self.padded, self.width, reach, (0,) * self.vectors

    def packed(self, x: Tensor, columns: bool, pairs: bool) -> tuple[Any, Any]:
        """Keys or values as right operands: by head dimension, by position, or both."""
        from pha.ops.numba_attention import PANEL

        B, G, S, K = x.shape
        together = 4 // x.element_size()
        words = [
            x.new_empty(size if wanted else 0, dtype=_WORDS[x.dtype]).numpy()
            for wanted, size in (
                (columns, B * G * -(-K // together) * self.padded),
                (pairs, B * G * self.padded // together * self.width),
            )
        ]
        sizes = G, S, K, self.padded, self.width
        self.run("pack", B * G * self.padded // PANEL, *sizes, *numba_runtime.elements(x), *words)
        return words[0], words[1]

    def summed(self, x: Tensor, like: Tensor) -> Tensor:
        """The sums of gradients of query heads, shaped as keys or values."""
        from pha.ops.numba_attention import PANEL

        B, G, S, K = like.shape
        out = like.new_empty(like.shape)
        sizes = self.H // self.G, S, K, self.padded, self.width
        arrays = (numba_runtime.flat(y, y.dtype) for y in (x, out))
        self.run("sum_heads", B * G * self.padded // PANEL, *sizes, *arrays)
        return out

    def run(self, name: str, tasks: int, *arguments: Any) -> None:
        """Call a kernel for all tasks."""
        kernel = _kernel(name, self.dtype, self.vectors)
        assert kernel is not None  # `serves` has compiled it
        numba_runtime.spread(kernel, tasks, *arguments)


@torch.library.custom_op(
    "pha::blocked_attention",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor q, Tensor k, Tensor v, SymInt? window) -> (Tensor, Tensor)",
)
def _forward(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    y, lse = _outputs(q, k, v, window)
    problem = _Problem(q, k, window)
    k_columns, _ = problem.packed(k, columns=True, pairs=False)
    _, v_pairs = problem.packed(v, columns=False, pairs=True)
    problem.run(
        "forward",
        problem.heads * problem.blocks,
        *problem.sizes,
        *numba_runtime.elements(q),
        *(k_columns, v_pairs),
        *numba_runtime.elements(y),
        numba_runtime.flat(lse, lse.dtype),
    )
    return y, lse


@_forward.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    return _by_position(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _by_position(q: Tensor) -> Tensor:
    """Empty, shaped as q, with all heads of a position adjacent, as layers want them next."""
    B, H, T, K = q.shape
    return q.new_empty(B, T, H, K).transpose(1, 2)


@torch.library.custom_op(
    "pha::blocked_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dy, Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v, SymInt? window) "
    "-> (Tensor, Tensor, Tensor)",
)
def _backward(
    dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _Problem(q, k, window)
    k_columns, k_pairs = problem.packed(k, columns=True, pairs=True)
    v_columns, _ = problem.packed(v, columns=True, pairs=False)
    dq = _by_position(q)
    # One for each query head: those that share a key head are summed in a fixed order.
    size = problem.heads * problem.padded * problem.width
    dk, dv = (q.new_empty(size, dtype=torch.float32) for _ in range(2))
    problem.run(
        "backward",
        problem.heads,
        *problem.sizes,
        *numba_runtime.elements(q),
        *(k_columns, k_pairs, v_columns),
        *numba_runtime.elements(y),
        *numba_runtime.elements(dy),
        numba_runtime.flat(lse, lse.dtype),
        *numba_runtime.elements(dq),
        *(numba_runtime.flat(x, x.dtype) for x in (dk, dv)),
    )
    return dq, problem.summed(dk, k), problem.summed(dv, v)


@_backward.register_fake
def _gradients(
    dy: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _by_position(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dy, *ctx.saved_tensors, ctx.window), None


_forward.register_autograd(_differentiate, setup_context=_save)
