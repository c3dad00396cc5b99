"""The keys of a recipe: what each is called, takes, is by default and means."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pha.train.config import TrainConfig
from pha.utils.errors import PHAError
from pha.utils.text import read_docstring

SECTIONS: dict[str, type] = {
    name: kind
    for name, kind in get_type_hints(TrainConfig).items()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type)
}

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
    Any: "any value",
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str  # section.key
    hint: Any  # its type
    default: Any
    meaning: str  # one line

    @property
    def choices(self) -> list[str]:
        """What it may be, where that is a list of words."""
        if self.hint is bool:
            return ["true", "false"]
        return list(get_args(self.hint)) if get_origin(self.hint) is Literal else []


@cache
def recipe_keys() -> dict[str, Key]:
    """Name -> key, section by section, read from the dataclasses and their docstrings."""
    found: dict[str, Key] = {}
    for section, kind in SECTIONS.items():
        default, hints = kind(), get_type_hints(kind)
        meanings = read_docstring(kind, "Attributes")[1]
        for item in dataclasses.fields(kind):
            name = f"{section}.{item.name}"
            value = getattr(default, item.name)
            found[name] = Key(name, hints[item.name], value, meanings.get(item.name, ""))
    return found


def require_keys(names: Iterable[str]) -> None:
    """Refuse what is no key; keys inside of a mapping, such as data.tests.long, are its own matter.

    Raises:
        PHAError: with the nearest key.
    """
    keys = recipe_keys()
    for name in names:
        first, inside = ".".join(name.split(".")[:2]), name.count(".") > 1
        if first not in keys or (inside and get_origin(keys[first].hint) is not dict):
            raise PHAError(
                f"there is no key {name}{_hint(name)} (`pha recipes --keys` lists all of them)"
            )


def _hint(name: str) -> str:
    """The nearest key: by all of its name, or by what stands behind the section."""
    name, keys = name.replace("-", "_"), list(recipe_keys())
    by_last = {key.rpartition(".")[2]: key for key in keys}
    last = name.rpartition(".")[2]
    near = (
        difflib.get_close_matches(name, keys, 1, 0.8)
        or [by_last[each] for each in difflib.get_close_matches(last, by_last, 1, 0.8)]
        or difflib.get_close_matches(name, keys, 1, 0.6)
    )
    return f"; did you mean {near[0]}?" if near else ""


def in_words(hint: Any) -> str:
    """What a value of a type is called."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(in_words(each) for each in inner)
    if origin is list:
        example = {int: "0, 2", float: "0.1, 0.2"}.get(inner[0], "a, b")
        return f"a list such as [{example}]"
    if origin is dict:
        return "a mapping such as {name: value}"
    return _WORDS.get(hint, "another value")
