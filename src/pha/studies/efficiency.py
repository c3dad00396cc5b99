"""The study `efficiency`: speed and memory of twins against length, by `pha bench`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pha.bench.runner import Request, run_benchmark
from pha.report.formats import Section, TextTable
from pha.studies.definition import Scale, Study
from pha.studies.published import find_published
from pha.studies.seeds import Summary, summarise
from pha.utils.errors import PHAError
from pha.utils.files import read_json, write_json
from pha.utils.hardware import default_device, provenance
from pha.utils.text import DASH

MEANING = {"train": "training steps", "prefill": "reading a prompt"}


@dataclass(frozen=True)
class Measured:
    """Tables, sentences and the record of an efficiency study."""

    tables: list[TextTable]
    sentences: list[str]
    record: dict[str, Any]


def requests(study: Study, scale: Scale) -> list[Request]:
    """One request for each mode and length, so that a stopped study loses one of them at most.

    Raises:
        PHAError: the study says nothing of this scale, or a preset or length that is none.
    """
    if scale.name not in study.benchmark:
        known = ", ".join(study.benchmark)
        raise PHAError(f"study {study.name} has no scale {scale.name}; choose {known}")
    given = study.benchmark[scale.name]
    base = study.variant(study.baseline)
    order = [base, *(variant for variant in study.variants if variant is not base)]
    return [
        Request(
            mode=mode,
            models=tuple(scale.models[variant.model].preset for variant in order),
            lengths=(length,),
            batch=given["batch"],
            precisions=(given["precision"],),
            runs=given.get("runs", 3),
            seconds=given.get("seconds", 2.0),
        )
        for mode in given["modes"]
        for length in given["lengths"]
    ]


def describe(study: Study, scale: Scale) -> list[str]:
    """What would be measured, a line for each request."""
    return [
        f"{request.mode} at {request.lengths[0]:,} tokens: {', '.join(request.models)}, "
        f"{request.runs} processes each"
        for request in requests(study, scale)
    ]


def measure(study: Study, scale: Scale, folder: Path, console: Console) -> Iterator[Measured]:
    """Measure what is missing; every request has a file in `folder/measurements`.

    A file of another request, as an older definition of the study may have left, is replaced.

    Yields:
        All that there is, whenever more has been measured, so that a study which is stopped has its
        tables; once where nothing was missing.

    Raises:
        PHAError: a preset or length that cannot be measured, or a damaged file.
    """
    missing = [request for request in requests(study, scale) if _kept(request, folder) is None]
    for number, request in enumerate(missing, start=1):
        console.print(f"{number} of {len(missing)}: {request.mode}, {request.lengths[0]} tokens")
        with console.status("") as status:
            found = run_benchmark(request, status.update)
        origin = provenance(default_device(), ",".join(request.precisions))
        content = {"request": vars(request), "rows": found, "provenance": origin}
        write_json(_file(request, folder), content)
        yield _summarise(study, scale, folder)
    if not missing:
        yield _summarise(study, scale, folder)


def _file(request: Request, folder: Path) -> Path:
    return folder / "measurements" / f"{request.mode}-{request.lengths[0]}.json"


def _kept(request: Request, folder: Path) -> dict[str, Any] | None:
    path = _file(request, folder)
    if not path.is_file():
        return None
    kept: dict[str, Any] = read_json(path)
    return kept if kept["request"] == json.loads(json.dumps(vars(request))) else None


def _summarise(study: Study, scale: Scale, folder: Path) -> Measured:
    rows: list[dict[str, Any]] = []
    origins: list[dict[str, Any]] = []
    missing: list[str] = []
    for request in requests(study, scale):
        kept = _kept(request, folder)
        if kept is None:
            missing.append(f"{MEANING.get(request.mode, request.mode)} at {request.lengths[0]:,}")
            continue
        rows += kept["rows"]
        origins.append({"mode": request.mode, "length": request.lengths[0], **kept["provenance"]})
    labels = _labels(study, scale)
    base = scale.models[study.variant(study.baseline).model].preset
    tables, sentences = [], []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode]
        tables.append(_table(study, scale, mode, own, labels, base))
        sentences += _sentences(mode, own, labels, base)
    if missing:
        sentences.append(f"Not measured yet: {', '.join(missing)} tokens.")
    record = {"rows": rows, "measured": origins, "missing": missing}
    return Measured(tables, sentences, record)


def draw(study: Study, scale: Scale, measured: Measured, folder: Path) -> list[Path]:
    """Throughput and memory against length, a picture for each mode and measure; the files."""
    from pha.report.speed import save_speed_plots  # matplotlib, only where something is drawn

    labels = _labels(study, scale)
    rows = [{**row, "model": labels[row["model"]]} for row in measured.record["rows"]]
    return [
        path
        for mode in dict.fromkeys(row["mode"] for row in rows)
        for path in save_speed_plots(mode, [row for row in rows if row["mode"] == mode], folder)
    ]


def _labels(study: Study, scale: Scale) -> dict[str, str]:
    return {scale.models[each.model].preset: each.label for each in study.variants}


def _table(
    study: Study,
    scale: Scale,
    mode: str,
    rows: Sequence[dict[str, Any]],
    labels: dict[str, str],
    base: str,
) -> TextTable:
    headings = ["length", "model", "tokens/s", "against the first", "memory, GB", "of it work"]
    lines = []
    for length in dict.fromkeys(row["length"] for row in rows):
        group = {row["model"]: row for row in rows if row["length"] == length}
        for model, row in group.items():
            line = [f"{length:,}", labels[model]]
            if row["error"] is not None:
                lines.append([*line, row["error"], DASH, DASH, DASH])
                continue
            gain = None if model == base else _gain(group[base], row)
            lines.append(
                [
                    *line,
                    f"{row['tokens_per_second']['median']:,.0f}",
                    DASH if gain is None else f"{gain.mean:+.1f}%",
                    f"{row['peak_memory'] / 1e9:.2f}",
                    f"{row['work_memory'] / 1e9:.2f}",
                ]
            )
    first = next((row for row in rows if row["error"] is None), None)
    where = "nothing" if first is None else f"{first['device']}, {first['precision']}"
    batch = rows[0]["batch"]
    sections = [Section("ours", f"{scale.words}, {where}, batch {batch}", lines)]
    paper = []
    for given in find_published(study.published):
        speed, memory = given.values.get("throughput"), given.values["memory_gb"]
        for place, model in enumerate(("attention only (paper)", "hybrid (paper)")):
            gain_text = DASH
            if place and speed:
                gain_text = f"{100 * (speed[1] / speed[0] - 1):+.1f}%"
            shown = f"{speed[place]:,}" if speed else DASH
            paper.append([given.label, model, shown, gain_text, f"{memory[place]:.2f}", DASH])
    if paper:
        sections.append(Section("paper", "180M models, one A100, mode and batch not stated", paper))
    return TextTable(f"{study.title}: {MEANING.get(mode, mode)}", headings, sections)


def _gain(base: dict[str, Any], row: dict[str, Any]) -> Summary | None:
    """Percent by which a model is faster, over processes that took turns with the base's."""
    if base["error"] is not None or row["error"] is not None:
        return None
    pairs = zip(
        base["tokens_per_second"]["values"], row["tokens_per_second"]["values"], strict=False
    )
    return summarise([100 * (own / other - 1) for other, own in pairs])


