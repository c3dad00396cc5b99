"""Dataclasses from plain JSON, checked against their type hints."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from contextlib import suppress
from typing import Any, TypeVar

from pha.utils.errors import PHAError
from pha.utils.text import shorten

Record = TypeVar("Record")


def record_from(kind: type[Record], value: Any, where: str) -> Record:
    """Build a dataclass from a JSON object.

    Fields may be of `int`, `float`, `str`, `Any`, dataclasses, and lists, tuples, mappings and
    options of these. Names that the class does not have are left out; fields with a default may be
    absent, and null stands for a float that is no finite number.

    Args:
        kind: the dataclass.
        value: what `json.loads` gave.
        where: the file, for messages.

    Raises:
        PHAError: a field is missing, or has a value of another type.
    """
    made: Record = _decode(kind, value, where)
    return made


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is types.UnionType:  # only ever `X | None`
        return None if value is None else _decode(arguments[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _decode_object(hint, value, where)
    if origin is list and isinstance(value, list):
        return [_decode(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        pairs = zip(arguments, value, strict=True)
        return tuple(_decode(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(pairs))
    if origin is dict and isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _decode(arguments[1], each, _at(where, key)) for key, each in value.items()}
    if hint is float and value is None:  # how JSON writes what is no finite number
        return math.nan
    if hint is float and type(value) in (int, float):
        with suppress(OverflowError):  # an integer beyond all floats
            return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    name = "object" if dataclasses.is_dataclass(hint) else (origin or hint).__name__
    raise PHAError(f"{shorten(where, 200)} is {shorten(repr(value), 40)}, not of type {name}")


def _decode_object(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = _hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            found[field.name] = _decode(
                hints[field.name], value[field.name], _at(where, field.name)
            )
        elif field.default is dataclasses.MISSING is field.default_factory:
            raise PHAError(f"{_at(where, field.name)} is missing")
    return kind(**found)


def _at(where: str, name: str) -> str:
    """`result.json: model.parameters`: the file first, then the way to the field."""
    return f"{where}.{name}" if ": " in where else f"{where}: {name}"


_hints = functools.cache(typing.get_type_hints)
