"""Being asked to stop: the first time in good order, a second Ctrl-C at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from pha.utils.errors import INTERRUPTED, STOPPED, StoppedError

# What Ctrl-C sends, what ends a job or a container, a broken connection, and what Slurm is asked to
# send some time before it ends a job. Not every system has all of them.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def exit_code(number: int) -> int:
    """The exit code of a process that signal `number` stopped in good order."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


def leave(number: int) -> NoReturn:
    """Unwind everything.

    Raises:
        KeyboardInterrupt: always; a `StoppedError` if it was not Ctrl-C.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise StoppedError(f"stopped by {signal.Signals(number).name}; run the same command again")


@contextlib.contextmanager
def on_stop_signals(request: Callable[[int], object]) -> Iterator[None]:
    """Call `request` with the number of the first stop signal inside the block.

    A second SIGINT interrupts; other further ones are ignored. What the process was told to ignore
    when it was started, such as SIGHUP by nohup, it ignores. But it heeds SIGINT, which shells have
    every process in the background ignore. Outside the main thread, signals are somebody else's and
    nothing changes.
    """
    asked = False
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def handle(number: int, _: Any) -> None:
        nonlocal asked
        if number == getattr(signal, "SIGHUP", None):
            write_nowhere(terminals)
        if not asked:
            asked = True
            request(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    previous = {}
    with contextlib.suppress(ValueError):
        for number in SIGNALS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def write_nowhere(descriptors: Iterable[int]) -> None:
    """Lose what would go to files, pipes or terminals where every write fails."""
    for descriptor in descriptors:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
