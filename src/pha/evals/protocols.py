"""Evaluation protocols: which windows a split is cut into, and what is scored in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pha.runs import RunFolder
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from pha.loading import LoadedModel

DEFAULT_LENGTH = 1024
NAMES = ("non-overlapping", "strided", "long")


class Window(NamedTuple):
    """A stretch of tokens to score.

    Inputs are `tokens[start:end]` and targets `tokens[start + 1 : end + 1]`; the loss counts from
    position `first_scored` of the window (0-based) to its end.
    """

    start: int
    end: int
    first_scored: int


@dataclass(frozen=True)
class Protocol:
    """Windows of T inputs that advance by a stride, each scoring what earlier ones have not.

    Attributes:
        sequence_length: T, the inputs of a window, and so the most context a token is scored with.
        stride: how far windows advance, from 1 to T. At T they do not overlap and the context of a
            token is 1 to T tokens; below, it is at least T - stride + 1 after the first window.
        packed_documents: reset state and attention at document starts.
        name: what to call it in tables and results.

    Raises:
        PHAError: a length or stride out of range.
    """

    sequence_length: int
    stride: int
    packed_documents: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise PHAError(f"the sequence length is {self.sequence_length}; it must be at least 1")
        if not 1 <= self.stride <= self.sequence_length:
            raise PHAError(f"stride is {self.stride}; it must be from 1 to {self.sequence_length}")

    def windows(self, tokens: int) -> Iterator[Window]:
        """Windows that score each of the tokens 1 .. `tokens` - 1 exactly once, in order.

        Window j starts at j times the stride and has `sequence_length` inputs, the last one fewer
        if the tokens end.
        """
        scored = 0
        for start in range(0, tokens - 1, self.stride):
            end = min(start + self.sequence_length, tokens - 1)
            yield Window(start, end, scored - start)
            scored = end
            if scored == tokens - 1:
                return

    def describe(self) -> dict[str, Any]:
        """The protocol as data, for a result to carry."""
        named = {"name": self.name} if self.name else {}
        return named | {
            "sequence_length": self.sequence_length,
            "stride": self.stride,
            "windows": "non-overlapping" if self.stride == self.sequence_length else "sliding",
            "documents": "state and attention reset at document starts"
            if self.packed_documents
            else "document boundaries ignored",
        }


def parse_protocols(
    specs: Sequence[str], sequence_length: int, packed_documents: bool = False
) -> list[Protocol]:
    """Protocols from what a user wrote, each once, in the order given.

    Args:
        specs: `non-overlapping` (T, stride T), `strided` (T, stride T/2), `long` (4T, stride 4T),
            `all` of these, or `LENGTH` or `LENGTH/STRIDE` in tokens, such as `1024/256`.
        sequence_length: T of the names.
        packed_documents: of all of them.

    Raises:
        PHAError: another word, or a length or stride out of range.
    """
    found: dict[tuple[int, int], Protocol] = {}
    for spec in specs:
        for name in NAMES if spec == "all" else (spec,):
            length, stride = _windows(name, sequence_length)
            protocol = Protocol(length, stride, packed_documents, name)
            found.setdefault((length, stride), protocol)
    return list(found.values())


def _windows(name: str, base: int) -> tuple[int, int]:
    """Length and stride of one protocol."""
    if name in NAMES:
        length = 4 * base if name == "long" else base
        return length, max(1, length // 2) if name == "strided" else length
    first, slash, second = name.partition("/")
    try:
        length = int(first)
        return length, int(second) if slash else length
    except ValueError:
        raise PHAError(
            f"there is no protocol {name!r}; give {', '.join(NAMES)}, all, LENGTH or LENGTH/STRIDE"
        ) from None


def trained_protocol(run: RunFolder | None) -> Protocol | None:
    """How a run evaluates itself: its own sequence length, in windows that do not overlap.

    Returns:
        None where there is no run, or the run keeps no configuration.

    Raises:
        PHAError: the configuration cannot be read.
    """
    config = run.read_config() if run else {}
    if run is None or not config:
        return None
    try:
        length, packed = int(config["data"]["sequence_length"]), config["data"]["packed_documents"]
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise PHAError(
            f"{run.config} is damaged: it does not say how long the run's sequences are"
        ) from error
    return Protocol(length, length, bool(packed))


def own_protocol(loaded: LoadedModel) -> Protocol | None:
    """As `trained_protocol`, and without a run by the length that a model of ours says of itself.

    Returns:
        None for a model that says nothing.

    Raises:
        PHAError: the configuration of the run cannot be read.
    """
    length = getattr(loaded.model.config, "longest_trained", None)
    said = None if length is None else Protocol(length, length)
    return trained_protocol(loaded.run) or said
