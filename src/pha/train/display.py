"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0  # between lines where there is no terminal to redraw


def count(number: float) -> str:
    """A number people can read at a glance: 2.1M, 812, 97k."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            value = number / size
            return f"{value:.3g}{unit}" if value < 1000 else f"{value:.0f}{unit}"
    return f"{number:.3g}"


def memory(size: float) -> str:
    """Bytes as GB or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3 min 20 s or 5 h 12 min."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min"


class TrainingDisplay:
    """Progress of one run; a context manager.

    Args:
        console: where to write.
        name: of the run.
        total: optimiser steps in all.
        done: steps taken before this process began.
    """

    def __init__(self, console: Console, name: str, total: int, done: int) -> None:
        self.console, self.name, self.total = console, name, total
        self.live = console.is_terminal
        self.last_line = time.monotonic()
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not self.live,
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task(name, total=total, completed=done, status="")

    def __enter__(self) -> TrainingDisplay:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def step(self, done: int, loss: float, rate: float, utilisation: float, left: float) -> None:
        """Show the state after `done` steps.

        Args:
            done: steps taken.
            loss: nats per token.
            rate: tokens per second.
            utilisation: fraction of the measured matmul rate.
            left: seconds still to go.
        """
        perplexity = f"{math.exp(loss):.1f}" if loss < 20 else "-"
        status = (
            f"loss {loss:.3f}  ppl {perplexity}  {count(rate)} tok/s  {utilisation:.0%} of matmul"
        )
        self.progress.update(self.task, completed=done, status=status)
        now = time.monotonic()
        if not self.live and (now - self.last_line > PLAIN_SECONDS or done == self.total):
            self.last_line = now
            self.console.print(
                f"{self.name}: step {done}/{self.total}  {status}  {duration(left)} left",
                highlight=False,
                soft_wrap=True,
            )

    def note(self, text: str) -> None:
        """A line of its own."""
        self.progress.console.print(f"{self.name}: {text}", highlight=False, soft_wrap=True)
