"""What may be compared with what, and what is best where it may."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pha.report.collect import Run
from pha.results import Evaluation, Scores
from pha.utils.text import DASH, count, duration, fixed, memory, perplexity

Basis = Literal["tokenizer", "data", "protocol", "hardware", "work"]
"""What runs may have in common; `work` is hardware and tokens seen."""


@dataclass(frozen=True)
class Column:
    """A column of the comparison: heading, unit, value of a row, printing, which end is best.

    `basis` is what runs must have in common before their values may be ranked.
    """

    heading: str
    unit: str
    of: Callable[[Row], float | None]
    show: Callable[[float | None], str]
    best: Callable[[Iterable[float]], float] | None = None
    basis: Basis = "data"

    def value(self, row: Row) -> float | None:
        """What a row has here, if that is a finite number."""
        value = self.of(row)
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Row:
    """Scores on one split of run `index`, if any, and a remark where they are not final."""

    index: int
    run: Run
    scores: Scores | None
    remark: str = ""


@dataclass(frozen=True)
class Cell:
    """A printed value, and whether it is the best of its column."""

    text: str
    best: bool


@dataclass(frozen=True)
class Comparison:
    """The comparison table of one split."""

    split: str
    columns: list[Column]
    rows: list[tuple[Row, list[Cell]]]


def _score(name: str) -> Callable[[Row], float | None]:
    return lambda row: getattr(row.scores, name, None)


QUALITY = (
    Column(
        "Perplexity",
        "per token",
        _score("perplexity"),
        perplexity,
        min,
        "tokenizer",
    ),
    Column("Perplexity", "per word", _score("word_perplexity"), perplexity, min, "data"),
    Column("Perplexity", "per byte", _score("byte_perplexity"), perplexity, min, "data"),
    Column("Bits", "per byte", _score("bits_per_byte"), lambda v: fixed(v, 3), min, "data"),
    Column(
        "Accuracy",
        "next token, %",
        _score("accuracy"),
        lambda v: fixed(None if v is None else 100 * v, 2),
        max,
        "tokenizer",
    ),
)
SIZE = (
    Column("Parameters", "total", lambda r: r.run.parameters, count),
    Column("Tokens", "seen", lambda r: r.run.tokens_seen, count),
)
COST = (
    Column(
        "Speed",
        "tokens/s",
        lambda r: r.run.tokens_per_second,
        lambda v: fixed(v, 0),
        max,
        "hardware",
    ),
    Column(
        "Memory",
        "peak",
        lambda r: r.run.result.peak_memory_bytes if r.run.result else None,
        memory,
        min,
        "hardware",
    ),
    Column("Time", "training", lambda r: r.run.seconds, duration, min, "work"),
)


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    """One table per split that any run was evaluated on, the main split's first and widest."""
    main = main_split(runs)
    splits = [main, *(split for split in _splits(runs) if split != main)]
    tables = []
    for split in splits:
        columns = [*SIZE, *QUALITY, *COST] if split == main else list(QUALITY)
        rows = [row_of(index, run, split) for index, run in enumerate(runs)]
        if split != main:
            rows = [row for row in rows if row.scores is not None]
        winners = [_best(column, rows) for column in columns]
        cells = [
            [
                Cell(column.show(column.value(row)), any(row is winner for winner in winning))
                for column, winning in zip(columns, winners, strict=True)
            ]
            for row in rows
        ]
        tables.append(Comparison(split, columns, list(zip(rows, cells, strict=True))))
    return tables


def main_split(runs: Sequence[Run]) -> str:
    """The split to compare on: that of most final evaluations, `test` where that is even."""
    counts = {
        split: sum(run.evaluation(split) is not None for run in runs) for split in _splits(runs)
    }
    order = {"test": 0, "validation": 1}
    return min(counts, key=lambda s: (-counts[s], order.get(s, 2)), default="test")


