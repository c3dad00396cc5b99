"""What a person sees while a store is made: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pha.data.preparation import PreparationState

PLAIN_SECONDS = 15.0  # between lines where there is no terminal to redraw


class PreparationDisplay:
    """Progress of one preparation; a context manager, called with each `PreparationState`.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._stage = ""
        self._begin = self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self._live,
        )

    def __enter__(self) -> PreparationDisplay:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, state: PreparationState) -> None:
        """Show `state`."""
        now = time.monotonic()
        if state.stage != self._stage:
            self._stage, self._begin = state.stage, now
            self._task = self._progress.add_task(state.stage, total=None, status="")
        status = describe_state(state, now - self._begin)
        total = None if state.fraction is None else 1.0
        completed = state.fraction or 0.0
        self._progress.update(self._task, total=total, completed=completed, status=status)
        if not self._live and now - self._last_line > PLAIN_SECONDS:
            self._last_line = now
            self._console.print(f"{state.stage}: {status}", highlight=False, soft_wrap=True)


def describe_state(state: PreparationState, seconds: float) -> str:
    """What is done, how fast, and how long it will yet take, `seconds` after the stage began."""
    parts = []
    if state.fraction is not None:
        parts.append(f"{state.fraction:.0%}")
    parts += [f"{state.documents:,} documents", f"{state.bytes / 1e6:,.0f} MB"]
    if seconds > 0:
        parts.append(f"{state.bytes / 1e6 / seconds:.1f} MB/s")
        if state.tokens:
            parts.append(f"{state.tokens / seconds:,.0f} tokens/s")
        if state.fraction:
            left = timedelta(seconds=round(seconds * (1 / state.fraction - 1)))
            parts.append(f"{left} left")
    return "  ".join(parts)
