"""Writes corpora in every format that is read."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
"""From the ending of a file's name to what packs its bytes."""

RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")


def write_records(path: Path, texts: Sequence[Any], field: str = "text") -> Path:
    """Write records with `field` and another one, in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"number": number, field: text} for number, text in enumerate(texts)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    else:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        pack = COMPRESS["" if path.suffix == ".jsonl" else path.suffix]
        path.write_bytes(pack(lines.encode()))
    return path


def write_hub(
    folder: Path, config: str, splits: Mapping[str, Sequence[str]], files: int = 1
) -> Path:
    """Write a data set folder in the Hub's layout, with a number of files for each split."""
    card = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, texts in splits.items():
        card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
        size = -(-len(texts) // files)
        for number in range(files):
            name = f"{split}-{number:05d}-of-{files:05d}.parquet"
            part = texts[number * size : (number + 1) * size]
            write_records(folder / config / name, part)
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder
