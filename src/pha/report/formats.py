"""One table of text in four formats: terminal, Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

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
    """Rows that belong together, under a line that says where they come from.

    Attributes:
        title: in a word or two, such as `ours`.
        about: such as `scale tiny, 983k tokens seen`.
        rows: a cell for each heading.
        grey: of each row, whether it is only context.
    """

    title: str
    about: str
    rows: Sequence[Sequence[str]]
    grey: Sequence[bool] = ()

    @property
    def line(self) -> str:
        """Title and what there is to say about it."""
        return f"{self.title}: {self.about}"


@dataclass(frozen=True)
class TextTable:
    """Headings, sections of rows, and notes below.

    Attributes:
        title: what is shown.
        headings: of the columns; the first column names the rows.
        sections: at least one.
        notes: a line each.
    """

    title: str
    headings: Sequence[str]
    sections: Sequence[Section]
    notes: Sequence[str] = ()

    def to_rich(self, width: int) -> list[Table]:
        """For a terminal; what `below` says is to be printed after it.

        Args:
            width: of the terminal, in characters. Columns that do not fit go to further tables,
                each with the first column.
        """
        widths = [self._width(column) for column in range(len(self.headings))]
        blocks: list[list[int]] = [[]]
        for column in range(1, len(widths)):
            used = widths[0] + sum(widths[c] for c in blocks[-1])
            if blocks[-1] and used + widths[column] > width:
                blocks.append([])
            blocks[-1].append(column)
        tables = [self._rich([0, *block]) for block in blocks]
        tables[0].title = escape(self.title)
        return tables

    def _width(self, column: int) -> int:
        """Of the longest cell or word of the heading, with the gap after it."""
        cells = [row[column] for section in self.sections for row in section.rows]
        return 2 + max(map(len, [*cells, *self.headings[column].split()]), default=0)

    def _rich(self, columns: Sequence[int]) -> Table:
        table = Table(title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            table.add_column(
                escape(self.headings[column]),
                justify="right" if column else "left",
                min_width=self._width(column) - 2,
            )
        for section in self.sections:
            table.add_section()
            table.add_row(f"[italic]{escape(section.title)}[/]")
            for row, grey in _rows(section):
                cells = [escape(row[column]) for column in columns]
                table.add_row(*cells, style="dim" if grey else None)
        return table

    @property
    def below(self) -> list[str]:
        """What there is to say of the sections, and the notes."""
        return [*(section.line for section in self.sections), *self.notes]

    def to_markdown(self) -> str:
        """A table and its notes; rows that are only context in italics."""
        lines = [f"**{self.title}**", "", _pipe(self.headings)]
        lines.append(_pipe(["---", *["---:"] * (len(self.headings) - 1)]))
        for section in self.sections:
            lines.append(_pipe([f"**{section.line}**", *[""] * (len(self.headings) - 1)]))
            for row, grey in _rows(section):
                lines.append(_pipe([f"*{cell}*" if grey and cell else cell for cell in row]))
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
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{\textit{{{_tex(section.line)}}}}} \\")
            for row, grey in _rows(section):
                cells = [rf"\textcolor{{gray}}{{{_tex(c)}}}" if grey else _tex(c) for c in row]
                lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\small {_tex(note)}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}", ""])

    def to_csv(self) -> str:
        """Rows with their section in the first column; the notes are left to the other formats."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["from", *self.headings])
        for section in self.sections:
            writer.writerows([section.line, *row] for row in section.rows)
        return buffer.getvalue()


def _rows(section: Section) -> list[tuple[Sequence[str], bool]]:
    greys = section.grey or [False] * len(section.rows)
    return list(zip(section.rows, greys, strict=True))


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
