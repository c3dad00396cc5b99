"""The verb that puts two models side by side: compare."""

from __future__ import annotations

import textwrap
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pha.commands.common import AddVerb, console_for, print_json
from pha.commands.evaluation import (
    add_window_options,
    describe_protocol,
    protocol_of,
    show_perplexity,
)
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pha.evals.paired import PairedComparison
    from pha.evals.protocols import Protocol
    from pha.loading import LoadedModel


def add_compare(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "compare",
        compare,
        "which of two models predicts a text better, with an interval, and where",
        "Both models score the same windows of the same tokens. The difference in loss, A - B,\n"
        "has an interval over blocks of consecutive text, and is broken down by context,\n"
        "frequency and recall of the token. The interval covers the text, not training seeds.",
    )
    sub.add_argument("a", metavar="A", type=Path, help="run, checkpoint or saved model")
    sub.add_argument("b", metavar="B", type=Path, help="the other")
    add_window_options(sub)
    sub.add_argument(
        "--block",
        type=int,
        help="tokens per block of the interval (2048 or more, until blocks are independent)",
    )
    sub.add_argument("--out", metavar="DIR", type=Path, help="write comparison.json, .svg and .png")
    sub.add_argument("--json", action="store_true", help="print as JSON")


def compare(options: Namespace) -> None:
    """`pha compare`."""
    from rich.progress import Progress

    from pha.data import TokenStore
    from pha.evals.paired import compare_models
    from pha.loading import load_model
    from pha.utils.hardware import choose_precision, default_device, provenance

    device = default_device()
    a, b = (load_model(path, device) for path in (options.a, options.b))
    store = TokenStore.open(options.data)
    protocol = _common_protocol(options, a, b)
    precision = choose_precision(options.precision, device)
    console = console_for(options)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {name: progress.add_task(f"scoring {name}", total=None) for name in "AB"}
        result = compare_models(
            a,
            b,
            store,
            options.split,
            protocol,
            precision=precision,
            block=options.block,
            progress=lambda name, done, total: progress.update(
                tasks[name], completed=done, total=total
            ),
        )
    content = result.to_dict() | {"provenance": provenance(device, precision)}
    if options.out is not None:
        _write(options.out, result, content)
    if options.json:
        print_json(content)
        return
    _print(options, result, console)
    if options.out is not None:
        console.print(f"JSON and picture: {options.out}/comparison.*", highlight=False)


def _common_protocol(options: Namespace, a: LoadedModel, b: LoadedModel) -> Protocol:
    """The windows of both: as given, else as both were trained."""
    from pha.evals.protocols import trained_protocol

    mine, other = trained_protocol(a.run), trained_protocol(b.run)
    if mine and other:
        if options.sequence_length is None and mine.sequence_length != other.sequence_length:
            raise PHAError(
                f"{a.path} was trained on sequences of {mine.sequence_length} tokens and {b.path} "
                f"of {other.sequence_length}; choose one with --sequence-length"
            )
        if options.packed_documents is None and mine.packed_documents != other.packed_documents:
            raise PHAError(
                f"one of {a.path} and {b.path} was trained with packed documents and the other "
                "without; choose with --packed-documents or --no-packed-documents"
            )
    return protocol_of(options, mine or other)


def _write(out: Path, result: PairedComparison, content: dict[str, Any]) -> None:
    from pha.report.charts import describe, paired_figure
    from pha.report.plots import save_picture
    from pha.utils.files import write_json

    try:
        write_json(out / "comparison.json", content)
        save_picture(paired_figure(result), out / "comparison", describe(result))
    except OSError as error:
        raise PHAError(f"{out} cannot be written ({error.strerror or error})") from error


def _print(options: Namespace, result: PairedComparison, console: Console) -> None:
    for text in (f"A: {result.a}", f"B: {result.b}"):
        console.print(text, highlight=False, markup=False)
    console.print(_totals_table(result, options.split))
    console.print(f"[bold]{result.verdict()}[/]", highlight=False)
    a_better, b_better = result.blocks_better
    low, high = result.bootstrap
    ratio, ratio_low, ratio_high = result.perplexity_ratio
    console.print(
        f"perplexity of A / B: {ratio:.4f} ({ratio_low:.4f} to {ratio_high:.4f}); blocks of "
        f"{result.block_tokens:,} tokens: {result.difference.blocks}, A better in {a_better:.0%}, "
        f"B in {b_better:.0%}; bootstrap interval {low:+.4f} to {high:+.4f}\n"
        "The interval covers the choice of text, not the seeds of training.",
        highlight=False,
    )
    if caution := result.caution():
        console.print(f"caution: {caution}", highlight=False, style="yellow")
    console.print(_bins_table(result))
    _print_passages(result, console)
    protocol = result.evaluations[0].protocol
    console.print(f"protocol: {describe_protocol(protocol)}", highlight=False)


def _totals_table(result: PairedComparison, split: str) -> Table:
    from rich.table import Table

    a, b = result.evaluations
    table = Table(title=f"on the {split} split, {a.tokens:,} tokens", title_justify="left")
    table.add_column("")
    for heading in ("A", "B", "A against B"):
        table.add_column(heading, justify="right")
    table.add_row(
        "loss (nats per token)", f"{a.loss:.4f}", f"{b.loss:.4f}", f"{a.loss - b.loss:+.4f}"
    )
    for name, one, two in (
        ("perplexity per token", a.perplexity, b.perplexity),
        ("perplexity per word", a.word_perplexity, b.word_perplexity),
        ("perplexity per byte", a.byte_perplexity, b.byte_perplexity),
    ):
        table.add_row(name, show_perplexity(one), show_perplexity(two), f"{one / two - 1:+.2%}")
    bits = a.bits_per_byte, b.bits_per_byte
    table.add_row("bits per byte", *(f"{x:.4f}" for x in bits), f"{bits[0] - bits[1]:+.4f}")
    right = a.accuracy, b.accuracy
    gap = f"{100 * (right[0] - right[1]):+.2f} points"
    table.add_row("next-token accuracy", *(f"{x:.2%}" for x in right), gap)
    return table


def _bins_table(result: PairedComparison) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title="where (nats per token; * where the interval leaves zero out)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for heading in ("share", "loss A", "loss B", "A - B", "± 95%", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, bins in result.breakdowns.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/]")
        for entry in bins:
            width = entry.difference.half_width
            table.add_row(
                f"  {entry.label}",
                f"{entry.share:.1%}",
                f"{entry.loss_a:.3f}",
                f"{entry.loss_b:.3f}",
                f"{entry.difference.mean:+.4f}",
                "few blocks" if width is None else f"{width:.4f}",
                "*" if entry.difference.sign else "",
            )
    return table


def _print_passages(result: PairedComparison, console: Console) -> None:
    from pha.utils.text import printable

    indent = " " * 4
    for name in ("A", "B"):
        passages = [passage for passage in result.passages if passage.better == name]
        if passages:
            console.print(
                f"blocks where {name} is better by most, with the stretch that tells most:"
            )
        for passage in passages:
            last = passage.first_token + passage.tokens - 1
            head = f"  tokens {passage.first_token:,} to {last:,}: {passage.difference:+.3f}"
            lines = textwrap.wrap(
                f"({passage.excerpt_difference:+.2f}) {printable(passage.excerpt)}",
                console.width,
                initial_indent=indent,
                subsequent_indent=indent,
                max_lines=2,
                placeholder=" …",
            )
            for line in (head, *lines):
                console.print(line, highlight=False, markup=False)