def row_of(index: int, run: Run, split: str) -> Row:
    """A run's final scores on a split, else those it had during training."""
    final = run.evaluation(split)
    if final is not None:
        return Row(index, run, final)
    point = run.latest_eval(split)
    if point is not None:
        return Row(index, run, point, f"during training, step {point.step:,}")
    return Row(index, run, None, "not evaluated on this split")


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing, one sentence or two for each."""
    found = []
    if differ(runs, "tokenizer"):
        found.append(
            "Token perplexities are not comparable: these runs were evaluated with different "
            f"tokenizers ({_listing(runs, 'tokenizer')}). Loss and accuracy per token are not "
            f"either{'' if differ(runs, 'data') else '; per-word and per-byte figures are'}."
        )
    if differ(runs, "data"):
        found.append(
            "Token perplexities are not comparable: these runs were evaluated on different data "
            f"({_listing(runs, 'sha256')}). The same holds for every other figure of quality."
        )
    if not differ(runs, "data") and differ(runs, "protocol"):
        found.append(
            f"The evaluation protocol differs between runs ({join(_protocol_differences(runs))}; "
            "see the protocol below), and perplexity depends on it: a model that sees more context "
            "per token has the lower one for that reason alone."
        )
    found += [
        f"{run.label} diverged: from step {run.diverged_at():,} on there are training losses "
        "that are not finite numbers."
        for run in runs
        if run.diverged_at() is not None
    ]
    return found


def differ(runs: Sequence[Run], what: Basis) -> bool:
    """Whether runs are known to differ in what a comparison needs to be the same.

    A run that does not record it does not count as different.
    """
    if what == "tokenizer":
        # Names decide only where a hash is missing.
        return _distinct(r.data.get("tokenizer_sha256") for r in runs) > 1 or (
            any(r.data.get("tokenizer_sha256") is None for r in runs)
            and _distinct(r.data.get("tokenizer") for r in runs) > 1
        )
    if what == "data":
        evaluations = _main_evaluations(runs)
        sizes = {(e.words, e.bytes) for e in evaluations}
        if differ(runs, "tokenizer") and sizes:
            # The hash covers token ids, which another tokenizer changes; the size of the text
            # tells whether it is the same.
            return len(sizes) > 1
        return _distinct(r.data.get("sha256") for r in runs) > 1
    if what == "protocol":
        return bool(_protocol_differences(runs))
    if what == "hardware":
        return any(
            _distinct(r.provenance.get(key) for r in runs) > 1
            for key in ("device", "cpu", "threads", "precision")
        )
    return differ(runs, "hardware") or _distinct(r.tokens_seen for r in runs) > 1


def join(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _splits(runs: Sequence[Run]) -> list[str]:
    final = [e.split for run in runs for e in run.evaluations]
    return list(dict.fromkeys([*final, *(p.split for run in runs for p in run.metrics.eval)]))


def _main_evaluations(runs: Sequence[Run]) -> list[Evaluation]:
    split = main_split(runs)
    return [e for e in (run.evaluation(split) for run in runs) if e is not None]


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


def _best(column: Column, rows: Sequence[Row]) -> list[Row]:
    """Rows that hold a column's best value; none where ranking would mislead."""
    rows = [row for row in rows if row.run.result and column.value(row) is not None]
    if column.best is None or len(rows) < 2:
        return []
    runs = [row.run for row in rows]
    if column.basis in ("tokenizer", "data") and (
        any(row.remark for row in rows) or differ(runs, "data") or differ(runs, "protocol")
    ):
        return []
    if differ(runs, column.basis):
        return []
    best = column.best(value for row in rows if (value := column.value(row)) is not None)
    winners = [row for row in rows if column.value(row) == best]
    return winners if len(winners) < len(rows) else []


def _listing(runs: Sequence[Run], key: str) -> str:
    """`A: value; B: value`, hashes cut to what tells them apart at a glance."""
    values = []
    for run in runs:
        value = run.data.get(key)
        if key == "tokenizer":
            digest = run.data.get("tokenizer_sha256")
            value = " ".join(str(v) for v in (value, digest and str(digest)[:12]) if v) or None
        elif value is not None:
            value = str(value)[:12]
        if value is not None:
            values.append(f"{run.label}: {value}")
    return "; ".join(values) or DASH


def _distinct(values: Iterable[Any]) -> int:
    return len({str(value) for value in values if value is not None})
