"""Compiled kernels on torch tensors: compiled at first use, kept on disk, run by several threads.

Kernels release Python's lock and are run by a pool of Python threads, not by one of numba's
threading layers: "workqueue" ends the process when two threads call it at once, "omp" when it
is used after a fork, and "tbb" is one more dependency.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pha.utils.files import cache_folder

_TOGETHER = threading.Lock()
CALLS = 6  # Calls of a kernel for each thread, where they need not be equal.
_FAULTS: dict[str, str] = {}
WAKING = 2**20  # The same for kernels that do a few operations on each element.
SMALL = 2**15  # Elements below which waking another thread takes longer than the work.


@functools.cache
def _revision() -> str:
    """A digest of all kernels: numba notices a change of a function's own file, and of no other."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("numba_*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _cache_folder(config: Any) -> Iterator[None]:
    """Let numba keep compiled code in our cache folder, unless $NUMBA_CACHE_DIR names another.

    Its own choice is beside the source, which may be read-only or shared by different machines.
    """
    previous = config.CACHE_DIR
    config.CACHE_DIR = previous or str(cache_folder() / "numba" / _revision())
    try:
        yield
    finally:
        config.CACHE_DIR = previous


@functools.cache
def kernel(
    name: str, dtype: torch.dtype, module: str = "numba_scan", *sizes: int
) -> Callable[..., None] | None:
    """A function of a module of kernels, compiled for tensors of `dtype`.

    Args:
        name: the function.
        dtype: of the tensors whose elements it works on.
        module: which of `pha.ops`; its `signature` gives the types of the arguments.
        sizes: what `signature` takes besides.

    Returns:
        The kernel, or None, after one warning, where numba is absent or fails.
    """
    try:
        return _compile(name, dtype, module, *sizes)
    except Exception as error:  # Whatever it is, the same can be computed with torch.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        _FAULTS.setdefault(module, reason)
        _warn(reason)
        return None


def fault(module: str) -> str | None:
    """Why torch computes in place of a module's kernels; None as long as none has failed."""
    return _FAULTS.get(module)


def _compile(name: str, dtype: torch.dtype, module: str, *sizes: int) -> Callable[..., None]:
    import numba

    kernels = importlib.import_module(f"pha.ops.{module}")
    element, real = {
        torch.float32: (numba.float32, numba.float32),
        torch.bfloat16: (numba.uint16, numba.float32),
        torch.float64: (numba.float64, numba.float64),
    }[dtype]
    dispatcher = getattr(kernels, name)
    with _cache_folder(numba.config):
        # Where no folder can be written, each process compiles for itself.
        with contextlib.suppress(RuntimeError, OSError):
            dispatcher.enable_caching()
        dispatcher.compile(kernels.signature(name, element, real, *sizes))
    return dispatcher


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"scans, norms and attention run several times slower, in torch alone, as numba fails "
        f"({reason}); pip install numba",
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


def elements(x: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The memory of x (B, H, T, K) and the strides of B, H and T.

    Only where head dimensions are not adjacent is x copied.
    """
    if x.stride(3) != 1:
        x = x.contiguous()
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return _array(x.as_strided((span,), (1,))), x.stride()[:3]


def _array(x: Tensor) -> Any:
    """A flat tensor as a numpy array on the same memory; bfloat16 as uint16."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def run(function: Callable[..., None], shape: torch.Size, *arguments: Any) -> None:
    """Call a kernel for every sequence and state of (B, T, n), on torch's number of threads."""
    from pha.ops.numba_scan import BLOCK

    B, T, n = shape
    threads = torch.get_num_threads() if shape.numel() >= SMALL else 1
    # Where sequences do not divide evenly among the threads, the states of each do.
    parts = 1 if B % threads == 0 else threads
    block = -(-n // max(parts, -(-n // BLOCK)))
    block = min(BLOCK, -(-block // 64) * 64) or 1
    tasks = B * -(-n // block)
    threads = max(1, min(threads, tasks))
    bounds = [tasks * i // threads for i in range(threads + 1)]
    _on_threads(
        threads,
        [(*bound, block, T, n, *arguments) for bound in itertools.pairwise(bounds)],
        function,
    )


def _threads(tasks: int, elements: int | None) -> int:
    few = elements is not None and elements < WAKING
    return 1 if few else max(1, min(torch.get_num_threads(), tasks))


def calls(tasks: int, elements: int | None = None) -> int:
    """How often `spread` calls its kernel."""
    threads = _threads(tasks, elements)
    return min(tasks, CALLS * threads) if threads > 1 else 1


def spread(
    function: Callable[..., None], tasks: int, *arguments: Any, elements: int | None = None
) -> None:
    """Call a kernel with (first, step, tasks, ...), on torch's number of threads.

    It is to do the tasks first, first + step, ... There are more calls than threads, so that one
    whose processor is busy with something else does fewer. Where `elements` is given and small,
    one call does it all.
    """
    threads, step = _threads(tasks, elements), calls(tasks, elements)
    _on_threads(threads, [(first, step, tasks, *arguments) for first in range(step)], function)


def together(function: Callable[..., None], threads: int, *arguments: Any) -> None:
    """Call a kernel with (part, threads, ...) whose parts wait for each other."""
    # Two such calls at once could each hold a thread that the other waits for.
    with _TOGETHER:
        _on_threads(threads, [(part, threads, *arguments) for part in range(threads)], function)


def _on_threads(threads: int, calls: list[tuple[Any, ...]], function: Callable[..., None]) -> None:
    """Make all calls, each on the first thread that is free."""
    left = iter(calls)

    def work() -> None:
        for call in left:  # one thread at a time gets the next: iterators of lists are atomic
            function(*call)

    waiting = [_pool(os.getpid(), threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for future in waiting:
        future.result()


@functools.cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of this process: after a fork the child has none of its parent's."""
    return ThreadPoolExecutor(workers, thread_name_prefix="pha-kernel")
