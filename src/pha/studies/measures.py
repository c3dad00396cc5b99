"""The figures of a run that studies compare, and how each is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pha.results import Evaluation, RunResult
from pha.studies.seeds import Summary
from pha.utils.text import DASH, count


@dataclass(frozen=True)
class Measure:
    """A figure of a finished run."""

    heading: str  # of its column, with the unit
    words: str  # in a sentence
    value: Callable[[RunResult], float | None]  # None where the run does not have it
    digits: int  # after the point
    lower_is_better: bool | None = True  # None where neither is better

    def show(self, summary: Summary | None) -> str:
        """Mean and deviation, or a dash."""
        if summary is None:
            return DASH
        return count(summary.mean) if self.lower_is_better is None else summary.show(self.digits)


def _test(value: Callable[[Evaluation], float]) -> Callable[[RunResult], float | None]:
    return lambda result: value(result.evaluations[0])


def _candidate(name: str) -> Callable[[RunResult], float | None]:
    return lambda r: None if (found := r.candidate(name)) is None else found.evaluation.perplexity


def _validation(result: RunResult) -> float | None:
    chosen = result.candidate(result.chosen or "")
    return None if chosen is None else chosen.validation_perplexity


MEASURES: dict[str, Measure] = {
    "parameters": Measure("parameters", "size", lambda r: r.model.parameters.total, 0, None),
    "validation": Measure("validation, per token", "validation perplexity", _validation, 2),
    "test": Measure(
        "test, per token", "test perplexity per token", _test(lambda e: e.perplexity), 2
    ),
    "best": Measure(
        "best checkpoint, per token",
        "test perplexity of the best checkpoint",
        _candidate("best checkpoint"),
        2,
    ),
    "average": Measure(
        "average, per token", "test perplexity of the average", _candidate("average"), 2
    ),
    "word": Measure("per word", "test perplexity per word", _test(lambda e: e.word_perplexity), 1),
    "byte": Measure("per byte", "test perplexity per byte", _test(lambda e: e.byte_perplexity), 4),
    "bits": Measure("bits/byte", "bits per byte", _test(lambda e: e.bits_per_byte), 4),
    "accuracy": Measure("accuracy, %", "accuracy", _test(lambda e: 100 * e.accuracy), 2, False),
    "speed": Measure(
        "training tokens/s", "training speed", lambda r: r.tokens_per_second, 0, False
    ),
    "seconds": Measure("training time, s", "time of training", lambda r: r.seconds, 0),
    "flops": Measure("FLOP/token", "work for a token", lambda r: r.model.flops_per_token, 0, None),
    "cache": Measure("cache, bytes", "size of the cache", lambda r: r.model.cache_bytes, 0, None),
    "memory": Measure("memory, GB", "peak memory", lambda r: r.peak_memory_bytes / 1e9, 2),
}
"""Name in a study -> measure. Perplexities are on the test split, of the weights that the
validation split chose, unless they say otherwise."""


def measure_all(result: RunResult) -> dict[str, float]:
    """Every measure that a run has, by name."""
    found = {name: measure.value(result) for name, measure in MEASURES.items()}
    # Not a number is what has no meaning for a task.
    return {
        name: float(value)
        for name, value in found.items()
        if value is not None and not math.isnan(value)
    }
