"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pha.utils.text import count, duration

PLAIN_SECONDS = 15.0  # between lines where there is no terminal to redraw


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
