"""What may be compared with what, and what is best where it may."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pha.report.collect import Run
from pha.results import HARDWARE, Evaluation, RunResult, Scores
from pha.train.session import FREE_KEYS
from pha.utils.text import count, duration, fixed, flatten, memory, percent, perplexity

Basis = Literal["tokenizer", "data", "protocol", "hardware", "work"]
"""What runs may have in common; `work` is hardware and tokens seen."""


@dataclass(frozen=True)
class Measure:
    """A figure that runs are compared by."""

    name: str  # with the unit
    of: Callable[[Row], float | None]  # its value for a row; None where there is none
    show: Callable[[float | None], str]  # how it is printed
    # `min`, `max`, or None where neither is better
    best: Callable[[Iterable[float]], float] | None = None
    basis: Basis = "data"  # what runs must have in common before their values may be ranked

    def value(self, row: Row) -> float | None:
        """What a row has, if that is a finite number."""
        value = self.of(row)
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Row:
    """Scores on one split of run `index`, if any, and a remark where they are not final."""

    index: int
    run: Run
    scores: Scores | None
    remark: str = ""


class Best(str):
    """A printed value that is the best of those beside it."""

    best = True


@dataclass(frozen=True)
class Comparison:
    """The comparison on one split: for every row a cell for each measure."""

    split: str
    measures: list[Measure]
    rows: list[tuple[Row, list[str]]]


def _score(name: str) -> Callable[[Row], float | None]:
    return lambda row: getattr(row.scores, name, None)


def _final(value: Callable[[RunResult], float]) -> Callable[[Row], float | None]:
    return lambda row: None if row.run.result is None else value(row.run.result)


_whole, _four = partial(fixed, decimals=0), partial(fixed, decimals=4)
_percent, _percents = partial(percent, decimals=0), partial(percent, decimals=2)

QUALITY = (
    Measure("perplexity per token", _score("perplexity"), perplexity, min, "tokenizer"),
    Measure("perplexity per word", _score("word_perplexity"), perplexity, min),
    Measure("perplexity per byte", _score("byte_perplexity"), _four, min),
    Measure("bits per byte", _score("bits_per_byte"), _four, min),
    Measure("accuracy", _score("accuracy"), _percents, max, "tokenizer"),
)
SIZE = (
    Measure("parameters", _final(lambda r: r.model.parameters.total), _whole),
    Measure("tokens seen", lambda row: row.run.tokens_seen, _whole),
)
COST = (
    Measure("training tokens/s", _final(lambda r: r.tokens_per_second), _whole, max, "hardware"),
    Measure("of measured matmul rate", _final(lambda r: r.utilisation), _percent, max, "hardware"),
    Measure("peak memory", _final(lambda r: r.peak_memory_bytes), memory, min, "hardware"),
    Measure("training time", lambda row: row.run.seconds, duration, min, "work"),
)


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """One for each split that any run was evaluated on, the main split's first and widest."""
    main = main_split(runs)
    tables = []
    for split in dict.fromkeys([main, *_splits(runs)]):
        measures = [*SIZE, *QUALITY, *COST] if split == main else list(QUALITY)
        rows = [row_of(index, run, split) for index, run in enumerate(runs)]
        if split != main:
            rows = [row for row in rows if row.scores is not None]
        cells: list[list[str]] = [[] for _ in rows]
        for measure in measures:
            winners = _best(measure, rows)
            for row, line in zip(rows, cells, strict=True):
                shown = measure.show(measure.value(row))
                line.append(Best(shown) if row.index in winners else shown)
        tables.append(Comparison(split, measures, list(zip(rows, cells, strict=True))))
    return tables


def main_split(runs: Sequence[Run]) -> str:
    """The split to compare on: that of most final evaluations, `test` where that is even."""
    final = [each.split for result in results_of(runs) for each in result.evaluations]
    order = {"test": 0, "validation": 1}
    return min(_splits(runs), key=lambda s: (-final.count(s), order.get(s, 2)), default="test")


def row_of(index: int, run: Run, split: str) -> Row:
    """A run's final scores on a split, else those it had during training."""
    if run.result and (final := run.result.evaluation(split)):
        return Row(index, run, final)
    record = run.latest_eval(split)
    if record is not None:
        return Row(index, run, record, f"during training, step {record.step:,}")
    return Row(index, run, None, "not evaluated on this split")


