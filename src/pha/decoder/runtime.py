"""A kernel on torch tensors: compiled at first use, kept on disk, run by several threads.

It releases Python's lock and is run by a pool of Python threads, not by one of numba's threading
layers: "workqueue" ends the process when two threads call it at once, "omp" when it is used after a
fork, and "tbb" is one more dependency.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pha.utils.files import cache_folder

_TOGETHER = threading.Lock()
_FAULTS: list[str] = []


@functools.cache
def _revision() -> str:
    """A digest of all kernels: numba notices a change of a function's own file, and of no other."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
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
def kernel(name: str, dtype: torch.dtype) -> Callable[..., Any] | None:
    """A function of `pha.decoder.kernel`, compiled for weights of `dtype`.

    Returns:
        The kernel, or None, after one warning, where numba fails.
    """
    try:
        return _compile(name, dtype)
    except Exception as error:  # Whatever it is, the layers can do the same.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        _FAULTS.append(reason)
        warnings.warn(
            f"decoding runs several times slower, by the layers, as numba fails ({reason})",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def fault() -> str | None:
    """Why the layers write tokens in place of the kernel; None as long as it has not failed."""
    return _FAULTS[-1] if _FAULTS else None


def _compile(name: str, dtype: torch.dtype) -> Callable[..., Any]:
    import numba

    from pha.decoder import kernel as kernels

    element = {torch.float32: numba.float32, torch.bfloat16: numba.uint16}[dtype]
    dispatcher = getattr(kernels, name)
    with _cache_folder(numba.config):
        # Where no folder can be written, each process compiles for itself.
        with contextlib.suppress(RuntimeError, OSError):
            dispatcher.enable_caching()
        dispatcher.compile(kernels.signature(name, element))
    return dispatcher


def together(function: Callable[..., None], threads: int, *arguments: Any) -> None:
    """Call a kernel with (part, threads, ...) whose parts wait for each other."""
    # Two such calls at once could each hold a thread that the other waits for.
    with _TOGETHER:
        waiting = [
            _pool(os.getpid(), threads - 1).submit(function, part, threads, *arguments)
            for part in range(1, threads)
        ]
        function(0, threads, *arguments)
        for future in waiting:
            future.result()


@functools.cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads of this process: after a fork the child has none of its parent's."""
    return ThreadPoolExecutor(workers, thread_name_prefix="pha-kernel")
