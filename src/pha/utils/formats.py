"""Text, JSON and YAML: read strictly and in bounded memory, written as every reader takes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pha.utils.errors import PHAError
from pha.utils.text import shorten

JSON_BYTES = 1 << 26  # of a JSON file at most: tokenizers, the largest, have half of it
YAML_BYTES = 1 << 20
YAML_NODES = 100_000  # with every alias counted as what it stands for

# Valid in JSON, but half a surrogate pair cannot be encoded, and some readers end a line here.
_ESCAPED = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029, *range(0xD800, 0xE000))}


def decode(data: bytes, where: str) -> str:
    """UTF-8 as text, without a byte order mark.

    Raises:
        PHAError: it is not UTF-8, or holds zero bytes.
    """
    try:
        return require_text(data.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        raise PHAError(f"{where} is not UTF-8 text: convert it to UTF-8") from error


def require_text(text: str, where: str) -> str:
    """`text` itself, if it holds no zero bytes, which also decode as UTF-8.

    Raises:
        PHAError: it holds some.
    """
    if "\0" in text:
        raise PHAError(
            f"{where} holds zero bytes, as UTF-16 and binary files do: convert it to UTF-8 text"
        )
    return text


def require_encodable(text: str, where: str) -> str:
    """`text` itself, if UTF-8 can write it.

    Raises:
        PHAError: it holds half a surrogate pair, which also stands for a byte that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PHAError(
            f"{where} holds half a surrogate pair or a byte that is not UTF-8, which is no "
            "character: correct or remove it"
        ) from error
    return text


def read_file(file: Traversable, most: int = JSON_BYTES) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        PHAError: it is absent, unreadable, not UTF-8 text, or of more than `most` bytes.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(most + 1)
    except FileNotFoundError as error:
        raise PHAError(f"{file} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise PHAError(f"{file} cannot be read ({_reason(error)})") from error
    if len(data) > most:
        raise PHAError(f"{file} has more than {most >> 20} MB, too much for a file of its kind")
    return decode(data, str(file))


def parse_json(text: str) -> Any:
    """A JSON document.

    NaN and Infinity, which older versions wrote, are read as such.

    Raises:
        ValueError: not JSON, an object that names a key twice, or one nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        PHAError: the file is absent, unreadable, too large or not JSON.
    """
    try:
        return parse_json(read_file(path))
    except PHAError:
        raise
    except ValueError as error:
        raise PHAError(f"{path} cannot be read as JSON ({error})") from error


def read_yaml(file: Traversable) -> dict[str, Any]:
    """The mapping in a YAML file; an empty one where the file is empty.

    Raises:
        PHAError: it is absent, unreadable, too large, not YAML or no mapping with names as keys.
    """
    import yaml  # an extra, which loading a model does not need

    text = read_file(file, YAML_BYTES)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _check_nodes(node)
        content = None if node is None else loader.construct_document(node)
    except Exception as error:  # also what the constructors of dates and numbers raise
        raise PHAError(f"{file} is not YAML ({shorten(_reason(error), 200)})") from error
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise PHAError(f"{file} does not hold a mapping of names")
    return content


def _check_nodes(root: Any) -> None:
    """Refuse a document of aliases that would grow without bound, and keys named twice."""
    import yaml

    left, count = [root], 0
    while left:
        node = left.pop()
        count += 1
        if count > YAML_NODES:
            raise ValueError("its aliases stand for too much")
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            _require_once(keys)
            left += [each for pair in node.value for each in pair]


def to_json(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """JSON that every reader takes: what is no finite number becomes null.

    It can be encoded as UTF-8, whatever bytes a file's name has, and without `indent` it is one
    line to every reader of lines.
    """
    options: dict[str, Any] = {"indent": indent, "ensure_ascii": ascii_only, "allow_nan": False}
    try:
        text = json.dumps(value, **options)
    except ValueError:
        text = json.dumps(_finite(value), **options)
    return text if text.isascii() else text.translate(_ESCAPED)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _require_once([key for key, _ in pairs])
    return found


def _require_once(keys: Iterable[Any]) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"an object names {shorten(repr(key), 80)} twice")
        seen.add(key)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
