"""The result of a comparison in a few sentences, with the limits of what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pha.report.collect import Run
from pha.report.compare import QUALITY, Row, differ, join, main_split, row_of
from pha.utils.text import count, duration, fixed, percent, perplexity


def headline(runs: Sequence[Run]) -> str:
    """What these runs show, and what they do not."""
    finished = [run for run in runs if run.result is not None]
    unfinished = [run.label for run in runs if run.result is None]
    if not finished:
        return " ".join(_progress(run) for run in runs)
    split = main_split(finished)
    rows = [row_of(index, run, split) for index, run in enumerate(finished)]
    parts = [_ranking(rows, split)] if len(rows) > 1 else [_single(rows[0], split)]
    if len(rows) > 1:
        parts += [_tokens(finished), _speed(finished)]
    parts.append(_seeds(finished))
    if unfinished:
        verb = "is" if len(unfinished) == 1 else "are"
        parts.append(f"{join(unfinished)} {verb} unfinished and not part of this comparison.")
    return " ".join(part for part in parts if part)


def _ranking(rows: Sequence[Row], split: str) -> str:
    runs = [row.run for row in rows]
    if differ(runs, "data"):
        return (
            f"These {len(runs)} runs were evaluated on different data, so their perplexities do "
            "not say which is better."
        )
    final = [row for row in rows if not row.remark]
    if len(final) > 1:
        rows = final
    per_token, per_byte = QUALITY[0], QUALITY[2]
    column = per_byte if differ(runs, "tokenizer") else per_token
    scored = [(value, row) for row in rows if (value := column.value(row)) is not None]
    if len(scored) < 2 and column is per_token:
        column = per_byte
        scored = [(value, row) for row in rows if (value := column.value(row)) is not None]
    if len(scored) < 2:
        return f"Fewer than two of these runs have a {split} perplexity to compare."
    scored.sort(key=lambda pair: pair[0])
    (low, first), (second_low, second), (high, last) = scored[0], scored[1], scored[-1]
    if low == high:
        return f"{join([row.run.label for _, row in scored])} have the same {split} perplexity."
    unit = column.unit
    if len(scored) > 2:
        lead = (
            f"Of {len(scored)} runs, {first.run.label} has the lowest {split} perplexity: "
            f"{perplexity(low)} {unit}, {_below(low, second_low)} the next, {second.run.label} "
            f"({perplexity(second_low)}), and {_below(low, high)} the highest, "
            f"{last.run.label} ({perplexity(high)})"
        )
    else:
        lead = (
            f"{first.run.label} has the lower {split} perplexity: {perplexity(low)} {unit}, "
            f"{_below(low, high)} {last.run.label} ({perplexity(high)})"
        )
        a, b = per_byte.value(first), per_byte.value(last)
        if column is per_token and a is not None and b is not None:
            lead += f"; per byte it is {perplexity(a)} against {perplexity(b)} ({_below(a, b)})"
    if any(row.remark for _, row in scored):
        lead += ", measured during training and not on the chosen weights"
    if differ(runs, "protocol"):
        lead += ", but by different evaluation protocols"
    return f"{lead}."


def _below(value: float, reference: float) -> str:
    change = 1 - value / reference if reference else 0.0
    return f"{percent(abs(change))} {'below' if change >= 0 else 'above'}"


def _single(row: Row, split: str) -> str:
    run = row.run
    values = [
        f"{perplexity(value)} {column.unit}"
        for column in (QUALITY[0], QUALITY[2])
        if (value := column.value(row)) is not None
    ]
    sentence = f"{run.label} finished"
    if values:
        sentence = f"{run.label} reaches a {split} perplexity of {' and '.join(values)}"
    if run.tokens_seen is not None:
        sentence += f" after {count(run.tokens_seen)} training tokens"
    if run.seconds is not None:
        sentence += f" in {duration(run.seconds)}"
    return f"{sentence}."


def _progress(run: Run) -> str:
    sentence = f"{run.label} is unfinished"
    if run.tokens_seen is not None:
        sentence += f": {count(run.tokens_seen)} tokens seen so far"
    point = run.latest_eval("validation")
    if point is not None:
        sentence += f", validation perplexity {perplexity(point.perplexity)} per token"
        sentence += f" at step {point.step:,}"
    return f"{sentence}."


def _tokens(runs: Sequence[Run]) -> str:
    seen = [(run.tokens_seen, run.label) for run in runs if run.tokens_seen is not None]
    if len(seen) < len(runs):
        return ""
    if len({tokens for tokens, _ in seen}) == 1:
        every = "Both" if len(runs) == 2 else "All"
        return f"{every} saw {count(seen[0][0])} training tokens."
    if len(seen) == 2:
        (a, first), (b, second) = seen
        amounts = f"{first} saw {count(a)} training tokens and {second} {count(b)}"
    else:
        amounts = f"They saw between {count(min(seen)[0])} and {count(max(seen)[0])} tokens"
    return f"{amounts}, so this is not a comparison at equal data."


def _speed(runs: Sequence[Run]) -> str:
    speeds = [(run.tokens_per_second, run.label) for run in runs if run.tokens_per_second]
    if len(speeds) < 2:
        return ""
    (slow, slowest), (fast, _) = min(speeds), max(speeds)
    if differ(runs, "hardware"):
        return "Their speeds are not compared: hardware, threads or precision differ."
    if fixed(slow, 0) == fixed(fast, 0):
        return f"They trained at the same speed, {fixed(fast, 0)} tokens/s."
    degree = "faster" if len(speeds) == 2 else "fastest"
    fastest = join([label for speed, label in speeds if fixed(speed, 0) == fixed(fast, 0)])
    return (
        f"{fastest} trained {degree}: {fixed(fast, 0)} tokens/s against {fixed(slow, 0)} for "
        f"{slowest} (+{percent(fast / slow - 1)})."
    )


def _seeds(runs: Sequence[Run]) -> str:
    """How much the number of seeds lets a reader conclude."""
    seeds: dict[tuple[Any, ...], set[str]] = {}
    for run in runs:
        # A recipe run with other settings is another model: size and preset tell them apart.
        what = (run.recipe or run.label, run.result and run.result.model.preset, run.parameters)
        seeds.setdefault(what, set()).add(str(run.seed))
    fewest = min(len(group) for group in seeds.values())
    if len(runs) == 1:
        return "This is one seed."
    if len(seeds) == 1 and fewest > 1:
        return "All are one recipe with different seeds: what differs is the spread between seeds."
    if all(len(group) == 1 for group in seeds.values()):
        return "There is one seed each, and one seed does not decide which is better."
    if fewest == 1:
        return "Some have one seed only, and one seed does not decide which is better."
    return f"There are at least {fewest} seeds of each: look at their spread before deciding."
