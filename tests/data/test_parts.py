"""A store made in parts and joined is the one that a single process makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pha.cli import main
from pha.data import TokenStore, prepare
from pha.data.joining import join
from pha.data.parts import Part, Shards
from pha.data.sampler import Batch, DocumentSampler, StretchSampler, WindowSampler
from tests.data.common import write_hub, write_records
from tests.data.conftest import Refuses


def records(folder: Path) -> str:
    for number in range(7):
        texts = [f"text {number} {k} é 中\n" * (k % 30) for k in range(60)]
        write_records(folder / f"rows-{number}.jsonl.gz", texts)
    return str(folder)


def running_text(folder: Path) -> str:
    folder.mkdir()
    for name in ("train-1", "train-2", "train-10", "valid", "test"):
        (folder / f"{name}.txt").write_text(f"the {name} text is one line\n" * 300)
    return str(folder)


def rows(folder: Path) -> str:
    texts = [f"web page {number} é\n\nwith two lines" for number in range(600)]
    return f"hf:{write_hub(folder, 'plain', {'train': texts, 'test': texts[:40]}, files=4)}:plain"


def made_in_parts(spec: str, tokenizer: str, out: Path, of: int) -> Path:
    for number in reversed(range(1, of + 1)):
        prepare(spec, tokenizer, out, part=Part(number, of))
    return out


@pytest.mark.parametrize(
    ("write", "tokenizer", "of"),
    [
        (records, "bpe:300", 3),
        (running_text, "bytes", 5),
        (rows, "bytes", 3),
    ],
)
def test_the_joined_store_is_that_of_one_process(
    write: Callable[[Path], str], tokenizer: str, of: int, tmp_path: Path
) -> None:
    spec = write(tmp_path / "source")
    one = prepare(spec, tokenizer, tmp_path / "one")
    join(made_in_parts(spec, tokenizer, tmp_path / "many", of))
    many = TokenStore.open(tmp_path / "many")
    assert many.parts == of
    assert many.sha256 == one.sha256
    assert many.describe() == one.describe()
    for split in one.splits:
        assert np.array_equal(np.asarray(many.tokens(split)), one.tokens(split))
        assert np.array_equal(many.document_starts(split), one.document_starts(split))
        assert np.array_equal(many.frequencies(split), one.frequencies(split))
    for one_batch, other in zip(batches(one), batches(many), strict=True):
        for name in ("inputs", "targets", "document_starts"):
            assert getattr(one_batch, name).equal(getattr(other, name))


def batches(store: TokenStore) -> list[Batch]:
    starts = store.document_starts("train")
    common = (store.tokens("train"), 20, 16, 3, starts)
    of_documents = DocumentSampler(*common, documents=starts, share=0.5)
    samplers = (WindowSampler(*common), StretchSampler(*common), of_documents)
    return [s.batch(step) for s in samplers for step in (0, 1, s.steps_per_epoch)]


def test_shards_read_as_one_array() -> None:
    whole = np.arange(23, dtype=np.uint16)
    shards = Shards([whole[:4], whole[4:5], whole[5:18], whole[18:]])
    assert len(shards) == 23
    assert shards.dtype == whole.dtype
    assert np.array_equal(np.asarray(shards), whole)
    for start in range(-24, 25):
        for stop in range(-24, 25):
            assert np.array_equal(shards[start:stop], whole[start:stop])
    assert np.array_equal(shards[20:2:-3], whole[20:2:-3])
    assert list(shards) == whole.tolist()
    windows = np.array([[0, 1, 2], [3, 4, 5], [17, 18, -1]])
    assert np.array_equal(shards[windows], whole[windows])
    assert shards[windows[:0]].shape == (0, 3)
    assert shards[5:6].dtype == shards[windows].dtype == whole.dtype
    for beyond in (23, -24):
        with pytest.raises(IndexError):
            shards[beyond]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Three parts of a store, not joined."""
    return made_in_parts(records(tmp_path / "source"), "bytes", tmp_path / "many", 3)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_parts_that_are_missing_or_damaged(parts: Path, refuses: Refuses) -> None:
    shutil.copytree(parts, parts.with_name("kept"))

    def again() -> None:
        shutil.rmtree(parts)
        shutil.copytree(parts.with_name("kept"), parts)

    with refuses("not joined", "pha join"):
        TokenStore.open(parts)
    shutil.rmtree(parts / "part-2-of-3")
    with refuses("lacks part 2 of 3", "--part 2/3"):
        join(parts)
    again()
    for name in ("train.bin", "split.txt", "test.documents.npy"):
        flip(parts / "part-2-of-3" / name)
        with refuses(f"part-2-of-3/{name}", "prepare it again"):
            join(parts)
        assert not (parts / "store.json").exists()
        again()
    (parts / "part-3-of-3" / "split.txt").unlink()
    with refuses("part-3-of-3/split.txt", "missing"):
        join(parts)
    again()
    join(parts)
    flip(parts / "part-3-of-3" / "train.bin")
    with refuses("part-3-of-3/train.bin", "SHA-256"):
        TokenStore.open(parts)
    flip(parts / "part-3-of-3" / "train.bin")
    assert TokenStore.open(parts).parts == 3
    shutil.rmtree(parts / "part-1-of-3")
    with refuses("part-1-of-3/train.documents.npy", "missing"):
        TokenStore.open(parts, verify=False)
    record = json.loads((parts / "store.json").read_text())
    (parts / "store.json").write_text(json.dumps(record | {"parts": 2}))
    with refuses("store.json", "damaged"):
        TokenStore.open(parts)


