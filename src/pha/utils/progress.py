"""What a person sees while something goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_SECONDS = 15.0  # between lines where there is no terminal to redraw
_UNWRITABLE = (OSError, SystemExit)  # rich leaves by the latter where nobody reads a pipe


def make_console(**options: Any) -> Console:
    """A console that shows texts as they are: brackets and colons in them are no markup."""
    return Console(markup=False, emoji=False, **options)


class ProgressLine(Progress):
    """One line for each stage of the work; a context manager.

    Where nothing can be written any more, a terminal that is gone or a pipe that nobody reads, the
    work goes on unseen.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._last_line = time.monotonic()

    def show(self, stage: str, status: str, fraction: float | None, is_last: bool = False) -> None:
        """Show how far the work is.

        Args:
            stage: what is done; another name begins another line.
            status: how far it is, in words.
            fraction: the same between 0 and 1, or None where it is not known.
            is_last: whether a plain line is due in any case.
        """
        if not self.tasks or self.tasks[-1].description != stage:
            self.add_task(stage, total=None, status="")
        total = None if fraction is None else 1.0
        self.update(self.tasks[-1].id, total=total, completed=fraction or 0.0, status=status)
        now = time.monotonic()
        if self.disable and (is_last or now - self._last_line > PLAIN_SECONDS):
            self._last_line = now
            self.line(f"{stage}: {status}")

    def note(self, text: str, is_last: bool = False) -> None:
        """Print a line above; where there is no terminal, only if one is due, or the last."""
        now = time.monotonic()
        if not self.disable or is_last or now - self._last_line > PLAIN_SECONDS:
            self._last_line = now
            self.line(text)

    def line(self, text: str) -> None:
        """Print a line of its own above."""
        with contextlib.suppress(*_UNWRITABLE):
            self.console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """End the display."""
        with contextlib.suppress(*_UNWRITABLE):
            super().stop()
