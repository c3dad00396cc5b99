"""Corpora behind URLs: in memory, and on a web server of our own."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pha.data import cached_store, open_source, prepare
from pha.data.readers import Meter, read_records, read_text
from pha.data.remote import find_remote, shown_url
from tests.data.common import COMPRESS, RECORDS, write_records
from tests.data.conftest import Refuses

TEXTS = [f"text {number} é 中 😀\r\n" * (number % 20) for number in range(300)]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Any]:
    """fsspec's file system in memory, with a file of records of every kind in /bucket."""
    system = fsspec.filesystem("memory")
    for suffix in RECORDS:
        path = write_records(tmp_path / f"rows{suffix}", TEXTS)
        system.pipe(f"/bucket/rows{suffix}", path.read_bytes())
    yield system
    system.store.clear()


class Server(ThreadingHTTPServer):
    """Serves `files`; counts the bytes sent in `sent`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.sent = 0
        self.has_ranges = True
        self.cut: int | None = None  # the bytes after which it hangs up

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.reply()

    def do_GET(self) -> None:
        data = self.reply()[: self.server.cut]
        with suppress(ConnectionError):
            for start in range(0, len(data), 1 << 16):
                self.server.sent += self.wfile.write(data[start : start + (1 << 16)])

    def reply(self) -> bytes:
        data = self.server.files.get(self.path.partition("?")[0])
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        code = 404 if data is None else 200
        data = data or b""
        size = len(data)
        if self.server.has_ranges and wanted:
            code, first, last = 206, int(wanted[1]), min(int(wanted[2]), size - 1)
            data = data[first : last + 1]
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        if self.server.has_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        return data

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("suffix", RECORDS)
def test_records_come_back_unchanged(memory: Any, suffix: str) -> None:
    (file,) = find_remote(f"memory://bucket/rows{suffix}")
    meter = Meter()
    assert list(read_records(file, "text", meter)) == TEXTS
    assert meter.done == memory.size(f"/bucket/rows{suffix}")


def test_a_pattern_gives_the_store_of_local_files(memory: Any, tmp_path: Path) -> None:
    local = prepare(f"{tmp_path}/rows*", "bytes", tmp_path / "local")
    remote = prepare("memory://bucket/rows*", "bytes", tmp_path / "remote")
    assert remote.sha256 == local.sha256
    assert remote.describe()["split"] == local.describe()["split"]
    assert remote.describe()["source"] == "memory://bucket/rows*"


def test_files_named_for_their_split_and_one_text(memory: Any, split_folder: Path) -> None:
    for path in split_folder.iterdir():
        memory.pipe(f"/split/{path.name}", path.read_bytes())
        memory.pipe(f"/packed/{path.name}.gz", COMPRESS[".gz"](path.read_bytes()))
    novel = "".join(f"line {number}\n" for number in range(20_000))
    memory.pipe("/novel.txt", novel.encode())
    (split_folder.parent / "novel.txt").write_text(novel)

    def texts(spec: str) -> list[tuple[str, str]]:
        return [(document.split, document.text) for document in open_source(spec).documents()]

    whole = texts(str(split_folder))
    assert texts("memory://split/*.txt") == texts("memory://packed/*") == whole
    assert texts("memory://novel.txt") == texts(str(split_folder.parent / "novel.txt"))


def test_a_cached_store_follows_the_file(memory: Any, tmp_path: Path) -> None:
    def opened() -> Path:
        return cached_store("memory://bucket/rows.jsonl", "bytes", tmp_path / "stores").path

    first = opened()
    assert opened() == first
    memory.pipe("/bucket/rows.jsonl", memory.cat("/bucket/rows.jsonl") * 2)
    assert opened() != first


@pytest.mark.parametrize("suffix", RECORDS)
def test_records_over_http(server: Server, tmp_path: Path, suffix: str) -> None:
    server.has_ranges = suffix == ".parquet"
    path = write_records(tmp_path / f"rows{suffix}", TEXTS)
    server.files[f"/{path.name}"] = path.read_bytes()
    source = open_source(f"{server.url}/{path.name}?signature=secret")
    meter = Meter()
    assert [document.text for document in source.documents(meter=meter)] == TEXTS
    assert meter.fraction == 1
    assert "secret" not in source.description


def test_a_large_file_is_streamed(server: Server) -> None:
    server.files["/long.txt"] = b"some words of a text\n" * 3_000_000
    size = len(server.files["/long.txt"])
    (file,) = find_remote(f"{server.url}/long.txt")
    text = read_text(file, Meter())
    assert next(text).startswith("some words")
    assert server.sent < size / 4
    source = open_source(f"{server.url}/long.txt")  # its cuts are found by ranges
    assert server.sent < size / 2
    assert [unit.size for unit in source.units] == [56_700_000, 3_150_000, 3_150_000]
    table = pa.table({"text": ["some words of a text\n" * 1000] * 1000})
    table_bytes = pa.BufferOutputStream()
    # One row group of many pages.
    pq.write_table(table, table_bytes, compression="none", use_dictionary=False, write_batch_size=9)
    server.files["/rows.parquet"] = table_bytes.getvalue().to_pybytes()
    (file,) = find_remote(f"{server.url}/rows.parquet")
    server.sent = 0
    rows = read_records(file, "text", Meter())
    assert next(rows).startswith("some words")
    assert server.sent < 12_000_000 < len(server.files["/rows.parquet"])
    assert len(list(rows)) == 999
    server.has_ranges = False
    with_none = find_remote(f"{server.url}/long.txt")[0]
    assert sum(map(len, read_text(with_none, Meter()))) == size


def test_what_a_network_does_is_one_line(server: Server, refuses: Refuses) -> None:
    server.files["/rows.jsonl"] = b'{"text": "%s"}\n' % (b"a" * 1000) * 1400
    for has_ranges in (True, False):
        server.has_ranges, server.cut = has_ranges, None
        source = open_source(f"{server.url}/rows.jsonl")
        server.cut = 700_000
        with refuses("/rows.jsonl", "cannot be read"):
            list(source.documents())
    server.files["/novel.txt"] = b"some words of a text\n" * 1000
    with refuses("/novel.txt", "range requests", "download it"):
        open_source(f"{server.url}/novel.txt")
    with refuses("no file", "/none.jsonl"):
        open_source(f"{server.url}/none.jsonl")
    server.shutdown()
    server.server_close()
    with refuses("rows.jsonl", "no answer"):
        open_source(f"{server.url}/rows.jsonl")


def test_addresses_that_cannot_be_read(memory: Any, refuses: Refuses) -> None:
    fsspec.register_implementation(
        "absent", "no_such_package.System", clobber=True, errtxt="Install absentfs to read absent"
    )
    for spec in ("absent://bucket/rows.jsonl", "absent://bucket/*.jsonl"):
        with refuses("absent://", "Install absentfs", "pip"):
            open_source(spec)
    with refuses("nosuch://", "not known"):
        open_source("nosuch://bucket/rows.jsonl")
    for spec in ("memory://bucket", "memory://bucket/none.jsonl", "memory://bucket/none*"):
        with refuses(spec, "no file", "with * for several"):
            open_source(spec)
    memory.pipe("/bucket/notes.pdf", b"pages")
    with refuses("bucket/notes.pdf", "not a kind of text"):
        open_source("memory://bucket/*.pdf")


def test_what_gives_access_is_not_shown() -> None:
    assert shown_url("https://me:word@host/a.jsonl?key=1") == "https://host/a.jsonl"
    assert shown_url("s3://bucket/a?.jsonl") == "s3://bucket/a?.jsonl"
    assert shown_url("a/b@c?.txt") == "a/b@c?.txt"
