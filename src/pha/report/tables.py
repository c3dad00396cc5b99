"""Tables, each written once: to a terminal, as Markdown, LaTeX (booktabs) or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from pha.report.collect import Run
from pha.report.compare import Best, comparisons
from pha.report.figures import branch_names, mean_share, shares_of
from pha.results import LayerMixing, MixingRecord, RunResult
from pha.utils.text import DASH, percent, perplexity

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "–": "--",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "§": r"\S{}",
    "¶": r"\P{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


@dataclass(frozen=True)
class Section:
    """Rows that belong together, under a line that says where they come from, if there is one."""

    title: str  # in a word or two, such as `ours`; empty for a section without a line
    about: str  # such as `scale tiny, 983k tokens seen`
    rows: Sequence[Sequence[str]]  # a cell for each heading
    grey: Sequence[bool] = ()  # of each row, whether it is only context

    @property
    def line(self) -> str:
        """Title and what there is to say about it."""
        return f"{self.title}: {self.about}" if self.title else ""

    def marked_rows(self) -> list[tuple[Sequence[str], bool]]:
        """Every row, and whether it is grey."""
        return list(zip(self.rows, self.grey or [False] * len(self.rows), strict=True))


@dataclass(frozen=True)
class TextTable:
    """Headings, sections of rows, and notes below. `console.print` shows it."""

    title: str  # what is shown
    headings: Sequence[str]  # of the columns; the first column names the rows
    sections: Sequence[Section]  # at least one
    notes: Sequence[str] = ()  # a line each

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """For a terminal. Columns that do not fit go to further tables, each with the first."""
        widths = [self._width(column) for column in range(len(self.headings))]
        blocks: list[list[int]] = [[]]
        for column in range(1, len(widths)):
            used = widths[0] + sum(widths[c] for c in blocks[-1])
            if blocks[-1] and used + widths[column] > options.max_width:
                blocks.append([])
            blocks[-1].append(column)
        yield Text(self.title, style="italic")
        for block in blocks:
            yield self._part([0, *block])
        below = [*filter(None, (section.line for section in self.sections)), *self.notes]
        if below:
            yield Text("\n".join(below))

    def _width(self, column: int) -> int:
        """Of the longest cell or word of the heading, with the gap after it."""
        cells = [row[column] for section in self.sections for row in section.rows]
        return 2 + max(map(len, [*cells, *self.headings[column].split()]), default=0)

    def _part(self, columns: Sequence[int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            table.add_column(
                Text(self.headings[column]),
                justify="right" if column else "left",
                min_width=self._width(column) - 2,
                no_wrap=len(self.headings[column]) <= self._width(column) - 2,
            )
        for section in self.sections:
            table.add_section()
            if section.title:
                table.add_row(Text(section.title, style="italic"))
            for row, grey in section.marked_rows():
                cells = [_cell(row[column]) for column in columns]
                table.add_row(*cells, style="dim" if grey else None)
        return table

    def to_markdown(self) -> str:
        """A table and its notes; rows that are only context in italics."""
        empty = [""] * (len(self.headings) - 1)
        lines = [f"**{self.title}**", "", _pipe(self.headings)]
        lines.append(_pipe(["---", *["---:"] * len(empty)]))
        for section in self.sections:
            if section.title:
                lines.append(_pipe([f"**{section.line}**", *empty]))
            for row, grey in section.marked_rows():
                cells = [_styled(cell, "**{}**") for cell in row]
                lines.append(_pipe([f"*{cell}*" if grey and cell else cell for cell in cells]))
        # A blank line between notes keeps each on a line of its own.
        return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in self.notes)

    def to_latex(self) -> str:
        """A `table` for the booktabs and xcolor packages."""
        width = len(self.headings)
        lines = [
            r"\begin{table}",
            rf"\caption{{{_tex(self.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
            r"\toprule",
            " & ".join(map(_tex, self.headings)) + r" \\",
        ]
        for section in self.sections:
            lines.append(r"\midrule")
            if section.title:
                line = rf"\multicolumn{{{width}}}{{l}}{{\textit{{{_tex(section.line)}}}}}"
                lines.append(line + r" \\")
            for row, grey in section.marked_rows():
                cells = [_styled(cell, r"\textbf{{{}}}", _tex) for cell in row]
                cells = [rf"\textcolor{{gray}}{{{c}}}" if grey else c for c in cells]
                lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\small {_tex(note)}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}", ""])

    def to_csv(self) -> str:
        """Rows, with their section in the first column; the notes are left to other formats."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["from", *self.headings])
        for section in self.sections:
            writer.writerows([section.line, *row] for row in section.rows)
        return buffer.getvalue()


def _cell(cell: str) -> Text:
    return Text(cell, style="bold" if isinstance(cell, Best) else "")


def _styled(cell: str, best: str, quote: Callable[[str], str] = str) -> str:
    return best.format(quote(cell)) if isinstance(cell, Best) else quote(cell)


def _pipe(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def results_table(results: Sequence[RunResult]) -> TextTable:
    """Runs side by side, a column each; the best of each row in bold where they may be ranked."""
    comparison = comparisons([Run.of(result) for result in results])[0]
    rows = [
        [measure.name, *(cells[index] for _, cells in comparison.rows)]
        for index, measure in enumerate(comparison.measures)
    ]
    for name in ("best checkpoint", "average"):
        if any(len(result.candidates) > 1 for result in results):
            rows.append([f"perplexity, {name}", *(_of_candidate(each, name) for each in results)])
    title = f"on the {comparison.split} split"
    return TextTable(title, ["", *(result.name for result in results)], [Section("", "", rows)])


def _of_candidate(result: RunResult, name: str) -> str:
    """Perplexity of the best checkpoint or of the average; the chosen one is marked."""
    candidate = result.candidate(name)
    if candidate is None:
        return DASH
    mark = " (chosen)" if result.chosen == name else ""
    return f"{perplexity(candidate.evaluation.perplexity)}{mark}"


def mixing_table(layers: Sequence[LayerMixing], title: str) -> TextTable:
    """Weight and effective share of each branch by layer, and means over the layers that mix it."""
    weights, effective = shares_of(layers, "weights"), shares_of(layers, "effective")
    names = branch_names(weights)
    rows = [
        [str(index), *(_share(w.get(name), e.get(name)) for name in names)]
        for index, (w, e) in enumerate(zip(weights, effective, strict=True))
    ]
    means = [_share(mean_share(weights, name), mean_share(effective, name)) for name in names]
    sections = [Section("", "", rows), Section("", "", [["mean", *means]])]
    return TextTable(title, ["layer", *names], sections)


def _share(weight: float | None, effective: float | None) -> str:
    return DASH if weight is None else f"{percent(weight)} ({percent(effective)})"


def mixing_history_table(records: Sequence[MixingRecord]) -> TextTable:
    """Mean weight over the layers that mix a branch with others, at every recorded step."""
    names = branch_names(shares_of(records[0].layers, "weights"))
    rows = []
    for record in records:
        weights = shares_of(record.layers, "weights")
        shares = [percent(mean_share(weights, name), 2) for name in names]
        rows.append([f"{record.step:,}", *shares])
    title = "mean weight over the layers, by step"
    return TextTable(title, ["step", *names], [Section("", "", rows)])
