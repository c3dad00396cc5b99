"""Whatever is in a file, its reader works or says in a line what is wrong, in bounded memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pha.utils.errors import PHAError
from tests.robustness.readers import Reader, readers

READERS = readers()
CORPUS = Path(__file__).parent / "corpus"
NUMBERS = [b"-1", b"0", b"1e999", b"NaN", b"null", b"1" * 19, b"1" * 5000, b'"x"', b"[]", b"{}"]
WORDS = [b"", b"../../x", b"/dev/null", b"\\u0000", b"\\ud800", b"a" * 5000, b"*a", b"{}"]

OPTIONAL = {"metrics", "run config", "tokenizer settings", "generation config"}
"""What may be missing."""

each_reader = pytest.mark.parametrize("name", READERS)


def try_reading(reader: Reader, data: bytes, folder: Path) -> None:
    """Works, or raises a PHAError, which is short."""
    path = folder / reader.name
    path.write_bytes(data)
    said = ""
    try:
        reader.read(path)
    except PHAError as error:
        said = str(error)
    assert len(said) < 2000


def mutated(data: st.DataObject, sample: bytes) -> bytes:
    """The sample with some bytes, numbers or words replaced, cut out or doubled."""
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, max(0, len(sample) - 1)))
        end = min(len(sample), start + data.draw(st.sampled_from([0, 1, 2, 9, len(sample)])))
        kind = data.draw(st.sampled_from(["bit", "cut", "double", "bytes", "number", "word"]))
        middle = sample[start:end]
        if kind in ("number", "word"):
            pattern = rb"-?\d+(\.\d+)?(e-?\d+)?" if kind == "number" else rb'(?<=")[^"]+(?=")'
            places = [m.span() for m in re.finditer(pattern, sample)] or [(start, end)]
            start, end = data.draw(st.sampled_from(places))
            middle = data.draw(st.sampled_from(NUMBERS if kind == "number" else WORDS))
        elif kind == "bit" and middle:
            middle = bytes([middle[0] ^ 1 << data.draw(st.integers(0, 7))]) + middle[1:]
        else:
            middle = {"cut": b"", "double": middle * 2}.get(kind) or data.draw(
                st.sampled_from(
                    [b"\0", b"\xff\xfe", b"\xed\xa0\xbd", b"\n", b'"', b"}", b"[" * 999]
                )
            )
        sample = sample[:start] + middle + sample[end:]
    return sample


@each_reader
@given(data=st.data())
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_damaged_files(name: str, data: st.DataObject, tmp_path: Path) -> None:
    try_reading(READERS[name], mutated(data, READERS[name].sample), tmp_path)


ODD: list[Any] = [
    *(None, True, -1, 0, 3.5, 10**30, math.nan, math.inf, "", "x", "../../x", "\ud83d"),
    *([], [None], [[]], {}, {"a": 1}),
]
STRUCTURED = [name for name, each in READERS.items() if each.name.endswith((".json", ".yaml"))]


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to everything in nested lists and mappings."""
    if not isinstance(value, dict | list):
        return
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*way, key)
        yield from places(each, (*way, key))


@pytest.mark.parametrize("name", STRUCTURED)
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_values_of_another_kind(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """One value of the file replaced, left out, or under another name."""
    content = yaml.safe_load(READERS[name].sample)  # which reads JSON too
    if name == "checkpoint record":
        del content["digest"]  # with which nothing else would be looked at
    *way, last = data.draw(st.sampled_from(list(places(content))))
    around = content
    for key in way:
        around = around[key]
    change = data.draw(st.sampled_from(["set", "leave out", "rename"]))
    if change == "set" or isinstance(around, list):
        around[last] = data.draw(st.sampled_from(ODD))
    else:
        value = around.pop(last)
        if change == "rename":
            around["odd"] = value
    text = json.dumps(content)
    if READERS[name].name.endswith(".yaml"):
        text = text.replace("Infinity", ".inf").replace("NaN", ".nan")
    try_reading(READERS[name], text.encode(), tmp_path)


@each_reader
def test_files_of_something_else(name: str, tmp_path: Path) -> None:
    sample = READERS[name].sample
    for data in (
        *(b"", b"\n", b"\0" * 99, b"\xff\xfe\0x", b"{}", b"[]", b"null", b"7", b'"x"'),
        *(b"[" * 100_000, b'{"a":' * 100_000, b"- " * 2000, b"- - ? " * 999),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        (1 << 60).to_bytes(8, "little") + b"{}",
        sample.decode("latin-1").encode("utf-16"),
        *(sample[: len(sample) * part // 7] for part in range(7)),
    ):
        try_reading(READERS[name], data, tmp_path)


@each_reader
@pytest.mark.parametrize("kind", ["folder", "circle", "nothing"])
def test_what_is_no_file(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / READERS[name].name
    if kind == "folder":
        path.mkdir()
    elif kind == "circle":
        path.symlink_to(path)
    try:
        READERS[name].read(path)
    except PHAError:
        return
    assert name in OPTIONAL


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_findings_of_fuzzing(path: Path, tmp_path: Path) -> None:
    name = path.name.rpartition("-")[0]
    [reader] = [each for key, each in READERS.items() if key.replace(" ", "-") == name]
    try_reading(reader, path.read_bytes(), tmp_path)
