from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pha.data.readers import Meter, kind_of, open_rows, read_records, read_text
from tests.data.common import COMPRESS, RECORDS, write_records
from tests.data.conftest import Refuses

AWKWARD = [
    "plain",
    "",
    "café 中 😀 \x00 \u2028 \ufeff",
    "a\r\nb\n\n",
    '"quoted" \\ {',
    "x" * 100_000,
]


@pytest.mark.parametrize("suffix", RECORDS)
def test_records_come_back_unchanged(tmp_path: Path, suffix: str) -> None:
    texts = AWKWARD * 5
    path = write_records(tmp_path / f"rows{suffix}", texts)
    meter = Meter()
    assert list(read_records(path, "text", meter)) == texts
    assert meter.done == path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_text_comes_back_unchanged(
    tmp_path: Path, suffix: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pha.data.readers._BLOCK", block)
    text = "café 中 😀\r\nend\n \u2028\ufeff" * 3
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](f"\ufeff{text}".encode()))  # the mark is no part of it
    meter = Meter()
    assert "".join(read_text(path, meter)) == text
    assert meter.done == path.stat().st_size


def test_a_stretch_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pha.data.readers._BLOCK", 4)
    path = tmp_path / "text.txt"
    path.write_text("0123456789" * 3)
    assert "".join(read_text(path, Meter(), 5, 18)) == "5678901234567"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    lines = '\ufeff{"text": "a"}\r\n\n  \n{"text": "b"}'
    path.write_bytes(COMPRESS[suffix](lines.encode()))
    assert list(read_records(path, "text", Meter())) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_packed_files_in_several_pieces(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](text) for text in (b"one ", b"", b"two")))
    assert "".join(read_text(path, Meter())) == "one two"


@pytest.mark.parametrize("suffix", [s for s in RECORDS if s != ".jsonl"])
def test_files_cut_short_are_refused(tmp_path: Path, suffix: str, refuses: Refuses) -> None:
    path = write_records(tmp_path / f"rows{suffix}", [f"row {number}" * 9 for number in range(200)])
    whole = path.read_bytes()
    for size in sorted({1, 2, 5, 11, len(whole) // 3, len(whole) // 2, len(whole) - 9}):
        path.write_bytes(whole[:size])
        with refuses(path.name, "get"):
            list(read_records(path, "text", Meter()))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_archives_are_refused(tmp_path: Path, suffix: str, refuses: Refuses) -> None:
    path = tmp_path / f"text.txt{suffix}"
    data = bytearray(COMPRESS[suffix](b"some text " * 99))
    data[-30 if suffix == ".xz" else -6] ^= 1  # in the checksum; .zst has none, so in the text
    for damaged in (b"this is no archive, whatever its name says", data):
        path.write_bytes(damaged)
        with refuses(path.name):
            list(read_text(path, Meter()))


def test_an_archive_that_takes_gigabytes_to_unpack_is_refused(
    tmp_path: Path, refuses: Refuses
) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    path = tmp_path / "text.txt.zst"
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(stream.compress(b"text ") + stream.flush())
    with refuses("text.txt.zst", "too much memory"):
        list(read_text(path, Meter()))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"text": "cut', ("line 2", "rows.jsonl", "not JSON")),
        (b"[1, 2]", ("line 2", "not a JSON object")),
        (b"7", ("line 2", "not a JSON object")),
        (b"[" * 100_000, ("line 2", "not JSON")),
        (b'{"text": "caf\xe9"}', ("line 2", "UTF-8")),
        (b'{"body": "a", "title": "b"}', ("line 2", "no field 'text'", "body, title", "--text-f")),
        (b"{}", ("line 2", "no field 'text'", "none")),
        (b'{"text": null}', ("line 2", "'text'", "null")),
        (b'{"text": 3}', ("line 2", "'text'", "int")),
        (b'{"text": ["a"]}', ("line 2", "'text'", "list")),
        (b'{"text": "\\ud800"}', ("line 2", "surrogate")),
    ],
)
def test_bad_lines_are_named(
    tmp_path: Path, line: bytes, parts: tuple[str, ...], refuses: Refuses
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    rows = read_records(path, "text", Meter())
    assert next(rows) == "good"
    with refuses(*parts):
        next(rows)


def test_fields_of_parquet(tmp_path: Path, refuses: Refuses) -> None:
    path = write_records(tmp_path / "rows.parquet", ["a", "b"], field="body")
    assert list(read_records(path, "body", Meter())) == ["a", "b"]
    with refuses("rows.parquet", "no field 'text'", "number, body"):
        list(read_records(path, "text", Meter()))
    with refuses("row 1", "rows.parquet", "int"):
        list(read_records(path, "number", Meter()))
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with refuses("row 2", "null"):
        list(read_records(path, "text", Meter()))
    pq.write_table(pa.table({"text": pa.array(["a", "b"], pa.large_string())}), path)
    assert list(read_records(path, "text", Meter())) == ["a", "b"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_that_is_not_utf8(tmp_path: Path, suffix: str, refuses: Refuses) -> None:
    path = tmp_path / f"text.txt{suffix}"
    wide = "\u6587 and text".encode
    for data in (b"caf\xe9 ", b"cut in a character \xc3", wide("utf-16"), wide("utf-16-le")):
        path.write_bytes(COMPRESS[suffix](data))
        with refuses(path.name, "UTF-8"):
            list(read_text(path, Meter()))


def test_files_that_cannot_be_opened(tmp_path: Path, refuses: Refuses) -> None:
    for name in ("gone.jsonl", "gone.jsonl.zst"):
        with refuses(name, "cannot be read"):
            list(read_records(tmp_path / name, "text", Meter()))


def test_libraries_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    paths = [write_records(tmp_path / f"rows{s}", ["a"]) for s in (".parquet", ".jsonl.zst")]
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for path in paths:
        with refuses("pyarrow", "pip install 'pha-lm[data]'"):
            list(read_records(path, "text", Meter()))
    with refuses("datasets", "pip install 'pha-lm[data]'"):
        open_rows(str(tmp_path), None, "a data set")


@pytest.mark.parametrize(
    ("name", "stem", "sort"),
    [
        ("train.jsonl.xz", "train", "records"),
        ("Train.JSONL", "Train", "records"),
        ("a.b.parquet", "a.b", "records"),
        ("wiki.train.txt.gz", "wiki.train", "packed text"),
        ("text.raw.zst", "text", "packed text"),
        ("text.txt", "text", "other"),
        ("rows.parquet.gz", "rows", "other"),
        ("archive.gz", "archive", "other"),
        ("archive.tar.gz", "archive", "other"),
        ("README", "README", "other"),
    ],
)
def test_kinds_by_name(name: str, stem: str, sort: str) -> None:
    kind = kind_of(Path(name))
    assert kind.stem == stem
    found = "records" if kind.is_records else "packed text" if kind.is_packed_text else "other"
    assert found == sort
