"""The table of a study: ours by variant, and published figures apart, each with its marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pha.report.tables import Section, TextTable
from pha.studies.measures import MEASURES
from pha.studies.outcome import Outcome
from pha.studies.published import Published, find_published, footnotes
from pha.utils.text import DASH, count

# GPT-2 tokens, words with line ends, and bytes of WikiText-103's raw test split.
TOKENS, WORDS, BYTES = 286_221, 245_569, 1_290_590


def study_table(outcome: Outcome) -> TextTable:
    """Ours first, with scale and tokens seen; then the paper's own; then what others report."""
    study = outcome.plan.study
    lost = any(row.diverged for row in outcome.rows)
    headings = ["model", "seeds", *(MEASURES[name].heading for name in study.columns)]
    rows = [
        [
            row.variant.label,
            str(len(row.seeds)),
            *(MEASURES[name].show(row.summary(name)) for name in study.columns),
            *[str(row.diverged)] * lost,
        ]
        for row in outcome.rows
    ]
    data = sorted({Path(result.data["source"]).name for result in outcome.results})
    about = f"{outcome.plan.scale.words}, {outcome.tokens} tokens seen, {', '.join(data)}"
    sections = [Section("ours", about, rows)]
    published = find_published(study.published)
    marks = footnotes(published)
    known = {"paper": "paper", "quoted": "quoted by the paper"}
    for source in sorted({row.source for row in published}, key=lambda x: [*known, x].index(x)):
        chosen = [row for row in published if row.source == source and row.perplexity is not None]
        if chosen:
            cells = [
                [
                    f"{row.label} (paper)"
                    if row.from_paper
                    else row.label + marks.get(row.reason, ""),
                    DASH,
                    *(published_cell(row, name) for name in study.columns),
                    *[DASH] * lost,
                ]
                for row in chosen
            ]
            where = ", ".join(sorted({row.data for row in chosen}))
            grey = [not row.like_for_like for row in chosen]
            sections.append(Section(known.get(source, source), where, cells, grey))
    title = f"{study.title} ({study.paper})" if study.paper else study.title
    headings += ["diverged"] * lost
    return TextTable(title, headings, sections, _notes(outcome, published, marks))


def published_cell(row: Published, measure: str) -> str:
    """What a published row has in a column; a figure worked out from another one has a ≈."""
    perplexity, per_token = row.perplexity, row.unit != "word"
    if measure == "parameters":
        return DASH if row.parameters is None else count(row.parameters)
    if measure == "accuracy" and row.accuracy is not None:
        return _with(row.accuracy, row.accuracy_std)
    if measure == "best" and row.best_checkpoint is not None:
        return f"{row.best_checkpoint:.2f}"
    if perplexity is None:
        return DASH
    if measure == "test" and per_token:
        shown = _with(perplexity, row.perplexity_std)
        return f"{shown} (WordPiece)" if row.unit == "wordpiece" else shown
    if measure == "average" and row.best_checkpoint is not None:
        return _with(perplexity, row.perplexity_std)
    if measure == "word" and not per_token:
        return _with(perplexity, row.perplexity_std)
    if measure in ("word", "byte") and row.unit == "bpe" and row.data == "WikiText-103":
        units, digits = (WORDS, 1) if measure == "word" else (BYTES, 4)
        return f"≈ {perplexity ** (TOKENS / units):.{digits}f}"
    return DASH


def _with(value: float, std: float | None) -> str:
    return f"{value:.2f}" if std is None else f"{value:.2f} ± {std:.2f}"


def _notes(outcome: Outcome, published: Sequence[Published], marks: dict[str, str]) -> list[str]:
    notes = [
        "Perplexity on the test split; mean ± standard deviation over seeds. "
        "The validation split chooses the weights."
    ]
    if published and any(row.perplexity is not None for row in published):
        if outcome.plan.scale.name != "paper":
            notes.append(
                "Published figures are of full-size models on full data: they give the order to "
                "expect, not a value to compare ours with."
            )
        if any(row.data == "WikiText-103" and row.unit == "bpe" for row in published):
            notes.append(
                f"≈: worked out with the raw test split's {TOKENS:,} GPT-2 tokens, {WORDS:,} words "
                f"and line ends and {BYTES:,} bytes."
            )
    return notes + [f"{mark} not like for like: {reason}." for reason, mark in marks.items()]