def test_parts_that_do_not_belong_together(parts: Path, tmp_path: Path, refuses: Refuses) -> None:
    source = str(tmp_path / "source")
    prepare(source, "bpe:300", parts, part=Part(2, 3))
    with refuses("part-2-of-3", "another tokenizer"):
        join(parts)
    prepare(source, "bytes", parts, separator="none", part=Part(2, 3))
    with refuses("another separator"):
        join(parts)
    first = write_records(tmp_path / "source" / "rows-0.jsonl.gz", ["one more"])
    prepare(source, "bytes", parts, part=Part(2, 3))
    with refuses("another list of files"):
        join(parts)
    first.unlink()
    prepare(source, "bytes", parts, part=Part(3, 4))
    with refuses("several divisions"):
        join(parts)
    for name in ("part-2-of-3", "part-3-of-4"):
        shutil.rmtree(parts / name)
    shutil.copytree(parts / "part-1-of-3", parts / "part-2-of-3")
    with refuses("part-2-of-3 does not hold part 2 of 3"):
        join(parts)
    prepare(source, "bytes", tmp_path / "one" / "part-1-of-1")
    with refuses("part-1-of-1 does not hold part 1 of 1"):
        join(tmp_path / "one")
    with refuses("no parts", "--part K/N"):
        join(tmp_path)


def test_a_part_is_made_again_where_it_is(parts: Path, tmp_path: Path, refuses: Refuses) -> None:
    def stop(state: object) -> None:
        raise KeyboardInterrupt

    source, first = str(tmp_path / "source"), join(parts)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, "bytes", parts, part=Part(2, 3), progress=stop)
    assert TokenStore.open(parts).sha256 == first.sha256
    prepare(source, "bytes", parts, part=Part(2, 3))
    assert TokenStore.open(parts).sha256 == join(parts).sha256 == first.sha256
    with refuses("would be lost"):
        prepare(source, "bytes", parts)
    prepare(source, "bytes", tmp_path / "one")
    with refuses("one process"):
        prepare(source, "bytes", tmp_path / "one", part=Part(2, 3))


def test_divisions_that_cannot_be_made(tmp_path: Path, refuses: Refuses) -> None:
    rows = write_records(tmp_path / "rows.jsonl", ["one", "two", "three"])
    with refuses("cannot be divided into 2 parts", "more files"):
        prepare(str(rows), "bytes", tmp_path / "store", part=Part(1, 2))
    prepare(str(rows), "bytes", tmp_path / "store", part=Part(1, 1))
    with refuses("falls into the", "larger --holdout"):
        join(tmp_path / "store")
    for text in ("0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"):
        with refuses(f"--part {text}", "K/N"):
            Part.parse(text)


def test_the_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = running_text(tmp_path / "source"), str(tmp_path / "store")
    for part in ("1/2", "2/2"):
        options = ["--tokenizer", "bytes", "--out", out, "--part", part]
        main(["prepare", source, *options])
    capsys.readouterr()
    main(["join", out, "--json"])
    assert json.loads(capsys.readouterr().out)["counts"]["train"]["documents"] == 3
