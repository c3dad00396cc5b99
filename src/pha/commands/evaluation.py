"""Verbs that score a trained model: eval."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pha.commands.common import AddVerb, console_for, print_json
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from rich.console import Console

    from pha.evals.perplexity import Evaluation
    from pha.evals.protocols import Protocol


def add_evaluate(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "eval",
        evaluate,
        "token, word and byte perplexity and accuracy over a whole split",
        "  pha eval runs/mine --data STORE                             as the run was trained\n"
        "  pha eval runs/mine --data STORE --protocol all              three protocols, one table\n"
        "  pha eval runs/mine --data STORE --protocol 1024 --protocol 1024/256\n"
        "With T the run's sequence length, protocols are `non-overlapping` (windows of T tokens,\n"
        "stride T), `strided` (T, stride T/2), `long` (4T, stride 4T), `all` of these, and LENGTH\n"
        "or LENGTH/STRIDE in tokens.",
    )
    sub.add_argument("model", metavar="RUN_OR_MODEL", type=Path)
    add_window_options(sub)
    sub.add_argument(
        "--protocol",
        metavar="NAME_OR_SPEC",
        action="append",
        default=[],
        help="see above; again for more, side by side",
    )
    sub.add_argument("--json", action="store_true", help="print as JSON")


def add_window_options(sub: argparse.ArgumentParser) -> None:
    """The options that say which tokens are scored, and how."""
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


def protocol_of(options: Namespace, trained: Protocol | None) -> Protocol:
    """The protocol that the options name; what they leave open is as in training."""
    from pha.evals.protocols import DEFAULT_LENGTH, Protocol

    length, packed = options.sequence_length, options.packed_documents
    if length is None:
        length = trained.sequence_length if trained else DEFAULT_LENGTH
    if packed is None:
        packed = trained is not None and trained.packed_documents
    stride = length if options.stride is None else options.stride
    return Protocol(length, stride, packed)


def describe_protocol(protocol: dict[str, Any]) -> str:
    """What a result says of its protocol, in a line."""
    return (
        f"{protocol['windows']} windows of {protocol['sequence_length']} tokens, stride "
        f"{protocol['stride']}, {protocol['documents']}, {protocol['precision']}"
    )


def show_perplexity(value: float) -> str:
    """Four significant figures while they are decimals; three and an exponent from 10^7 on."""
    from pha.utils.text import perplexity

    return perplexity(value) if value < 1e7 else f"{value:.3g}"


def evaluate(options: Namespace) -> None:
    """`pha eval`."""
    from rich.progress import Progress, TaskID

    from pha.data import TokenStore, tokenizer_sha256
    from pha.evals.perplexity import evaluate as run_evaluation
    from pha.evals.protocols import parse_protocols, trained_protocol
    from pha.loading import load_model
    from pha.utils.hardware import choose_precision, default_device, provenance

    if options.protocol and options.stride is not None:
        raise PHAError("--stride goes with one protocol; write --protocol LENGTH/STRIDE")
    device = default_device()
    loaded = load_model(options.model, device)
    store = TokenStore.open(options.data)
    store.require_tokenizer(tokenizer_sha256(loaded.tokenizer))
    base = protocol_of(options, trained_protocol(loaded.run))
    protocols = [base]
    if options.protocol:
        protocols = parse_protocols(options.protocol, base.sequence_length, base.packed_documents)
    precision = choose_precision(options.precision, device)
    console = console_for(options)
    results = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for protocol in protocols:
            task = progress.add_task(f"scoring {options.split} {protocol.name}".rstrip())

            def show(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            results.append(
                run_evaluation(
                    loaded.model,
                    store,
                    options.split,
                    sequence_length=protocol.sequence_length,
                    stride=protocol.stride,
                    packed_documents=protocol.packed_documents,
                    precision=precision,
                    progress=show,
                    name=protocol.name,
                )
            )
    if options.json:
        content = [result.to_dict() for result in results]
        whole = content[0] if len(content) == 1 else {"evaluations": content}
        facts = {"provenance": provenance(device, precision)}
        print_json({"model": str(options.model)} | whole | facts)
    elif len(results) == 1:
        _print_one(options, results[0], console)
    else:
        _print_all(options, results, console)


def _print_one(options: Namespace, result: Evaluation, console: Console) -> None:
    from rich.table import Table

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
    console.print(f"protocol: {describe_protocol(result.protocol)}", highlight=False)


def _print_all(options: Namespace, results: list[Evaluation], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{options.model} on the {options.split} split of {options.data}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("protocol", no_wrap=True)
    for heading in ("T/stride", "token", "word", "byte", "bits/B", "acc.", "tokens", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        protocol = result.protocol
        table.add_row(
            protocol["name"],
            f"{protocol['sequence_length']}/{protocol['stride']}",
            show_perplexity(result.perplexity),
            show_perplexity(result.word_perplexity),
            show_perplexity(result.byte_perplexity),
            f"{result.bits_per_byte:.4f}",
            f"{result.accuracy:.2%}",
            f"{result.tokens:,}",
            f"{result.seconds:.3g}",
        )
    console.print(table)
    protocol = results[0].protocol
    console.print(
        f"perplexity per token, word and byte; windows of T tokens; {protocol['documents']}, "
        f"{protocol['precision']}",
        highlight=False,
    )