def _sentences(
    mode: str, rows: Sequence[dict[str, Any]], labels: dict[str, str], base: str
) -> list[str]:
    by_model: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["error"] is None:
            by_model.setdefault(row["model"], {})[row["length"]] = row
    found = []
    for model, own in by_model.items():
        shared = sorted(own.keys() & by_model.get(base, {}).keys())
        if model == base or not shared:
            continue
        for length in shared:
            gain = _gain(by_model[base][length], own[length])
            assert gain is not None
            found.append(
                f"{MEANING.get(mode, mode).capitalize()} at {length:,} tokens: "
                + _speed(labels[model], labels[base], gain)
            )
        ends = [
            f"{_memory(by_model[base][n], own[n])} memory than {labels[base]} at {n:,} tokens"
            for n in dict.fromkeys((shared[0], shared[-1]))
        ]
        found.append(
            f"{MEANING.get(mode, mode).capitalize()}: {labels[model]} takes "
            + " and ".join(ends)
            + "."
        )
    return found


def _memory(base: dict[str, Any], row: dict[str, Any]) -> str:
    saved = (base["peak_memory"] - row["peak_memory"]) / 1e9
    return f"{abs(saved):.2f} GB {'less' if saved > 0 else 'more'}"


def _speed(model: str, base: str, gain: Summary) -> str:
    if gain.interval is None:
        return f"{model} does {gain.mean:+.1f}% of {base}'s tokens/s more, in one process."
    half = f"{gain.interval:.1f}"
    if abs(gain.mean) <= gain.interval:
        return f"not decided between {model} and {base} ({gain.mean:+.1f} ± {half}%)."
    faster = "faster" if gain.mean > 0 else "slower"
    return (
        f"{model} is {faster} than {base} by {abs(gain.mean):.1f} ± {half}% "
        f"(95% interval, {gain.n} turns)."
    )
