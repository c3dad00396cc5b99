"""Compiled kernels on torch tensors: compiled at first use, kept on disk, run by several threads.

Kernels release Python's lock and are run by a pool of Python threads, not by one of numba's
threading layers: "workqueue" ends the process when two threads call it at once, "omp" when it
is used after a fork, and "tbb" is one more dependency.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pha.utils.files import cache_folder

SMALL = 2**15  # Elements below which waking another thread takes longer than the work.


@contextlib.contextmanager
def _cache_folder(config: Any) -> Iterator[None]:
    """Let numba keep compiled code in our cache folder, unless $NUMBA_CACHE_DIR names another.

    Its own choice is beside the source, which may be read-only or shared by different machines.
    """
    previous = config.CACHE_DIR
    config.CACHE_DIR = previous or str(cache_folder() / "numba")
    try:
        yield
    finally:
        config.CACHE_DIR = previous


@functools.cache
def kernel(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """A function of `numba_kernels`, compiled for tensors of `dtype`.

    Returns:
        The kernel, or None, after one warning, where numba is absent or fails.
    """
    try:
        return _compile(name, dtype)
    except Exception as error:  # Whatever it is, the same can be computed with torch.
        _warn(" ".join(f"{type(error).__name__}: {error}".split())[:200])
        return None


def _compile(name: str, dtype: torch.dtype) -> Callable[..., None]:
    import numba

    from pha.ops import numba_kernels

    element, real = {
        torch.float32: (numba.float32, numba.float32),
        torch.bfloat16: (numba.uint16, numba.float32),
        torch.float64: (numba.float64, numba.float64),
    }[dtype]
    dispatcher = getattr(numba_kernels, name)
    with _cache_folder(numba.config):
        # Where no folder can be written, each process compiles for itself.
        with contextlib.suppress(RuntimeError, OSError):
            dispatcher.enable_caching()
        dispatcher.compile(numba_kernels.signature(name, element, real))
    return dispatcher


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"the scans run several times slower, as a loop in torch, because numba fails ({reason}); "
        "pip install numba",
        RuntimeWarning,
        stacklevel=2,
    )


def flat(x: Tensor | None, dtype: torch.dtype) -> Any:
    """All elements of a tensor in `dtype` as a flat array; an empty one for None."""
    if x is None:
        return torch.empty(0, dtype=dtype).numpy()
    return _array(x.to(dtype).contiguous().view(-1))


def flags(x: Tensor | None) -> Any:
    """A bool tensor as a flat array of uint8; an empty one for None."""
    return flat(x, torch.uint8)


def strided(x: Tensor) -> tuple[Any, tuple[int, int]]:
    """The memory from the first to the last element of x (B, T, n), and the strides of B and T.

    Only where states are not adjacent is x copied.
    """
    B, T, n = x.shape
    if n > 1 and x.stride(2) != 1:
        x = x.contiguous()
    steps = x.stride(0), x.stride(1)
    span = (B - 1) * steps[0] + (T - 1) * steps[1] + n if x.numel() else 0
    return _array(x.as_strided((span,), (1,))), steps


def _array(x: Tensor) -> Any:
    """A flat tensor as a numpy array on the same memory; bfloat16 as uint16."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def run(function: Callable[..., None], shape: torch.Size, *arguments: Any) -> None:
    """Call a kernel for every sequence and state of (B, T, n), on torch's number of threads."""
    from pha.ops.numba_kernels import BLOCK

    B, T, n = shape
    threads = torch.get_num_threads() if shape.numel() >= SMALL else 1
    # Where sequences do not divide evenly among the threads, the states of each do.
    parts = 1 if B % threads == 0 else threads
    block = -(-n // max(parts, -(-n // BLOCK)))
    block = min(BLOCK, -(-block // 64) * 64) or 1
    tasks = B * -(-n // block)
    threads = max(1, min(threads, tasks))
    bounds = [tasks * i // threads for i in range(threads + 1)]
    waiting = [
        _pool(os.getpid(), threads - 1).submit(function, first, last, block, T, n, *arguments)
        for first, last in itertools.pairwise(bounds[1:])
    ]
    function(bounds[0], bounds[1], block, T, n, *arguments)
    for future in waiting:
        future.result()


@functools.cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of this process: after a fork the child has none of its parent's."""
    return ThreadPoolExecutor(workers, thread_name_prefix="pha-kernel")
