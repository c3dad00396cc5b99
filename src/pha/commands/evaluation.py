"""Verbs that score a trained model: eval."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from pha.commands.common import AddVerb, console_for, print_json


def add_evaluate(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "eval",
        evaluate,
        "token, word and byte perplexity and accuracy over a whole split",
    )
    sub.add_argument("model", metavar="RUN_OR_MODEL", type=Path)
    sub.add_argument("--data", metavar="STORE", type=Path, required=True)
    sub.add_argument("--split", default="test", help="train, validation or test (test)")
    sub.add_argument(
        "--sequence-length", type=int, help="tokens per window (the run's own, else 1024)"
    )
    sub.add_argument("--stride", type=int, help="advance per window (its length)")
    sub.add_argument(
        "--packed-documents",
        action=argparse.BooleanOptionalAction,
        help="reset at document starts (as the run was trained)",
    )
    sub.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="fp32")
    sub.add_argument("--json", action="store_true", help="print as JSON")


def evaluate(options: Namespace) -> None:
    """`pha eval`."""
    import yaml

    from pha.data import TokenStore, tokenizer_sha256
    from pha.evals.loading import load_model
    from pha.evals.perplexity import evaluate as run_evaluation
    from pha.utils.hardware import choose_precision, default_device, provenance

    device = default_device()
    loaded = load_model(options.model, device)
    store = TokenStore.open(options.data)
    store.require_tokenizer(tokenizer_sha256(loaded.tokenizer))
    trained: dict[str, Any] = {}
    if loaded.run is not None and loaded.run.config.is_file():
        trained = yaml.safe_load(loaded.run.config.read_text(encoding="utf-8"))["data"]
    length = options.sequence_length or trained.get("sequence_length", 1024)
    packed = options.packed_documents
    if packed is None:
        packed = trained.get("packed_documents", False)
    precision = choose_precision(options.precision, device)
    console = console_for(options)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"scoring {options.split}")
        result = run_evaluation(
            loaded.model,
            store,
            options.split,
            sequence_length=length,
            stride=options.stride,
            packed_documents=packed,
            precision=precision,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if options.json:
        print_json(
            {"model": str(options.model)}
            | result.to_dict()
            | {"provenance": provenance(device, precision)}
        )
        return
    table = Table(title=f"{options.model} on the {options.split} split of {options.data}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in (
        ("perplexity per token", f"{result.perplexity:.3f}"),
        ("perplexity per word", f"{result.word_perplexity:.3f}"),
        ("perplexity per byte", f"{result.byte_perplexity:.4f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("next-token accuracy", f"{result.accuracy:.2%}"),
        ("tokens scored", f"{result.tokens:,}"),
        ("seconds", f"{result.seconds:.1f}"),
    ):
        table.add_row(name, value)
    console.print(table)
    protocol = result.protocol
    console.print(
        f"protocol: {protocol['windows']} windows of {protocol['sequence_length']} tokens, stride "
        f"{protocol['stride']}, {protocol['documents']}, {protocol['precision']}",
        highlight=False,
    )
