"""The verb that puts two models side by side: compare."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pha.commands.common import (
    Folder,
    Precision,
    Store,
    console_for,
    figures_table,
    print_json,
    writing,
)
from pha.commands.evaluation import choose_protocol, describe_protocol, show_perplexity
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from pha.evals.paired import PairedComparison
    from pha.evals.protocols import Protocol
    from pha.loading import LoadedModel


def compare(
    a: Path,
    b: Path,
    *,
    data: Store,
    split: str = "test",
    sequence_length: int | None = None,
    stride: int | None = None,
    packed_documents: bool | None = None,
    precision: Precision = "fp32",
    block: int | None = None,
    out: Folder | None = None,
    json: bool = False,
) -> None:
    """Which of two models predicts a text better, with an interval, and where.

    Both models score the same windows of the same tokens. The difference in loss, A - B,
    has an interval over blocks of consecutive text, and is broken down by context,
    frequency and recall of the token. The interval covers the text, not training seeds.

    Args:
        a: run, checkpoint or saved model
        b: the other
        data: token store made by `pha prepare`
        split: train, validation or test
        sequence_length: tokens per window (the runs' own, else 1024)
        stride: advance per window (its length)
        packed_documents: reset at document starts (as the runs were trained)
        precision: of the products; auto: bf16 where they are clearly faster in it
        block: tokens per block of the interval (2048 or more, until blocks are independent)
        out: write comparison.json, .svg and .png
        json: print as JSON
    """
    from pha.data import TokenStore
    from pha.evals.paired import compare_models
    from pha.loading import load_model
    from pha.utils.hardware import choose_precision, default_device, provenance

    device = default_device()
    models = load_model(a, device), load_model(b, device)
    store = TokenStore.open(data)
    trained = _common_protocol(*models, sequence_length, packed_documents)
    protocol = choose_protocol(sequence_length, stride, packed_documents, trained)
    chosen = choose_precision(precision, device)
    console = console_for(json)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {name: progress.add_task(f"scoring {name}", total=None) for name in "AB"}
        result = compare_models(
            *models,
            store,
            split,
            protocol,
            precision=chosen,
            block=block,
            progress=lambda name, done, total: progress.update(
                tasks[name], completed=done, total=total
            ),
        )
    content = result.to_dict() | {"provenance": provenance(device, chosen)}
    if out is not None:
        _write(out, result, content)
    if json:
        print_json(content)
        return
    _print(result, split, console)
    if out is not None:
        console.print(f"JSON and picture: {out}/comparison.*", highlight=False)


def _common_protocol(
    a: LoadedModel, b: LoadedModel, length: int | None, packed: bool | None
) -> Protocol | None:
    """The windows that both were trained in, where the options leave any of it open."""
    from pha.evals.protocols import trained_protocol

    mine, other = trained_protocol(a.run), trained_protocol(b.run)
    if mine and other:
        if length is None and mine.sequence_length != other.sequence_length:
            raise PHAError(
                f"{a.path} was trained on sequences of {mine.sequence_length} tokens and {b.path} "
                f"of {other.sequence_length}; choose one with --sequence-length"
            )
        if packed is None and mine.packed_documents != other.packed_documents:
            raise PHAError(
                f"one of {a.path} and {b.path} was trained with packed documents and the other "
                "without; choose with --packed-documents or --no-packed-documents"
            )
    return mine or other


def _write(out: Path, result: PairedComparison, content: dict[str, Any]) -> None:
    from pha.report.dots import save_picture
    from pha.report.paired import describe, paired_figure
    from pha.utils.files import write_json

    with writing(out):
        write_json(out / "comparison.json", content)
        save_picture(paired_figure(result), out / "comparison", describe(result))


def _print(result: PairedComparison, split: str, console: Console) -> None:
    for text in (f"A: {result.a}", f"B: {result.b}"):
        console.print(text, highlight=False, markup=False)
    console.print(_totals_table(result, split))
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
    a, b = result.evaluations
    title = f"on the {split} split, {a.tokens:,} tokens"
    table = figures_table(title, "", "A", "B", "A against B")
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
    title = "where (nats per token; * where the interval leaves zero out)"
    table = figures_table(title, "", "share", "loss A", "loss B", "A - B", "± 95%", "")
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
