"""The contract of a task, and the table that turns a name in a recipe into a class.

A task of one's own is a class and a line:

    @register_task("copy")
    class Copy(Task):
        ...

after which `pha train PRESET.copy` works.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from pha.utils.errors import PHAError
from pha.utils.records import record_from

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE = -100
"""The label of a place where nothing is asked."""


class Drawn(NamedTuple):
    """Sequences of a task, N of T tokens.

    `tokens` (N, T) int64; `labels` (N, T) int64, the token to answer at each place, or `IGNORE`;
    `distances` (N, T) int64, at the labels, how many tokens before it stands what the answer rests
    on, or None where that is the whole sequence.
    """

    tokens: np.ndarray
    labels: np.ndarray
    distances: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sequences with labels, drawn anew whenever they are asked for.

    A subclass is a frozen dataclass whose fields are the task's options, each with a default. It
    says what its tokens are called, draws sequences, and refuses options that do not fit.

    Attributes:
        length: T of its recipe.
        tests: of its recipe: label -> options that differ, `length` and `rows`; the first decides.
        settings: of its recipe, over those that all tasks share: `section.key` -> value.
    """

    length: ClassVar[int] = 256
    tests: ClassVar[dict[str, dict[str, Any]]] = {"test": {}}
    settings: ClassVar[dict[str, Any]] = {}

    def words(self) -> list[str]:
        """What each token is called, by id: all different, without spaces."""
        raise NotImplementedError

    def check(self, length: int) -> None:
        """Refuse options that are impossible, or do not fit into sequences of `length` tokens.

        Raises:
            PHAError: naming the option and what would be right.
        """

    def draw(self, random: np.random.Generator, rows: int, length: int) -> Drawn:
        """Draw sequences that fill `rows` rows of `length` tokens.

        They are N = rows * (length // T) sequences of T tokens, at most `length`: those of the
        first row first.
        """
        raise NotImplementedError

    def best(self, drawn: Drawn) -> np.ndarray | None:
        """Nats (N, T) at each label of the best predictor there is, or None where 0 is possible."""


TASKS: dict[str, type[Task]] = {}
"""Name in a recipe -> class. `register_task` adds to it."""

_T = TypeVar("_T", bound=type[Task])


def register_task(name: str) -> Callable[[_T], _T]:
    """Class decorator: make a task known under `name`.

    Raises:
        PHAError: another class has that name.
    """

    def register(cls: _T) -> _T:
        if TASKS.setdefault(name, cls) is not cls:
            raise PHAError(f"there is a task {name!r} already: {TASKS[name].__name__}")
        return cls

    return register


def make_task(name: str, options: Mapping[str, Any], where: str = "data.task_options") -> Task:
    """The task called `name` with these options.

    Raises:
        PHAError: no such task (the nearest names are suggested), an option that it does not have,
            or of another type.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4) or sorted(TASKS)
        raise PHAError(f"there is no task {name!r}; choose {' or '.join(near)}")
    kind = TASKS[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise PHAError(
                f"{where}: task {name} has no option {option!r}; it has "
                f"{', '.join(known) or 'none'}"
            )
    return record_from(kind, dict(options), where)


def generator(*numbers: int) -> np.random.Generator:
    """Random numbers that depend on these numbers, not negative, alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


def require(condition: bool, message: str) -> None:
    """Refuse the options of a task.

    Raises:
        PHAError: the condition does not hold.
    """
    if not condition:
        raise PHAError(f"task: {message}")


def distinct(random: np.random.Generator, rows: int, among: int, many: int) -> np.ndarray:
    """Different numbers below `among` in random order: (rows, many)."""
    return random.random((rows, among)).argsort(axis=1)[:, :many]


def one_of(random: np.random.Generator, choices: list[Any], odds: list[float] | None) -> Any:
    """One of the choices: with these odds, or all alike; a single one needs no odds."""
    weights = np.ones(len(choices)) if odds is None or len(choices) == 1 else np.array(odds)
    return choices[random.choice(len(choices), p=weights / weights.sum())]


def require_odds(name: str, choices: list[Any], odds: list[float] | None) -> None:
    """Refuse choices without any, or odds that are not one for each.

    Raises:
        PHAError: as said.
    """
    require(bool(choices), f"{name} is empty; name at least one")
    fits = odds is None or len(choices) in (1, len(odds))
    require(fits, f"odds has {len(odds or ())} numbers for {len(choices)} of {name}; one for each")
    good = all(0 < each < math.inf for each in odds or [1.0])
    require(good, f"odds is {odds}; each must be above 0")


def words_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word is a token, by its place in `words`; there is no special token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab=ids, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