def warnings(runs: Sequence[Run]) -> list[str]:
    """What makes a comparison wrong, one sentence or two for each."""
    found = []
    if differ(runs, "tokenizer"):
        found.append(
            "Token perplexities are not comparable: these runs were evaluated with different "
            "tokenizers (see their data below). Loss and accuracy per token are not "
            f"either{'' if differ(runs, 'data') else '; per-word and per-byte figures are'}."
        )
    if differ(runs, "data"):
        found.append(
            "Perplexities are not comparable: these runs were evaluated on different data (see "
            "below). The same holds for every other figure of quality."
        )
    elif names := _protocol_differences(runs):
        found.append(
            f"The evaluation protocol differs between runs ({', '.join(names)}; see the protocol "
            "below), and perplexity depends on it: a model that sees more context per token has "
            "the lower one for that reason alone."
        )
    found += [
        f"{run.label} diverged: from step {step:,} on there are training losses that are not "
        "finite numbers."
        for run in runs
        if (step := run.diverged_at()) is not None
    ]
    return found


def limits(runs: Sequence[Run]) -> str:
    """What these runs do not show, for want of tokens, seeds or an end."""
    results = results_of(runs)
    found = []
    seen = sorted({result.tokens_seen for result in results})
    if len(seen) > 1:
        found.append(
            f"The runs saw {count(seen[0])} to {count(seen[-1])} training tokens, so this is not a "
            "comparison at equal data."
        )
    seeds: dict[str, set[int]] = {}
    for run in runs:
        if (result := run.result) is None:
            continue
        # A recipe run with other settings is another model.
        given = [(k, v) for k, v in flatten(run.config) if k not in {"run.seed", *FREE_KEYS}]
        key = f"{result.recipe or result.name} {result.model} {given}"
        seeds.setdefault(key, set()).add(result.seed)
    fewest = min(map(len, seeds.values()), default=0)
    if fewest == 1:
        found.append("One seed does not decide which model is better.")
    elif len(seeds) == 1:
        found.append("All are one recipe: what differs is the spread between seeds.")
    elif seeds:
        found.append(f"There are at least {fewest} seeds of each: mind their spread.")
    if unfinished := [run.label for run in runs if not run.result]:
        found.append(f"Unfinished, and not ranked: {', '.join(unfinished)}.")
    return " ".join(found)


def results_of(runs: Sequence[Run]) -> list[RunResult]:
    """Of the finished ones."""
    return [run.result for run in runs if run.result]


def differ(runs: Sequence[Run], what: Basis) -> bool:
    """Whether finished runs are known to differ in what a comparison needs to be the same.

    A run that does not record it does not count as different.
    """
    results = results_of(runs)
    if what == "tokenizer":
        # Names decide only where a hash is missing.
        hashes = [result.data.get("tokenizer_sha256") for result in results]
        names = [result.data.get("tokenizer") for result in results]
        return _distinct(hashes) > 1 or (None in hashes and _distinct(names) > 1)
    if what == "data":
        sizes = {(each.words, each.bytes) for each in _main_evaluations(runs)}
        if differ(runs, "tokenizer") and sizes:
            # The hash covers token ids, which another tokenizer changes; the size of the text
            # tells whether it is the same.
            return len(sizes) > 1
        return _distinct(result.data.get("sha256") for result in results) > 1
    if what == "protocol":
        return bool(_protocol_differences(runs))
    hardware = any(
        _distinct(result.provenance.get(key) for result in results) > 1 for key in HARDWARE
    )
    return hardware or (what == "work" and _distinct(r.tokens_seen for r in results) > 1)


def _splits(runs: Sequence[Run]) -> list[str]:
    final = [each.split for result in results_of(runs) for each in result.evaluations]
    return list(dict.fromkeys([*final, *(r.split for run in runs for r in run.metrics.eval)]))


def _main_evaluations(runs: Sequence[Run]) -> list[Evaluation]:
    split = main_split(runs)
    return [each for result in results_of(runs) if (each := result.evaluation(split))]


def _protocol_differences(runs: Sequence[Run]) -> list[str]:
    """What differs in how the main split was evaluated, but for what tokenizer and data imply."""
    protocols = [evaluation.protocol for evaluation in _main_evaluations(runs)]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    return [
        key.replace("_", " ")
        for key in keys
        if key not in ("tokens_scored", "data_sha256")
        and _distinct(protocol.get(key) for protocol in protocols) > 1
    ]


def _best(measure: Measure, rows: Sequence[Row]) -> set[int]:
    """Indices of the rows that hold a measure's best value; none where ranking would mislead."""
    rows = [row for row in rows if row.run.result and measure.value(row) is not None]
    runs, values = [row.run for row in rows], [measure.value(row) for row in rows]
    if measure.best is None or len(set(values)) < 2 or differ(runs, measure.basis):
        return set()
    if measure.basis in ("tokenizer", "data") and (
        any(row.remark for row in rows) or differ(runs, "data") or differ(runs, "protocol")
    ):
        return set()
    best = measure.best(value for value in values if value is not None)
    return {row.index for row, value in zip(rows, values, strict=True) if value == best}


def _distinct(values: Iterable[Any]) -> int:
    return len({str(value) for value in values if value is not None})
