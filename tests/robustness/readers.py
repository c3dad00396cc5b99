"""Every reader of outside files, with a small valid sample: for property tests and fuzzing.

A reader gets the bytes of one file and either works or raises a PHAError.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
import zstandard

from pha import PHAConfig, PHAForCausalLM
from pha.commands.texts import _prompts
from pha.data import TokenStore, load_tokenizer, open_source, prepare
from pha.data.readers import Meter, read_records, read_text
from pha.data.tokenizer import saved_tokenizer_sha256
from pha.evals.protocols import trained_protocol
from pha.loading import load_model
from pha.results import (
    Candidate,
    Evaluation,
    LayerMixing,
    ModelSize,
    Parameters,
    RunResult,
    Sample,
    Scores,
    TrainRecord,
)
from pha.runs import RunFolder
from pha.studies.definition import load_study
from pha.train.checkpoint import Progress, load_checkpoint
from pha.train.recipes import load_recipe
from pha.train.saving import Snapshot, moments_of, save_checkpoint
from pha.utils.files import sha256_file, write_json
from pha.utils.formats import read_yaml

SMALL: dict[str, Any] = {
    "vocab_size": 257,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "state_size": 16,
}


@dataclass(frozen=True)
class Reader:
    """A reader and a valid file for it."""

    read: Callable[[Path], Any]  # of a file that has the bytes to read, in a folder of its own
    sample: bytes
    name: str  # of that file


@cache
def scratch() -> Path:
    """A scratch folder with a store, a model, a run and a checkpoint, all valid."""
    root = Path(tempfile.mkdtemp(prefix="pha-readers-"))
    texts = root / "texts"
    texts.mkdir()
    for name in ("train", "valid", "test"):
        (texts / f"{name}.txt").write_text(f"the text of {name}\n" * 20, encoding="utf-8")
    prepare(str(texts), "bytes", root / "store")
    torch.manual_seed(0)
    model, tokenizer = PHAForCausalLM(PHAConfig(**SMALL)), load_tokenizer("bytes")
    run = RunFolder(root / "run")
    optimizer = torch.optim.AdamW(model.parameters())
    progress = Progress(step=3, tokens=9, best=[(2.5, 3)], schedule={"scale": 1.0})
    snapshot = Snapshot(model, tokenizer)
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    moments = moments_of(model, optimizer, snapshot)
    save_checkpoint(run, snapshot, moments, progress, keep=1)
    shutil.copytree(run.checkpoint(3), root / "model")
    for name in ("optimizer.safetensors", "trainer.json"):
        (root / "model" / name).unlink()
    return root


def _replaced(folder: str, name: str, read: Callable[[Path], Any]) -> Reader:
    """A reader of a folder in which one file is put in place of a valid one."""
    home = scratch() / folder

    def with_file(path: Path) -> Any:
        target = path.parent / "folder"
        if not target.exists():
            shutil.copytree(home, target)
            (target / name).unlink()
            (target / name).symlink_to(path)
        return read(target)

    return Reader(with_file, (home / name).read_bytes(), Path(name).name)


def _read_store(folder: Path) -> None:
    store = TokenStore.open(folder)
    store.describe()
    for split in store.splits:
        store.tokens(split)[:2]
        store.counts(split)


def _read_checkpoint(folder: Path) -> None:
    model = PHAForCausalLM(PHAConfig(**SMALL))
    load_checkpoint(folder, model, torch.optim.AdamW(model.parameters()))


def _read_optimiser(folder: Path) -> None:
    """The optimiser's state, with a record that its hash is right."""
    record = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    record.pop("digest", None)
    if (folder / "optimizer.safetensors").is_file():
        record["sha256"]["optimizer.safetensors"] = sha256_file(folder / "optimizer.safetensors")
    write_json(folder / "trainer.json", record)
    _read_checkpoint(folder)


def _read_source(path: Path) -> None:
    for document in open_source(str(path)).documents():
        document.text.split()


def _read_text(path: Path) -> None:
    for part in read_text(path, Meter()):
        part.encode()


def _read_records(path: Path) -> None:
    for text in read_records(path, "text", Meter()):
        text.encode()


def _read_prompts(path: Path) -> None:
    for text in _prompts(None, path):
        text.encode()


def _run_of(path: Path) -> RunFolder:
    return RunFolder(path.parent)


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"], "number": [1, 2]}), buffer)
    return buffer.getvalue()


