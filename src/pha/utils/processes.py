"""Child processes, none of which outlives the call that started it; and work that several share."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

POLL_SECONDS = 0.05
_LEAVE = "PHA_LEAVE_WITH_PARENT"  # tells a child that its standard input is a pipe to watch


@dataclass(frozen=True)
class Command:
    """What a process is started with.

    Attributes:
        words: program and arguments.
        log: a file that gets everything it prints, at its end; None for the terminal.
    """

    words: Sequence[str]
    log: Path | None = None


def run_processes(
    commands: Sequence[Command],
    *,
    parallel: int = 1,
    seconds: float | None = None,
    kill: bool = False,
    started: Callable[[int], object] = lambda index: None,
    ended: Callable[[int, int], object] = lambda index, code: None,
) -> None:
    """Run commands in order, several at once.

    Whatever ends this call, an interrupt or an exception of `ended` too, stops the processes that
    run and waits for them. One that calls `leave_with_parent` also stops when this one is killed.

    Args:
        commands: what to run.
        parallel: how many run at once. They share the cores, or get a GPU each in turn.
        seconds: for all of them; None for no limit.
        kill: whether a process that is stopped gets no time to clear up.
        started: called with the index of a command.
        ended: called with the index of a command and its exit code, below zero for a signal.

    Raises:
        TimeoutError: the time was over.
    """
    end = None if seconds is None else time.monotonic() + seconds
    waiting = deque(enumerate(commands))
    running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}  # by slot
    try:
        while waiting or running:
            for slot in range(parallel):
                if waiting and slot not in running:
                    index, command = waiting.popleft()
                    started(index)
                    running[slot] = index, _start(command, slot, parallel)
            time.sleep(POLL_SECONDS)
            for slot, (index, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    process.communicate()  # closes the pipe
                    ended(index, process.returncode)
            if running and end is not None and time.monotonic() >= end:
                raise TimeoutError
    finally:
        for _, process in running.values():
            process.kill() if kill else process.terminate()
        for _, process in running.values():
            process.communicate()  # closes the pipe and waits


def leave_with_parent() -> None:
    """Have this process get SIGTERM when the one that started it by `run_processes` has ended.

    A process that was started otherwise stays as it is.
    """
    if os.environ.pop(_LEAVE, None):
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    os.read(0, 1)  # returns when the other end of the pipe is closed
    os.kill(os.getpid(), signal.SIGTERM)


def _start(command: Command, slot: int, parallel: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {_LEAVE: "1"}
    if parallel > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // parallel))
        if devices := _cuda_devices():
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    if command.log is None:
        return subprocess.Popen(command.words, env=environment, stdin=subprocess.PIPE)
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("ab") as log:
        return subprocess.Popen(
            command.words, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
        )


def _cuda_devices() -> list[str]:
    """Names of the GPUs that this process may use."""
    import torch

    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]


Item = TypeVar("Item")


def turns(items: Sequence[Item], share: tuple[int, int]) -> Iterator[tuple[Item, bool]]:
    """The items of one process out of several, and whether each counts.

    All processes get equally many, as sharded weights are whole only where every process asks for
    them: in the last round those for whom there is none do the first item again, and it counts not.

    Args:
        items: all of them, in the same order in every process.
        share: (rank, ranks).
    """
    rank, ranks = share
    for first in range(0, len(items), ranks):
        counts = first + rank < len(items)
        yield items[first + rank if counts else 0], counts
