"""The tests of a task: sequences that no training step ever draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pha.tasks.sampler import TEST, VALIDATION
from pha.tasks.task import TASKS, Drawn, Task, generator, make_task, require
from pha.utils.processes import turns

ROWS = 1000
BLOCK = 16  # rows that are drawn at a time


@dataclass(frozen=True)
class TaskTest:
    """Sequences to answer, the same for every run.

    Attributes:
        label: its name.
        task: with the options of this test.
        length: T of a row.
        rows: how many; each holds as many sequences as fit.
    """

    label: str
    task: Task
    length: int
    rows: int

    def blocks(
        self, for_validation: bool, rows: int | None = None, share: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Drawn, bool]]:
        """The sequences, some rows at a time, and whether they count, as `turns` says.

        Args:
            for_validation: those of validation, or else of the test proper.
            rows: only the first so many.
            share: (rank, ranks) when several processes take turns at the blocks.
        """
        rows = self.rows if rows is None else min(rows, self.rows)
        for first, counts in turns(range(0, rows, BLOCK), share):
            random = generator(VALIDATION if for_validation else TEST, first // BLOCK)
            yield self.task.draw(random, min(BLOCK, rows - first), self.length), counts

    def describe(self) -> dict[str, Any]:
        """How it is measured, for a result to carry."""
        return {"sequence_length": self.length, "rows": self.rows, "options": asdict(self.task)}


def make_tests(
    name: str, options: Mapping[str, Any], tests: Mapping[str, Mapping[str, Any]], length: int
) -> list[TaskTest]:
    """The checked tests of a task, in order.

    Args:
        name: of the task.
        options: of its training sequences.
        tests: label -> options that differ, and `length` and `rows`; none is one called `test`.
        length: T of training, and of tests that do not say.

    Raises:
        PHAError: no such task or option, or one that is impossible.
    """
    make_task(name, options).check(length)
    found = []
    for label, changes in (tests or {"test": {}}).items():
        where = f"data.tests: {label}"
        sizes = {"length": length, "rows": ROWS} | {
            key: value for key, value in changes.items() if key in ("length", "rows")
        }
        for key, value in sizes.items():
            require(type(value) is int and value >= 1, f"{where}: {key} is {value!r}; at least 1")
        own = {key: value for key, value in changes.items() if key not in sizes}
        task = make_task(name, {**options, **own}, where)
        task.check(sizes["length"])
        found.append(TaskTest(str(label), task, **sizes))
    return found


def recipe_of(name: str) -> dict[str, Any]:
    """What the recipe of a task sets: `section.key` -> value."""
    kind = TASKS[name]
    data = {"task": name, "sequence_length": kind.length, "tests": kind.tests}
    return {f"data.{key}": value for key, value in data.items()} | kind.settings
