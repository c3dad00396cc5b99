"""Verbs that look at models, runs, branches and machines, and train nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import RenderableType
from rich.table import Table

from pha.commands.common import (
    Attention,
    File,
    Folder,
    Json,
    Model,
    Precision,
    answer,
    figures_table,
    progress_bars,
    progress_console,
    read_attention,
    require_tokens,
)
from pha.utils.errors import PHAError
from pha.utils.outputs import require_outputs, writing
from pha.utils.text import DASH, fixed, percent

if TYPE_CHECKING:
    from pha.evals.compare import Interval
    from pha.evals.inspection import Inspection, Memory


def params(
    presets: Sequence[Annotated[str, "PRESET"]] = (),
    *overrides: str,
    vocab_size: int = 50257,
    length: int | None = None,
    match: Annotated[str | None, "PRESET"] = None,
    by: Annotated[str | None, "KEY"] = None,
    json: Json = False,
) -> None:
    """Parameters of every preset by component, and what it costs at a length.

    A recipe takes the place of a preset too, and keys change it. With --match and --by it tells at
    which value of a key a model has as many parameters as another:
      pha --import average params pha-tiny --model.branches=[gss,average] \\
          --match pha-tiny --by model.state_size

    Args:
        presets: only these
        match: a preset or recipe whose parameters are wanted
        by: a number of the model, such as model.state_size, or an option of a branch, as in
            model.branch_options.average.window
        vocab_size: V, by default GPT-2's
        length: also MFLOP to train on a token, and kB kept of a sequence (float32), at this length
    """
    from pha import mixers as mixers  # which makes them known
    from pha.costs import cache_bytes, training_flops
    from pha.model.parameters import count_parameters
    from pha.model.presets import PAPER_PARAMETERS, PRESETS
    from pha.train.matching import read_architecture
    from pha.train.recipes import parse_overrides

    settings = parse_overrides(overrides)
    if match is not None or by is not None:
        if match is None or by is None or len(presets) != 1 or length is not None:
            raise PHAError("--match and --by go together, with one model to change")
        _match(presets[0], settings, match, by, vocab_size, json)
        return
    columns = ["total", "paper", "diff", "embed", "mixer", "attn", "aux_ffn", "ffn"]
    require_tokens(length=length)
    if length is not None:
        columns += ["MFLOP", "kB"]
    table = figures_table(f"millions of parameters, V = {vocab_size}", "preset", *columns, gap=0)
    rows: list[dict[str, Any]] = []
    for name in presets or PRESETS:
        config = read_architecture(name, settings, vocab_size)
        components = count_parameters(config)
        costs = {}
        if length is not None:
            flops, kept = training_flops(config, length), cache_bytes(config, length)
            costs = {"length": length, "flops_per_token": flops, "cache_bytes": kept}
        total = sum(components.values())
        # The paper's counts are those of its own vocabulary.
        paper = PAPER_PARAMETERS.get(name) if vocab_size == 50257 and not settings else None
        difference = None if paper is None else total / paper - 1
        rows.append(
            {
                "preset": name,
                "total": total,
                "non_embedding": total - components["embedding"],
                "components": components,
                "paper": paper,
                "difference": difference,
                **costs,
            }
        )
        part = Counter(components)
        parts = ("embedding", "mixer", "attention", "aux_ffn", "primary_ffn")
        # Eq. 2 or what stands in its place: no preset has two.
        part["mixer"] = total - part["norms_and_mixing"] - sum(part[p] for p in parts)
        digits = 1 if total > 2e7 else 2
        table.add_row(
            name,
            f"{total / 1e6:.{digits}f}",
            "" if paper is None else f"{paper / 1e6:.1f}",
            "" if difference is None else f"{difference:+.2%}",
            *(f"{part[p] / 1e6:.{digits}f}" if part[p] else "" for p in parts),
            *([f"{flops / 1e6:,.0f}", f"{kept / 1e3:,.0f}"] if costs else []),
        )
    answer(json, {"vocab_size": vocab_size, "presets": rows}, table)


def _match(
    name: str, settings: dict[str, Any], other: str, key: str, vocab_size: int, json: bool
) -> None:
    from pha.model.parameters import count_parameters
    from pha.train.matching import CLOSE, find_match, read_architecture

    config = read_architecture(name, settings, vocab_size)
    wanted = sum(count_parameters(read_architecture(other, {}, vocab_size)).values())
    found = find_match(config, key, wanted)
    record = {"key": key, "difference": found.difference, **asdict(found)}
    lines = [
        f"--{key} {found.value:g}: {found.parameters:,} parameters, {found.difference:+.2%} of the "
        f"{wanted:,} of {other}"
    ]
    if abs(found.difference) > CLOSE:
        lines.append(f"no value of {key} is within {CLOSE:.1%}; another key may have finer steps")
    answer(json, record, *lines)


def mixing(model: Model, *, json: Json = False) -> None:
    """Mixing weights and effective shares per layer.

    Args:
        model: a run, a checkpoint or a saved model; of a run, its history too
    """
    from pha.loading import load_model
    from pha.report.tables import mixing_history_table, mixing_table
    from pha.results import LayerMixing
    from pha.runs import RunFolder

    records = RunFolder(model).read_metrics().mixing
    final = load_model(model).pha.model.mixing_weights()
    if not final:
        raise PHAError(f"{model} has sequential blocks, which mix nothing")
    layers = [LayerMixing(**layer) for layer in final]
    tables = [mixing_table(layers, f"{model}: weight (effective share)")]
    if len(records) > 1:
        tables.append(mixing_history_table(records))
    history = [asdict(record) for record in records]
    answer(json, {"final": final, "over_time": history}, *tables)


def inspect(
    model: Model,
    *,
    data: Annotated[Path | None, "STORE", "token store; without one, what needs no text"] = None,
    split: str = "test",
    tokens: int = 32_768,
    sequence_length: int | None = None,
    attention: Sequence[Attention] = (),
    precision: Precision = "fp32",
    out: Folder | None = None,
    json: Json = False,
) -> None:
    """What flows through which branch: memory, share, need and horizon.

    Half-lives of every layer at the start of training and now, temperatures and entropy of
    attention. With --data also what the loss rises by when a branch is silenced behind its norm,
    when each token sees only its last w tokens through it, and when what it knows of a prefix is
    dropped. That takes some ten passes over the text for each branch, and three for each branch of
    a layer; a horizon of w costs w times the branch, but for attention and Eq. 2.

    Args:
        split: train, validation or test
        tokens: of the split that are scored in each pass
        sequence_length: tokens per window (as the model was trained, else 1024)
        out: write inspection.json and pictures
    """
    from pha.commands.evaluation import choose_protocol
    from pha.data import TokenStore
    from pha.evals.inspection import Inspection, inspect_model, inspect_weights
    from pha.evals.protocols import own_protocol
    from pha.loading import load_model
    from pha.report.figures import PICTURES, save_pictures
    from pha.results import JSON_FORMAT
    from pha.train.models import initial_model
    from pha.utils.files import write_json
    from pha.utils.hardware import choose_precision, default_device, provenance

    require_tokens(tokens=tokens)
    pictures = (f"inspection-{what}.{kind}" for what in PICTURES for kind in ("svg", "png"))
    require_outputs(out, "inspection.json", *pictures)
    device, options = default_device(), read_attention(attention)
    loaded = load_model(model, device, attention=options)
    body, start = loaded.pha, initial_model(loaded.run)
    start = None if start is None else start.to(device)
    chosen = choose_precision(precision, device)
    if data is None:
        found = Inspection(inspect_weights(body, start))
    else:
        store = TokenStore.open(data)
        store.require_tokenizer(loaded.tokenizer)
        protocol = choose_protocol(sequence_length, None, False, own_protocol(loaded))
        length = protocol.sequence_length
        with progress_bars() as progress:
            found = inspect_model(
                *(loaded, store, split),
                length=length,
                tokens=tokens,
                start=start,
                precision=chosen,
                progress=partial(progress, f"{split} split"),
            )
    facts: dict[str, Any] = {"format": JSON_FORMAT, "model": str(model)}
    facts |= {"attention": options} if options else {}
    content = facts | asdict(found) | {"provenance": provenance(device, chosen)}
    if out is not None:
        with writing(out):
            write_json(out / "inspection.json", content)
            save_pictures(found, out, model.name or str(model))
    where = [] if out is None else [f"JSON and pictures: {out}/inspection*"]
    answer(json, content, *_describe(found, str(model)), *where)


def _describe(found: Inspection, model: str) -> Iterator[RenderableType]:
    """The tables of an inspection."""
    yield _branches_table(found, model)
    if found.loss is None:
        return
    yield _need_table(found)
    if found.agreement is not None:
        tau, p = found.agreement
        yield f"effective share against need by layer: Kendall's tau {tau:+.2f} (p = {p:.2g})"
    names, by_window = list(dict.fromkeys(x.branch for x in found.horizons)), attrgetter("window")
    title = "horizon: rise of the loss when tokens see the last w alone through a branch"
    table = figures_table(title, "w", *names)
    for window, group in groupby(sorted(found.horizons, key=by_window), by_window):
        by_name = {each.branch: each.nats for each in group}
        table.add_row(f"{window:,}", *(_nats(by_name.get(name)) for name in names))
    yield table
    title = "hand-off: rho, what is left of a prefix's worth when keys or state are dropped"
    table = figures_table(
        title, "tokens", "how many", "loss", "no prefix", *(f"no {n} past" for n in names)
    )
    for each in found.hand_off:
        rhos = [DASH if rho is None else f"{rho:.2f}" for rho in each.rho.values()]
        losses = f"{each.whole:.4f}", f"{each.deleted:.4f}"
        table.add_row(each.tokens, f"{each.count:,}", *losses, *rhos)
    yield table
    at = found.protocol
    yield (
        f"protocol: windows of {at['length']} tokens, {at['tokens_scored']:,} tokens of "
        f"the {at['split']} split, prefix {at['prefix']}, intervals {at['intervals']}"
    )


def _branches_table(found: Inspection, model: str) -> Table:
    columns = ("weight", "share", "half-life at start", "now", "tau by head", "entropy")
    table = figures_table(f"{model}: median (10% to 90%)", "layer", "branch", *columns)
    for each in found.branches:
        shares = (percent(each.weight), percent(each.share))
        memories = (_memory(memory) for memory in (each.before, each.memory))
        taus = sorted(each.temperatures or ())
        tau = f"{taus[0]:.1f} to {taus[-1]:.1f}" if taus else DASH
        table.add_row(str(each.layer), each.branch, *shares, *memories, tau, fixed(each.entropy, 2))
    return table


def _need_table(found: Inspection) -> Table:
    modes = list(dict.fromkeys(mode for each in found.need for mode in each.nats))
    title = f"need: rise of the loss ({found.loss:.4f}) when a branch is silenced behind its norm"
    table = figures_table(title, "branch", "layer", *modes)
    for each in found.need:
        layer = "all" if each.layer is None else str(each.layer)
        table.add_row(each.branch, layer, *(_nats(each.nats.get(mode)) for mode in modes))
    if found.control:
        rises = [each.mean for each in found.control]
        cells = f"{sum(rises) / len(rises):+.4f}, {min(rises):+.4f} to {max(rises):+.4f}"
        table.add_row("one at random", "each", cells)
    return table


def _nats(interval: Interval | None) -> str:
    if interval is None:
        return DASH
    width = "" if interval.half_width is None else f" ± {interval.half_width:.4f}"
    return f"{interval.mean:+.4f}{width}"


def _memory(memory: Memory | None) -> str:
    if memory is None:
        return DASH
    low, middle, high = memory.quantiles
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def report(
    runs: Sequence[Annotated[Path, "RUN"]],
    *,
    out: File | None = None,
    title: str | None = None,
    json: Json = False,
) -> None:
    """One self-contained HTML page about runs.

    Args:
        runs: folders of finished runs
        out: the page (report.html in the first run)
        title: its heading
    """
    from pha.report.page import write_report

    path = str(write_report(runs, out or runs[0] / "report.html", title=title))
    answer(json, {"path": path}, path)


def doctor(*, device: str | None = None, json: Json = False) -> None:
    """Versions, devices and a self-check of every backend.

    What fails on this machine is listed with its reason. Other commands stop where they would use
    it; the environment variable PHA_BACKENDS=OP=BACKEND,... has them use another backend, as in
    PHA_BACKENDS=gated_scan=torch.

    Args:
        device: check the backends of this type of device alone, cpu or cuda; else all
    """
    from pha.bench.doctor import examine

    findings = examine(device, progress_console())
    answer(json, findings, _doctor_table(findings))
    if not findings["healthy"]:
        raise PHAError("a backend fails or disagrees with its oracle; see the table")


def _doctor_table(findings: dict[str, Any]) -> Table:
    table = Table(title="pha doctor", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("finding")
    for name, value in findings["environment"].items():
        table.add_row(name, "-" if value is None else str(value))
    for check in findings["backends"]:
        used = " (used)" if check["used"] else ""
        state = check["reason"]
        if state is None:
            state = "ok" if check["ok"] else "WRONG"
            state += f", largest relative error {check['error']:.1e}"
        if check.get("limits"):
            state += f"; {check['limits']}"
        table.add_row(
            f"{check['op']} on {check['device']}",
            f"{check['backend']}{used}: {state}",
        )
    return table


def check_branch(module: str, *, json: Json = False) -> None:
    """What a branch of your own keeps of what every branch promises.

    A line each: whether it looks ahead, splits through the cache as in one piece, keeps documents
    apart, leaves padding out, runs in bf16, exports, and how fast it is beside gss. Nothing is
    trained.

    Args:
        module: such as my_branch for a file my_branch.py here
    """
    from pha import mixers as mixers  # which makes them known
    from pha.bench.branch import check_branch as check
    from pha.model import BRANCHES
    from pha.utils.modules import import_modules

    import_modules([module], "check-branch")
    names = [name for name, kind in BRANCHES.items() if kind.__module__ == module]
    if not names:
        raise PHAError(f"{module} registers no branch; see `register_branch` in docs/extending.md")
    record, tables, failed = {}, [], []
    for name in names:
        table = Table(title=f"branch {name}", title_justify="left", show_header=False)
        findings = list(check(name))
        for each in findings:
            table.add_row(each.what, "ok" if each.passed else "FAILS", each.words)
        failed += [f"{name}: {each.what}" for each in findings if not each.passed]
        record[name] = [asdict(each) for each in findings]
        tables.append(table)
    answer(json, record, *tables)
    if failed:
        raise PHAError(f"not kept: {', '.join(failed)}")