def _result() -> bytes:
    scores = Scores(
        split="test",
        loss=1.0,
        perplexity=2.7,
        word_perplexity=9.0,
        byte_perplexity=2.0,
        bits_per_byte=1.0,
        accuracy=0.5,
    )
    evaluation = Evaluation(
        **asdict(scores), tokens=8, words=2.0, bytes=8.0, seconds=0.1, protocol={"stride": 8}
    )
    content = RunResult(
        name="mine",
        recipe=None,
        seed=0,
        steps=2,
        tokens_seen=8,
        seconds=1.0,
        tokens_per_second=8.0,
        utilisation=0.5,
        matmul_flops=1e9,
        peak_memory_bytes=99,
        chosen_step=None,
        candidates=[Candidate("average", [1, 2], 2.7, evaluation)],
        model=ModelSize(None, Parameters(10, 4, 6, {"gss": 6})),
        evaluations=[evaluation],
        best_validation_perplexity=2.7,
        mixing=[LayerMixing({"gss": 1.0}, {"gss": 1.0})],
        samples=[Sample("a", "b", 0.8, 0.95, 0)],
        data={},
        provenance={},
    )
    return json.dumps(content.to_dict()).encode()


LINES = b'{"text": "one", "n": 1.5}\n{"text": "caf\\u00e9 \xe4\xb8\xad"}\n'
RECIPE = b"""# mine
model: {preset: pha-tiny, dropout: 0.1}
data: {store: a/store, sequence_length: 64}
run: {steps: 20, global_batch: 4, trackers: [tensorboard]}
optimizer: {learning_rate: 1e-3}
"""
STUDY = b"""title: Mine
question: Which one?
baseline: a/low
over: {rate: {low: {optimizer.learning_rate: 1e-4}, high: {}}}
variants:
  a: {model: pha, label: A}
  b: {model: pha, set: {run.steps: 3}}
plots: [dots]
contrasts: [[test, validation]]
"""


def readers() -> dict[str, Reader]:
    """Name -> reader."""
    train = TrainRecord(
        step=1,
        tokens=8,
        loss=2.5,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens_per_second=9.0,
        utilisation=0.5,
        seconds=1.0,
    )
    metrics = b"".join(
        json.dumps({"kind": "train", **asdict(train)}).encode() + b"\n" for _ in range(2)
    )
    config = yaml.safe_dump(
        {"data": {"sequence_length": 8, "packed_documents": False}, "run": {"steps": 1}}
    ).encode()
    return {
        "text": Reader(_read_text, b"\xef\xbb\xbfsome text\r\nof two lines\n", "text.txt"),
        "text.gz": Reader(_read_text, gzip.compress(b"some text " * 9, mtime=0), "text.txt.gz"),
        "text.xz": Reader(_read_text, lzma.compress(b"some text " * 9), "text.txt.xz"),
        "text.zst": Reader(
            _read_text, zstandard.ZstdCompressor().compress(b"some text " * 9), "text.txt.zst"
        ),
        "source": Reader(_read_source, b"a line of text\n" * 30, "book.txt"),
        "records": Reader(_read_records, LINES, "rows.jsonl"),
        "records.parquet": Reader(_read_records, _parquet(), "rows.parquet"),
        "prompts": Reader(_read_prompts, b"one\r\ntwo\n", "prompts.txt"),
        "prompts.jsonl": Reader(_read_prompts, LINES.replace(b"text", b"prompt"), "prompts.jsonl"),
        "yaml": Reader(read_yaml, RECIPE, "any.yaml"),
        "recipe": Reader(lambda path: load_recipe(str(path)), RECIPE, "recipe.yaml"),
        "study": Reader(lambda path: load_study(str(path)), STUDY, "study.yaml"),
        "result": Reader(RunResult.read, _result(), "result.json"),
        "metrics": Reader(lambda path: _run_of(path).read_metrics(), metrics, "metrics.jsonl"),
        "run config": Reader(lambda path: trained_protocol(_run_of(path)), config, "config.yaml"),
        "store record": _replaced("store", "store.json", _read_store),
        "store ids": _replaced("store", "train.bin", _read_store),
        "store starts": _replaced("store", "train.documents.npy", _read_store),
        "store tokenizer": _replaced("store", "tokenizer/tokenizer.json", _read_store),
        "tokenizer": _replaced("model", "tokenizer.json", read_tokenizer),
        "tokenizer settings": _replaced("model", "tokenizer_config.json", read_tokenizer),
        "model config": _replaced("model", "config.json", load_model),
        "model weights": _replaced("model", "model.safetensors", load_model),
        "generation config": _replaced("model", "generation_config.json", load_model),
        "checkpoint record": _replaced("run/checkpoints/step-3", "trainer.json", _read_checkpoint),
        "checkpoint optimiser": _replaced(
            "run/checkpoints/step-3", "optimizer.safetensors", _read_optimiser
        ),
    }


def read_tokenizer(folder: Path) -> None:
    """A tokenizer's folder, in all ways that it is read."""
    saved_tokenizer_sha256(folder)
    load_tokenizer(str(folder))
