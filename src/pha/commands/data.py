"""The verb that turns text into a token store: prepare."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from pha.commands.common import Folder, console_for, figures_table, print_json

if TYPE_CHECKING:
    from pha.data import TokenStore


def prepare(
    source: str,
    *,
    tokenizer: str,
    out: Folder,
    separator: Literal["auto", "end-of-text", "none"] = "auto",
    text_field: str = "text",
    holdout: Fraction | None = None,
    split_seed: int | None = None,
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Turn text into a token store.

    SOURCE is one of
      stdlib                  this Python's standard library
      FILE                    UTF-8 text, cut 90/5/5; or records: .jsonl (.gz, .xz, .zst), .parquet
      FOLDER                  files named train, valid and test (wiki.train.raw, train-2.jsonl.xz)
                              keep these splits; any others are split by document
      'books/**/*.jsonl.xz'   a pattern, quoted: likewise
      hf:OWNER/NAME[:CONFIG]  a data set of the Hugging Face Hub, read as a stream
      hf:FOLDER:CONFIG        a local folder in the Hub's layout
      wikitext-103, wikitext-2, openwebtext
                              short for data sets of the Hub; a path of that name comes first

    Args:
        source: text, as above
        tokenizer: gpt2, gpt2:FOLDER with encoder.json and vocab.bpe, bytes, bpe:SIZE trained on the
            text (at most its first GB), or the folder of a saved tokenizer
        out: folder of the store
        separator: what ends a document; auto: end-of-text where documents are separate texts
        text_field: field of a record that holds the text
        holdout: share of documents in each of validation and test, where the source has no splits
            (0.05 of files, 0.005 of Hub data sets)
        split_seed: of the hash that splits documents (0)
        workers: processes that encode (all usable cores)
        json: print the store's facts as JSON
    """
    from pha.data import SourceOptions
    from pha.data import prepare as prepare_store
    from pha.data.display import PreparationDisplay

    console = console_for(json)
    begin = time.monotonic()
    with PreparationDisplay(console) as display:
        store = prepare_store(
            source,
            tokenizer,
            out,
            separator=separator,
            options=SourceOptions(text_field, holdout, split_seed),
            workers=workers,
            progress=display,
        )
    effort = _effort(store, time.monotonic() - begin)
    if json:
        print_json({**store.describe(), "preparation": effort})
    else:
        _print_store(console, store, effort)


def _effort(store: TokenStore, seconds: float) -> dict[str, Any]:
    """Time and rates of a preparation, with the tokenizer's training where there was one."""
    counts = [store.counts(split) for split in store.splits]
    return {
        "seconds": round(seconds, 2),
        "tokens_per_second": round(sum(c.tokens for c in counts) / seconds),
        "bytes_per_second": round(sum(c.bytes for c in counts) / seconds),
    }


def _print_store(console: Console, store: TokenStore, effort: dict[str, Any]) -> None:
    title = f"{store.path}: {store.vocab_size} token vocabulary"
    columns = ("documents", "tokens", "words", "lines", "bytes")
    table = figures_table(title, "split", *columns)
    for split in store.splits:
        c = store.counts(split)
        numbers = (c.documents, c.tokens, c.words, c.lines, c.bytes)
        table.add_row(split, *(f"{n:,}" for n in numbers))
    console.print(table)
    facts = store.describe()["split"]
    lines = [
        f"{effort['seconds']:,} s, {effort['tokens_per_second']:,} tokens/s, "
        f"{effort['bytes_per_second'] / 1e6:.2f} MB/s",
        f"split: {facts['rule']}, sha256 {facts['sha256']}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
