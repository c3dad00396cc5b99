"""Write text as a local data set of the Hugging Face Hub's layout, to run Hub recipes offline.

    python scripts/hub_layout.py wikitext FOLDER_WITH_train_valid_test OUT [--limit-lines N]
    python scripts/hub_layout.py documents FILE.jsonl.xz... OUT [--characters N] [--documents N]

`wikitext` makes config wikitext-103-raw-v1 as Salesforce/wikitext has it: a row for each line,
blank lines as empty strings. `documents` makes config plain_text with one train split as
Skylion007/openwebtext has it, cutting long texts at blank lines after N characters or more.
`pha prepare hf:OUT:wikitext-103-raw-v1` and `pha prepare hf:OUT:plain_text` read them.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = {"train": "train", "valid": "validation", "test": "test"}
ROWS = 50_000  # per file, so that a split has several, as on the Hub


def write_split(folder: Path, split: str, texts: list[str]) -> None:
    """One split as numbered parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [texts[i : i + ROWS] for i in range(0, len(texts), ROWS)]
    for number, part in enumerate(parts):
        name = f"{split}-{number:05d}-of-{len(parts):05d}.parquet"
        pq.write_table(pa.table({"text": pa.array(part, pa.string())}), folder / name)


def write_card(out: Path, config: str, splits: list[str]) -> None:
    """README.md with the configuration that `datasets` reads."""
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (out / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def wikitext(options: argparse.Namespace) -> None:
    """Lines of train, valid and test files as rows."""
    folder, out = options.paths
    config = "wikitext-103-raw-v1"
    for word, split in SPLITS.items():
        (path,) = (p for p in folder.iterdir() if word in p.name.split("."))
        with path.open(encoding="utf-8", newline="") as file:
            limit = options.limit_lines if split == "train" else None
            rows = [line if line.strip() else "" for line in islice(file, limit)]
        write_split(out / config, split, rows)
    write_card(out, config, list(SPLITS.values()))


def cut(text: str, characters: int) -> Iterator[str]:
    """Pieces of at least so many characters that end at a blank line."""
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + characters)
        end = len(text) if end < 0 else end + 2
        yield text[start:end].strip()
        start = end


def documents(options: argparse.Namespace) -> None:
    """Texts of .jsonl.xz files as documents of one train split."""
    *files, out = options.paths
    texts: list[str] = []
    for path in files:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                texts += cut(json.loads(line)["text"], options.characters)
    # Spread over all books where not all are wanted.
    step = max(1, len(texts) // options.documents) if options.documents else 1
    write_split(out / "plain_text", "train", texts[::step][: options.documents])
    write_card(out, "plain_text", ["train"])


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("wikitext", "documents"))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--limit-lines", type=int, help="lines of the train split (all)")
    parser.add_argument("--characters", type=int, default=5000, help="per document (5000)")
    parser.add_argument("--documents", type=int, help="how many documents (all)")
    options = parser.parse_args()
    {"wikitext": wikitext, "documents": documents}[options.kind](options)


if __name__ == "__main__":
    main()
