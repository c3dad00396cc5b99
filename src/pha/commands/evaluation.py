"""The verb that scores a trained model: eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.progress import Progress, TaskID

from pha.commands.common import Model, Precision, Store, console_for, figures_table, print_json
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from pha.evals.perplexity import Evaluation
    from pha.evals.protocols import Protocol


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
    json: bool = False,
) -> None:
    """Token, word and byte perplexity and accuracy over a whole split.

      pha eval runs/mine --data STORE                             as the run was trained
      pha eval runs/mine --data STORE --protocol all              three protocols, one table
      pha eval runs/mine --data STORE --protocol 1024 --protocol 1024/256
    With T the run's sequence length, protocols are `non-overlapping` (windows of T tokens,
    stride T), `strided` (T, stride T/2), `long` (4T, stride 4T), `all` of these, and LENGTH
    or LENGTH/STRIDE in tokens.

    Args:
        model: a run, a checkpoint or a saved model
        data: token store made by `pha prepare`
        split: train, validation or test
        sequence_length: tokens per window (the run's own, else 1024)
        stride: advance per window (its length)
        packed_documents: reset at document starts (as the run was trained)
        precision: of the products; auto: bf16 where they are clearly faster in it
        protocol: see above; again for more, side by side
        json: print as JSON
    """
    from pha.data import TokenStore, tokenizer_sha256
    from pha.evals.perplexity import evaluate as run_evaluation
    from pha.evals.protocols import parse_protocols, trained_protocol
    from pha.loading import load_model
    from pha.utils.hardware import choose_precision, default_device, provenance

    if protocol and stride is not None:
        raise PHAError("--stride goes with one protocol; write --protocol LENGTH/STRIDE")
    device = default_device()
    loaded = load_model(model, device)
    store = TokenStore.open(data)
    store.require_tokenizer(tokenizer_sha256(loaded.tokenizer))
    base = choose_protocol(sequence_length, stride, packed_documents, trained_protocol(loaded.run))
    protocols = [base]
    if protocol:
        protocols = parse_protocols(protocol, base.sequence_length, base.packed_documents)
    chosen = choose_precision(precision, device)
    console = console_for(json)
    results = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for each in protocols:
            task = progress.add_task(f"scoring {split} {each.name}".rstrip())

            def show(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            results.append(
                run_evaluation(
                    loaded.model,
                    store,
                    split,
                    sequence_length=each.sequence_length,
                    stride=each.stride,
                    packed_documents=each.packed_documents,
                    precision=chosen,
                    progress=show,
                    name=each.name,
                )
            )
    if json:
        content = [result.to_dict() for result in results]
        whole = content[0] if len(content) == 1 else {"evaluations": content}
        print_json({"model": str(model)} | whole | {"provenance": provenance(device, chosen)})
        return
    title = f"{model} on the {split} split of {data}"
    if len(results) == 1:
        _print_one(title, results[0], console)
    else:
        _print_all(title, results, console)


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


def show_perplexity(value: float) -> str:
    """Four significant figures while they are decimals; three and an exponent from 10^7 on."""
    from pha.utils.text import perplexity

    return perplexity(value) if value < 1e7 else f"{value:.3g}"


def _print_one(title: str, result: Evaluation, console: Console) -> None:
    table = figures_table(title, "measure", "value")
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


def _print_all(title: str, results: list[Evaluation], console: Console) -> None:
    columns = ("T/stride", "token", "word", "byte", "bits/B", "acc.", "tokens", "s")
    table = figures_table(title, "protocol", *columns, gap=0)
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
