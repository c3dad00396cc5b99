"""Published figures, with all that is needed to know whether they compare with ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from pha.studies.definition import closest, make
from pha.utils.formats import read_yaml

DAGGERS = "†‡§¶#"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of a table of the paper."""

    id: str  # TABLE/NAME, such as `table-2/hyena-3`
    table: str  # such as `table-2`
    label: str  # the model
    source: str  # who reports it: `paper` for the authors' own model, else whom the paper quotes
    # on the test split, per unit; None where the table has another measure
    perplexity: float | None = None
    perplexity_std: float | None = None  # its deviation over seeds
    accuracy: float | None = None  # next-token accuracy in %
    accuracy_std: float | None = None  # its deviation over seeds
    # perplexity of the best checkpoint, where the first is of an average
    best_checkpoint: float | None = None
    unit: str = "bpe"  # what a perplexity is per: `bpe`, `word` or `wordpiece`
    parameters: float | None = None  # how many
    data: str = ""  # what it was evaluated on
    trained_on: str = ""  # what it was trained on, and how much, as far as stated
    context: int | None = None  # tokens
    family: str = ""  # kind of model
    protocol: str = ""  # how it was trained, as far as stated
    reason: str = ""  # why it does not compare with a PHA trained from scratch on the same data
    values: dict[str, Any] = field(default_factory=dict)  # other figures, by name

    @property
    def from_paper(self) -> bool:
        """Whether it is a model of the paper's authors."""
        return self.source == "paper"

    @property
    def like_for_like(self) -> bool:
        """Whether it compares with a PHA trained from scratch on the same data."""
        return not self.reason


@cache
def published_tables() -> dict[str, tuple[Published, ...]]:
    """Table -> its rows, from published.yaml."""
    tables = {}
    for table, content in read_yaml(resources.files("pha.studies") / "published.yaml").items():
        rows = []
        for name, given in content["rows"].items():
            row_id = f"{table}/{name}"
            values = {"id": row_id, "table": table} | content.get("all", {}) | given
            rows.append(make(Published, f"published {row_id}", values))
        tables[table] = tuple(rows)
    return tables


def find_published(ids: Sequence[str]) -> list[Published]:
    """Rows by id; the id of a table stands for all of its rows.

    Raises:
        PHAError: no such row or table.
    """
    tables = published_tables()
    rows = {row.id: row for table in tables.values() for row in table}
    found: list[Published] = []
    for name in ids:
        found += tables[name] if name in tables else [closest(name, rows, "published row")]
    return list({row.id: row for row in found}.values())


def footnotes(rows: Sequence[Published]) -> dict[str, str]:
    """Reason -> mark, for every reason why one of `rows` is not like for like."""
    reasons = dict.fromkeys(row.reason for row in rows if row.reason)
    size = len(DAGGERS)
    return {why: DAGGERS[i % size] * (1 + i // size) for i, why in enumerate(reasons)}
