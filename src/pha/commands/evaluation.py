"""Verbs that score trained models on a store: eval and compare."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pha.commands.common import (
    Attention,
    File,
    Folder,
    Json,
    Model,
    Precision,
    Store,
    answer,
    figures_table,
    progress_bars,
    read_attention,
)
from pha.utils.errors import PHAError
from pha.utils.outputs import require_file, require_outputs, writing
from pha.utils.text import perplexity, printable

if TYPE_CHECKING:
    from pha.evals.compare import PairedComparison
    from pha.evals.protocols import Protocol
    from pha.loading import LoadedModel
    from pha.results import Evaluation


def show_perplexity(value: float) -> str:
    """Four significant figures while they are decimals; three and an exponent from 10^7 on."""
    return perplexity(value) if value < 1e7 else f"{value:.3g}"


def _ratio(a: float, b: float) -> str:
    return f"{a / b - 1:+.2%}"


def _gap(a: float, b: float) -> str:
    return f"{a - b:+.4f}"


def _points(a: float, b: float) -> str:
    return f"{100 * (a - b):+.2f} points"


# What is measured, where it lies in an `Evaluation`, how it is shown, and how A is set against B.
Measure = tuple[str, str, Callable[[Any], str], Callable[[float, float], str] | None]
LOSS: Measure = ("loss (nats per token)", "loss", "{:.4f}".format, _gap)
SCORES: tuple[Measure, ...] = (
    ("perplexity per token", "perplexity", show_perplexity, _ratio),
    ("perplexity per word", "word_perplexity", show_perplexity, _ratio),
    ("perplexity per byte", "byte_perplexity", show_perplexity, _ratio),
    ("bits per byte", "bits_per_byte", "{:.4f}".format, _gap),
    ("next-token accuracy", "accuracy", "{:.2%}".format, _points),
)
WORK: tuple[Measure, ...] = (
    ("tokens scored", "tokens", "{:,}".format, None),
    ("seconds", "seconds", "{:.3g}".format, None),
)


def evaluate(
    model: Model,
    *,
    data: Store,
    split: str = "test",
    sequence_length: int | None = None,
    stride: int | None = None,
    packed_documents: bool | None = None,
    precision: Precision = "fp32",
    protocol: Sequence[Annotated[str, "NAME_OR_SPEC"]] = (),
    nats: File | None = None,
    attention: Sequence[Attention] = (),
    json: Json = False,
) -> None:
    """Token, word and byte perplexity and accuracy over a whole split.

      pha eval runs/mine --data STORE                             as the run was trained
      pha eval runs/mine --data STORE --protocol all              three protocols, one table
      pha eval runs/mine --data STORE --protocol 1024 --protocol 1024/256
    With T the run's sequence length, protocols are `non-overlapping` (windows of T tokens,
    stride T), `strided` (T, stride T/2), `long` (4T, stride 4T), `all` of these, and LENGTH
    or LENGTH/STRIDE in tokens.

    Args:
        split: train, validation or test
        sequence_length: tokens per window (as the model was trained, else 1024)
        stride: advance per window (its length)
        packed_documents: reset at document starts (as the run was trained)
        protocol: see above; again for more, side by side
        nats: keep the loss of every token here (safetensors), for `pha compare`
    """
    from pha.data import TokenStore
    from pha.evals.compare import keep_nats
    from pha.evals.perplexity import evaluate as run_evaluation
    from pha.evals.protocols import own_protocol, parse_protocols
    from pha.loading import load_model
    from pha.utils.hardware import choose_precision, default_device, provenance

    if protocol and stride is not None:
        raise PHAError("--stride goes with one protocol; write --protocol LENGTH/STRIDE")
    require_file(nats)
    device, options = default_device(), read_attention(attention)
    loaded = load_model(model, device, attention=options)
    store = TokenStore.open(data)
    store.require_tokenizer(loaded.tokenizer)
    base = choose_protocol(sequence_length, stride, packed_documents, own_protocol(loaded))
    protocols = [base]
    if protocol:
        protocols = parse_protocols(protocol, base.sequence_length, base.packed_documents)
    if nats is not None and len(protocols) > 1:
        raise PHAError("--nats keeps the losses of one protocol; name one")
    chosen = choose_precision(precision, device)
    with progress_bars() as progress:
        results = []
        for each in protocols:
            shown = partial(progress, f"{split} {each.name}")
            if nats is None:
                found = run_evaluation(
                    loaded.model, store, split, each, precision=chosen, progress=shown
                )
            else:
                kept = keep_nats(loaded, store, split, each, chosen, shown)
                found = kept.evaluation
                with writing(nats):
                    kept.write(nats)
            results.append(found)
    content = list(map(asdict, results))
    facts: dict[str, Any] = {"attention": options} if options else {}
    facts["provenance"] = provenance(device, chosen)
    title, windows = f"{model} on the {split} split of {data}", results[0].protocol
    if len(results) == 1:
        table = _measures_table(title, {"value": results[0]})
        record, line = content[0], f"protocol: {describe_protocol(windows)}"
    else:
        columns = {"{name}\n{sequence_length}/{stride}".format(**r.protocol): r for r in results}
        table = _measures_table(title, columns)
        record = {"evaluations": content}
        line = f"LENGTH/STRIDE in tokens; {windows['documents']}, {windows['precision']}"
    answer(json, {"model": str(model)} | record | facts, table, line)


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
    json: Json = False,
) -> None:
    """Which of two models predicts a text better, with an interval, and where.

    Both models score the same windows of the same tokens. The difference in loss, A - B,
    has an interval over blocks of consecutive text, and is broken down by context,
    frequency and recall of the token. The interval covers the text, not training seeds.
    In the place of the models, two files of `pha eval --nats` compare at once.

    Args:
        a: run, checkpoint or saved model, or its kept losses
        b: the other
        split: train, validation or test
        sequence_length: tokens per window (as the models were trained, else 1024)
        stride: advance per window (its length)
        packed_documents: reset at document starts (as the runs were trained)
        block: tokens per block of the interval (2048 or more, until blocks are independent)
        out: write comparison.json, .svg and .png
    """
    from pha.data import TokenStore
    from pha.evals.compare import compare_models, compare_nats
    from pha.evals.nats import KeptNats
    from pha.loading import load_model
    from pha.results import JSON_FORMAT
    from pha.utils.hardware import choose_precision, default_device, provenance

    require_outputs(out, *(f"comparison.{ending}" for ending in ("json", "svg", "png")))
    device, store = default_device(), TokenStore.open(data)
    chosen = choose_precision(precision, device)
    if a.is_file() or b.is_file():
        if (sequence_length, stride, packed_documents, precision) != (None, None, None, "fp32"):
            raise PHAError("kept losses have their own; leave out options of windows and precision")
        kept = KeptNats.read(a, store, split), KeptNats.read(b, store, split)
        result = compare_nats(*kept, store, block=block)
        chosen = result.evaluations[0].protocol["precision"]
    else:
        models = load_model(a, device), load_model(b, device)
        trained = _common_protocol(*models, sequence_length, packed_documents)
        protocol = choose_protocol(sequence_length, stride, packed_documents, trained)
        with progress_bars() as progress:
            result = compare_models(
                *models, store, split, protocol, precision=chosen, block=block, progress=progress
            )
    facts = {"format": JSON_FORMAT, "provenance": provenance(device, chosen)}
    content = result.to_dict() | facts
    if out is not None:
        _write(out, result, content)
    where = [] if out is None else [f"JSON and picture: {out}/comparison.*"]
    answer(json, content, *_describe(result, split), *where)


def choose_protocol(
    length: int | None, stride: int | None, packed: bool | None, trained: Protocol | None
) -> Protocol:
    """The windows that options name; what they leave open is as in training."""
    from pha.evals.protocols import DEFAULT_LENGTH, Protocol

    if length is None:
        length = trained.sequence_length if trained else DEFAULT_LENGTH
    if packed is None:
        packed = trained is not None and trained.packed_documents
    return Protocol(length, length if stride is None else stride, packed)


def describe_protocol(protocol: dict[str, Any]) -> str:
    """What a result says of its protocol, in a line."""
    return (
        f"{protocol['windows']} windows of {protocol['sequence_length']} tokens, stride "
        f"{protocol['stride']}, {protocol['documents']}, {protocol['precision']}"
    )


def _common_protocol(
    a: LoadedModel, b: LoadedModel, length: int | None, packed: bool | None
) -> Protocol | None:
    """The windows that both were trained in, where the options leave any of it open."""
    from pha.evals.protocols import own_protocol

    mine, other = own_protocol(a), own_protocol(b)
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


def _measures_table(title: str, results: Mapping[str, Evaluation], against: bool = False) -> Table:
    """A row for each measure and a column for each evaluation; also A against B where asked."""
    table = figures_table(title, "", *results, *(["A against B"] if against else []))
    for name, attribute, show, contrast in (LOSS, *SCORES) if against else (*SCORES, *WORK):
        values = [getattr(result, attribute) for result in results.values()]
        last = [contrast(*values)] if against and contrast else []
        table.add_row(name, *map(show, values), *last)
    return table


def _write(out: Path, result: PairedComparison, content: dict[str, Any]) -> None:
    from pha.report.charts import describe, paired_figure
    from pha.report.plots import save_picture
    from pha.utils.files import write_json

    with writing(out):
        write_json(out / "comparison.json", content)
        save_picture(paired_figure(result), out / "comparison", describe(result))


def _describe(result: PairedComparison, split: str) -> Iterator[RenderableType]:
    a, b = result.evaluations
    yield f"A: {result.a}\nB: {result.b}"
    title = f"on the {split} split, {a.tokens:,} tokens"
    yield _measures_table(title, {"A": a, "B": b}, against=True)
    yield Text(result.verdict(), style="bold")
    a_better, b_better = result.blocks_better
    low, high = result.bootstrap
    ratio, ratio_low, ratio_high = result.perplexity_ratio
    yield Text(
        f"perplexity of A / B: {ratio:.4f} ({ratio_low:.4f} to {ratio_high:.4f}); blocks of "
        f"{result.block_tokens:,} tokens: {result.difference.blocks}, A better in {a_better:.0%}, "
        f"B in {b_better:.0%}; bootstrap interval {low:+.4f} to {high:+.4f}\n"
        "The interval covers the choice of text, not the seeds of training."
    )
    if caution := result.caution():
        yield Text(f"caution: {caution}", style="yellow")
    yield _bins_table(result)
    for name in ("A", "B"):
        passages = [passage for passage in result.passages if passage.better == name]
        if passages:
            yield f"blocks where {name} is better by most, with the stretch that tells most:"
        for passage in passages:
            last = passage.first_token + passage.tokens - 1
            yield f"  tokens {passage.first_token:,} to {last:,}: {passage.difference:+.3f}"
            yield textwrap.fill(
                f"({passage.excerpt_difference:+.2f}) {printable(passage.excerpt)}",
                80,
                initial_indent=" " * 4,
                subsequent_indent=" " * 4,
                max_lines=2,
                placeholder=" …",
            )
    yield Text(f"protocol: {describe_protocol(a.protocol)}")


def _bins_table(result: PairedComparison) -> Table:
    title = "where (nats per token; * where the interval leaves zero out)"
    table = figures_table(title, "", "share", "loss A", "loss B", "A - B", "± 95%", "")
    for name, bins in result.breakdowns.items():
        table.add_section()
        table.add_row(Text(name, style="bold"))
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
