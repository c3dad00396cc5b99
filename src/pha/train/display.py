"""What a person sees while a run goes on."""

from __future__ import annotations

import math

from rich.console import Console

from pha.utils.progress import ProgressLine
from pha.utils.text import count, duration


class TrainingDisplay(ProgressLine):
    """Progress of one run over `total` steps, of which `done` were taken before."""

    def __init__(self, console: Console, name: str, total: int, done: int) -> None:
        super().__init__(console)
        self.name, self.total = name, total
        self.show(name, f"step {done}/{total}", done / total)

    def step(self, done: int, loss: float, rate: float, utilisation: float, left: float) -> None:
        """Show the state: loss in nats per token, rate in tokens per second, and seconds left."""
        perplexity = f"{math.exp(loss):.1f}" if loss < 20 else "-"
        status = (
            f"step {done}/{self.total}  loss {loss:.3f}  ppl {perplexity}  {count(rate)} tok/s  "
            f"{utilisation:.0%} of matmul  {duration(left)} left"
        )
        self.show(self.name, status, done / self.total, is_last=done == self.total)

    def note(self, text: str) -> None:
        """A line of its own, with the name of the run."""
        self.line(f"{self.name}: {text}")
