"""Encoding in worker processes, with results in order and a bounded number of batches at once."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from types import TracebackType
from typing import Any

import numpy as np

from pha.data.encoding import TextEncoder
from pha.data.pieces import Encoded, Piece, encode_pieces, receive, send
from pha.utils.errors import PHAError

# Not `-m`: the command's own way in leaves out torch, which would take seconds of each worker.
WORKER = "import pha_command, runpy; runpy.run_module('pha.data.worker', run_name='__main__')"
_ALONE_BYTES = 8 << 20  # encoded before processes are started, which takes a second
_TOGETHER = 1 << 20  # characters encoded side by side by this process's threads
_AHEAD = 2  # batches read ahead per worker

Batch = list[Piece]


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def encode_batches(
    batches: Iterable[Batch], encoder: TextEncoder, dtype: np.dtype[Any], workers: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Yield each batch with its encoding, in order; the ids do not depend on `workers`.

    The first megabytes are encoded in this process, and so is everything if there is one worker.

    Args:
        batches: read as the work goes on, a few ahead of what is yielded.
        encoder: turns text into ids.
        dtype: of the ids.
        workers: processes to use.

    Raises:
        PHAError: a worker died.
    """
    source = iter(batches)
    done = 0
    for batch in source:
        if workers > 1 and done >= _ALONE_BYTES:
            with EncodingPool(encoder.state, dtype, workers) as pool:
                yield from pool.map(chain([batch], source))
            return
        pieces = [piece.data for piece in batch]
        yield batch, encode_pieces(encoder, dtype, pieces, _TOGETHER)
        done += sum(map(len, pieces))


class EncodingPool:
    """Worker processes, each served by a thread; a context manager that leaves none behind.

    Args:
        state: the tokenizer's JSON.
        dtype: of the ids.
        workers: how many.
    """

    def __init__(self, state: str, dtype: np.dtype[Any], workers: int) -> None:
        self._hello = [state.encode(), dtype.str.encode()]
        self._dtype = dtype
        self._size = workers
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> EncodingPool:
        try:
            for _ in range(self._size):
                self._workers.append(_Worker(self._hello))
                self._idle.put(self._workers[-1])
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def map(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        """Yield each batch with its encoding, in order.

        Raises:
            PHAError: a worker died.
        """
        pending: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            pending.append((batch, self._threads.submit(self._encode, batch)))
            if len(pending) >= _AHEAD * self._size:
                first, future = pending.popleft()
                yield first, future.result()
        for batch, future in pending:
            yield batch, future.result()

    def _encode(self, batch: Batch) -> Encoded:
        worker = self._idle.get()
        try:
            counts, ids = worker.ask([piece.data for piece in batch])
        finally:
            self._idle.put(worker)
        return Encoded(
            np.frombuffer(counts, dtype="<i8").reshape(-1, 3), np.frombuffer(ids, dtype=self._dtype)
        )

    def _stop(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process.

    It is started afresh rather than forked, as a copy of a process with threads can hang, and as a
    module of its own rather than by multiprocessing, which would run a user's script again in it.
    It ends when its input does, so also when this process is killed.
    """

    def __init__(self, hello: Sequence[bytes]) -> None:
        self._hello = hello
        self._process = subprocess.Popen(
            # -P: a file in the working folder is not to stand in for a module.
            [sys.executable, "-P", "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            process_group=0,  # Ctrl-C is for this process, which then stops the worker
        )

    def ask(self, question: Sequence[bytes]) -> list[bytes]:
        """Send a message and wait for the answer.

        Raises:
            PHAError: the process is dead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if self._hello:
                send(self._process.stdin, self._hello)
                self._hello = ()
            send(self._process.stdin, question)
            answer = receive(self._process.stdout)
        except (OSError, PHAError):
            answer = None
        if answer is None:
            code = self._process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise PHAError(
                f"a worker process {how}, perhaps for want of memory: start again, with fewer "
                "--workers if memory is short"
            )
        return answer

    def kill(self) -> None:
        """End the process; whoever waits for its answer gets an error."""
        self._process.kill()

    def close(self) -> None:
        """Wait until the process is gone, once nobody uses it."""
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what is left to write has no reader
                if stream is not None:
                    stream.close()
