"""Being asked to stop: the first time in good order, the second time at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_stop_signals(request: Callable[[], object]) -> Iterator[None]:
    """Call `request` at the first SIGINT or SIGTERM inside the block; a second SIGINT interrupts.

    Outside the main thread, signals are somebody else's and nothing changes.
    """
    asked = False

    def handle(number: int, _: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        request()

    previous = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
