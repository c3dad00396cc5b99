"""What each verb of the command line does: call the library, print the result."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pha.train.errors import TrainingInterruptedError
from pha.utils.errors import PHAError

__all__ = ["TrainingInterruptedError"]


def _console(options: Namespace) -> Console:
    """Progress and tables; on standard error where standard output is for JSON."""
    return Console(stderr=bool(getattr(options, "json", False)))


def _json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    print()


def demo(options: Namespace) -> None:
    """`pha demo`."""
    from pha.studies.demo import run_demo

    run_demo(options.out, Console(), options.steps)


def prepare(options: Namespace) -> None:
    """`pha prepare`."""
    from pha.data import prepare as prepare_store

    console = _console(options)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        store = prepare_store(
            options.source,
            options.tokenizer,
            options.out,
            separator=options.separator,
            progress=show,
        )
    if options.json:
        _json(store.describe())
        return
    table = Table(title=f"{store.path}: {store.vocab_size} token vocabulary")
    for name in ("split", "documents", "tokens", "words", "lines", "bytes"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split in store.splits:
        c = store.counts(split)
        numbers = (c.documents, c.tokens, c.words, c.lines, c.bytes)
        table.add_row(split, *(f"{n:,}" for n in numbers))
    console.print(table)


def train(options: Namespace, overrides: list[str]) -> None:
    """`pha train`."""
    from pha.train.recipes import load_recipe
    from pha.train.session import run_training

    if options.data is not None:
        overrides = [*overrides, "--data.store", options.data, "--data.source", "null"]
    if options.init_from is not None:
        overrides = [*overrides, "--run.init_from", options.init_from]
    config = load_recipe(options.recipe, overrides)
    out = options.out or Path("runs") / str(config.recipe)
    console = _console(options)
    result = run_training(config, out, console, options.resume, options.dry_run)
    if not result:
        return  # not the main process
    if options.json:
        _json(result)
    elif not (options.dry_run or options.quiet):
        from pha.report.tables import results_table

        console.print(results_table([result]))
        console.print(f"run folder: {out}", highlight=False)


def recipes(options: Namespace) -> None:
    """`pha recipes`."""
    import yaml

    from pha.nn.presets import PRESETS
    from pha.train.recipes import describe, load_recipe, make_parser, protocols

    if options.keys:
        make_parser().print_help()
        return
    if options.name is not None:
        config = load_recipe(options.name, _any_data(options.name))
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        return
    console = Console()
    table = Table(title="RECIPE = PRESET.PROTOCOL", title_justify="left")
    table.add_column("protocol", no_wrap=True)
    table.add_column("what it is")
    for name, text in protocols().items():
        table.add_row(name, describe(text))
    console.print(table)
    console.print("presets: " + "  ".join(PRESETS), highlight=False)


def _any_data(name: str) -> list[str]:
    """Arguments that let a recipe without data of its own be shown."""
    from pha.train.recipes import protocols

    text = protocols().get(name.rpartition(".")[2], "source:")
    return [] if "source:" in text else ["--data.store", "STORE"]


def params(options: Namespace) -> None:
    """`pha params`."""
    from pha.nn.parameters import count_parameters
    from pha.nn.presets import PAPER_PARAMETERS, PRESETS, preset_config

    rows: list[dict[str, Any]] = []
    for name in options.presets or PRESETS:
        components = count_parameters(preset_config(name, vocab_size=options.vocab_size))
        total = sum(components.values())
        # The paper's counts are those of its own vocabulary.
        paper = PAPER_PARAMETERS.get(name) if options.vocab_size == 50257 else None
        rows.append(
            {
                "preset": name,
                "total": total,
                "non_embedding": total - components["embedding"],
                "components": components,
                "paper": paper,
                "difference": None if paper is None else total / paper - 1,
            }
        )
    if options.json:
        _json({"vocab_size": options.vocab_size, "presets": rows})
        return
    table = Table(
        title=f"millions of parameters, V = {options.vocab_size}", box=box.SIMPLE_HEAD, padding=0
    )
    table.add_column("preset", no_wrap=True)
    for column in ("total", "paper", "diff", "embed", "gss", "attn", "aux", "ffn"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        paper, difference = row["paper"], row["difference"]
        parts = [
            row["components"].get(c, 0)
            for c in ("embedding", "gss", "attention", "ffn", "primary_ffn")
        ]
        digits = 1 if row["total"] > 2e7 else 2
        table.add_row(
            row["preset"],
            f"{row['total'] / 1e6:.{digits}f}",
            "" if paper is None else f"{paper / 1e6:.1f}",
            "" if difference is None else f"{difference:+.2%}",
            *(f"{part / 1e6:.{digits}f}" if part else "" for part in parts),
        )
    Console().print(table)


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
    console = _console(options)
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
        _json(
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


def generate(options: Namespace) -> None:
    """`pha generate`."""
    from pha.evals.generation import sample
    from pha.evals.loading import load_model
    from pha.utils.hardware import default_device

    result = sample(
        load_model(options.model, default_device()),
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    if options.json:
        _json(result)
    else:
        print(result["prompt"] + result["text"])


def mixing(options: Namespace) -> None:
    """`pha mixing`."""
    from pha.evals.loading import load_model
    from pha.utils.runs import RunFolder

    records: list[dict[str, Any]] = []
    if options.run_path.is_dir():
        records = list(RunFolder(options.run_path).read_metrics("mixing"))
    final = load_model(options.run_path).model.model.mixing_weights()
    if not final:
        raise PHAError(f"{options.run_path} has sequential blocks, which mix nothing")
    if options.json:
        _json({"final": final, "over_time": records})
        return
    from pha.report.tables import mixing_history_table, mixing_table

    console = Console()
    console.print(mixing_table(final, f"{options.run_path}: weight (effective share)"))
    if len(records) > 1:
        console.print(mixing_history_table(records))


def report(options: Namespace) -> None:
    """`pha report`."""
    from pha.report import write_report

    out = options.out or options.runs[0] / "report.html"
    print(write_report(options.runs, out, title=options.title))


def doctor(options: Namespace) -> None:
    """`pha doctor`."""
    from pha.bench.doctor import examine

    findings = examine()
    if options.json:
        _json(findings)
    else:
        _console(options).print(_doctor_table(findings))
    if not findings["healthy"]:
        raise PHAError("a backend disagrees with its oracle; see the table")


def _doctor_table(findings: dict[str, Any]) -> Table:
    table = Table(title="pha doctor", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("finding")
    for name, value in findings["environment"].items():
        table.add_row(name, "-" if value is None else str(value))
    for check in findings["backends"]:
        used = " (used)" if check["used"] else ""
        state = "ok" if check["ok"] else "WRONG"
        table.add_row(
            f"{check['op']} on {check['device']}",
            f"{check['backend']}{used}: {state}, largest relative error {check['error']:.1e}",
        )
    return table
