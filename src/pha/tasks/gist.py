"""Global statistics: every sequence has frequencies of its own, which have to be counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pha.tasks.task import Drawn, Task, register_task, require


@register_task("gist")
@dataclass(frozen=True, kw_only=True)
class Gist(Task):
    """Tokens of frequencies that come from a Dirichlet distribution; every next token is asked.

    Attributes:
        size: tokens there are.
        concentration: of the Dirichlet distribution, for each of them.
        redraw: odds that the frequencies are drawn anew before a token.
    """

    size: int = 64
    concentration: float = 0.2
    redraw: float = 0.0

    tests: ClassVar = {"256": {"rows": 256}, "4096": {"length": 4096, "rows": 16}}
    settings: ClassVar = {"run.steps": 400}

    def words(self) -> list[str]:
        """Numbered."""
        return [f"w{i}" for i in range(self.size)]

    def check(self, length: int) -> None:
        """See `Task.check`."""
        require(self.size > 1, f"size is {self.size}; at least 2")
        require(
            0 < self.concentration < math.inf, f"concentration is {self.concentration}; above 0"
        )
        require(0 <= self.redraw < 1, f"redraw is {self.redraw}; from 0 to below 1")

    def draw(self, random: np.random.Generator, rows: int, length: int) -> Drawn:
        """See `Task.draw`."""
        drawn = np.empty((rows, length + 1), dtype=np.int64)
        anew = random.random(drawn.shape) < self.redraw
        anew[:, 0] = False
        for row, segment in zip(drawn, anew.cumsum(axis=1), strict=True):
            sizes = random.standard_gamma(self.concentration, (segment[-1] + 1, self.size))
            steps = sizes.cumsum(axis=1)
            mass = random.random(length + 1) * steps[segment, -1]
            row[:] = (steps[segment] <= mass[:, None]).sum(axis=1).clip(max=self.size - 1)
        return Drawn(drawn[:, :-1], drawn[:, 1:])

    def best(self, drawn: Drawn) -> np.ndarray:
        """Of the predictor that knows how sequences are drawn: exact, by Bayes' rule.

        Without redraws the next token is v with (n_v + c) / (t + V c). With them it is the mean of
        that over where the present frequencies may have begun, each with its probability given the
        tokens so far (the run-length recursion of Adams and MacKay, 2007).
        """
        x = np.concatenate([drawn.tokens[:, :1], drawn.labels], axis=1)
        (n, total), rows = x.shape, np.arange(len(x))
        starts = total if self.redraw else 1
        counts = np.zeros((self.size, n, starts))  # of each token from each start on
        log_odds = np.full((n, starts), -np.inf)  # of each start, given the tokens so far
        log_odds[:, 0] = 0.0
        nats = np.empty((n, total))
        for t in range(total):
            known = min(t + 1, starts)
            if self.redraw and t:
                log_odds[:, :t] += np.log1p(-self.redraw)
                log_odds[:, t] = np.log(self.redraw)
            seen = t - np.arange(known)
            mass = counts[x[:, t], rows, :known] + self.concentration
            log_odds[:, :known] += np.log(mass / (seen + self.size * self.concentration))
            nats[:, t] = -np.logaddexp.reduce(log_odds[:, :known], axis=1)
            log_odds[:, :known] += nats[:, t, None]
            counts[x[:, t], rows, :known] += 1
        return nats[:, 1:]
