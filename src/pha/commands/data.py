"""The verb that turns text into a token store."""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pha.commands.common import AddVerb, console_for, print_json

if TYPE_CHECKING:
    from pha.data import TokenStore

_DETAIL = """\
SOURCE is one of
  stdlib                  this Python's standard library
  FILE                    UTF-8 text, cut 90/5/5; or records: .jsonl (.gz, .xz, .zst), .parquet
  FOLDER                  files named train, valid and test (wiki.train.raw, train-2.jsonl.xz) keep
                          these splits; any others are split by document
  'books/**/*.jsonl.xz'   a pattern, quoted: likewise
  hf:OWNER/NAME[:CONFIG]  a data set of the Hugging Face Hub, read as a stream
  hf:FOLDER:CONFIG        a local folder in the Hub's layout
  wikitext-103, wikitext-2, openwebtext
                          short for data sets of the Hub; a path of that name comes first"""


def add_prepare(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb("prepare", prepare, "turn text into a token store", _DETAIL)
    sub.add_argument("source", metavar="SOURCE")
    sub.add_argument(
        "--tokenizer",
        required=True,
        help="gpt2, gpt2:FOLDER with encoder.json and vocab.bpe, bytes, bpe:SIZE trained on the "
        "text (at most its first GB), or the folder of a saved tokenizer",
    )
    sub.add_argument("--out", type=Path, required=True, help="folder of the store")
    sub.add_argument(
        "--separator",
        choices=("auto", "end-of-text", "none"),
        default="auto",
        help="what ends a document; auto: end-of-text where documents are separate texts",
    )
    sub.add_argument(
        "--text-field", default="text", help="field of a record that holds the text (text)"
    )
    sub.add_argument(
        "--holdout",
        type=_fraction,
        metavar="FRACTION",
        help="share of documents in each of validation and test, where the source has no splits "
        "(0.05 of files, 0.005 of Hub data sets)",
    )
    sub.add_argument(
        "--split-seed", type=int, metavar="N", help="of the hash that splits documents (0)"
    )
    sub.add_argument("--json", action="store_true", help="print the store's facts as JSON")


def prepare(options: Namespace) -> None:
    """`pha prepare`."""
    from pha.data import SourceOptions
    from pha.data import prepare as prepare_store
    from pha.data.display import PreparationDisplay

    console = console_for(options)
    begin = time.monotonic()
    with PreparationDisplay(console) as display:
        store = prepare_store(
            options.source,
            options.tokenizer,
            options.out,
            separator=options.separator,
            options=SourceOptions(options.text_field, options.holdout, options.split_seed),
            progress=display,
        )
    effort = _effort(store, time.monotonic() - begin)
    if options.json:
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
    table = Table(title=f"{store.path}: {store.vocab_size} token vocabulary")
    for name in ("split", "documents", "tokens", "words", "lines", "bytes"):
        table.add_column(name, justify="left" if name == "split" else "right")
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


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 0.05") from None
