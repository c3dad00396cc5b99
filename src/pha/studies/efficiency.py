"""The study `efficiency`: speed and memory of twins against length, by `pha bench`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pha.bench.runner import Request, run_benchmark
from pha.report.tables import Section, TextTable
from pha.results import JSON_FORMAT
from pha.studies.definition import Scale, Study, Variant
from pha.studies.published import find_published
from pha.studies.seeds import Summary, summarise
from pha.utils.errors import PHAError
from pha.utils.files import write_json
from pha.utils.formats import read_json
from pha.utils.hardware import default_device, provenance
from pha.utils.text import DASH
from pha.utils.versions import check_format

Row = dict[str, Any]  # of the benchmark
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
    return [
        Request(
            mode=mode,
            models=tuple(scale.model(variant.model).preset for variant in _order(study)),
            lengths=(length,),
            batch=given.batch,
            precisions=(given.precision,),
            runs=given.runs,
            seconds=given.seconds,
        )
        for mode in given.modes
        for length in given.lengths
    ]


def _order(study: Study) -> list[Variant]:
    """The baseline, then the others."""
    return sorted(study.variants, key=lambda variant: variant.name != study.baseline)


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
        content = {
            "format": JSON_FORMAT,
            "request": vars(request),
            "rows": found,
            "provenance": origin,
        }
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
    check_format(path, kept.get("format", 0), JSON_FORMAT)
    return kept if kept["request"] == json.loads(json.dumps(vars(request))) else None


def _summarise(study: Study, scale: Scale, folder: Path) -> Measured:
    rows: list[Row] = []
    origins: list[dict[str, Any]] = []
    missing: list[str] = []
    for request in requests(study, scale):
        mode, length = request.mode, request.lengths[0]
        kept = _kept(request, folder)
        if kept is None:
            missing.append(f"{MEANING.get(mode, mode)} at {length:,}")
        else:
            rows += kept["rows"]
            origins.append({"mode": mode, "length": length, **kept["provenance"]})
    labels = _labels(study, scale)
    tables = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        groups: dict[int, dict[str, Row]] = {}
        for row in rows:
            if row["mode"] == mode:
                groups.setdefault(row["length"], {})[row["model"]] = row
        tables.append(_table(study, scale, mode, groups, labels))
    sentences = [f"Not measured yet: {', '.join(missing)} tokens."] if missing else []
    return Measured(tables, sentences, {"rows": rows, "measured": origins, "missing": missing})


def draw(study: Study, scale: Scale, measured: Measured, folder: Path) -> list[Path]:
    """Throughput and memory against length, a picture for each mode and measure; the files."""
    from pha.report.charts import save_speed_plots  # matplotlib, only where something is drawn

    labels = _labels(study, scale)
    rows = [{**row, "model": labels[row["model"]]} for row in measured.record["rows"]]
    return save_speed_plots(rows, folder)


def _labels(study: Study, scale: Scale) -> dict[str, str]:
    """Preset -> label, the baseline first."""
    return {scale.model(each.model).preset: each.label for each in _order(study)}


def _table(
    study: Study,
    scale: Scale,
    mode: str,
    groups: dict[int, dict[str, Row]],
    labels: dict[str, str],
) -> TextTable:
    base = next(iter(labels))
    lines = []
    for length, group in groups.items():
        for model, row in group.items():
            line = [f"{length:,}", labels[model]]
            if row["error"] is not None:
                lines.append([*line, row["error"], DASH, DASH, DASH])
                continue
            gain = None if model == base else _gain(group[base], row)
            line.append(f"{row['tokens_per_second']['median']:,.0f}")
            half = "" if gain is None or gain.interval is None else f" ± {gain.interval:.1f}"
            line.append(DASH if gain is None else f"{gain.mean:+.1f}{half}%")
            lines.append([*line, *(f"{row[f'{k}_memory'] / 1e9:.2f}" for k in ("peak", "work"))])
    rows = [row for group in groups.values() for row in group.values()]
    machines = [f"{row['device']}, {row['precision']}" for row in rows if row["error"] is None]
    where = " and ".join(dict.fromkeys(machines)) or "nothing"
    sections = [Section("ours", f"{scale.words}, {where}, batch {rows[0]['batch']}", lines)]
    paper = []
    for given in find_published(study.published):
        speed, memory = given.values.get("throughput"), given.values["memory_gb"]
        gain_text = f"{100 * (speed[1] / speed[0] - 1):+.1f}%" if speed else DASH
        for place, model in enumerate(("attention only (paper)", "hybrid (paper)")):
            shown = f"{speed[place]:,}" if speed else DASH
            cells = [shown, gain_text if place else DASH, f"{memory[place]:.2f}", DASH]
            paper.append([given.label, model, *cells])
    if paper:
        sections.append(Section("paper", "180M models, one A100, mode and batch not stated", paper))
    headings = ["length", "model", "tokens/s", "against the first", "memory, GB", "of it work"]
    note = "Percent with the 95% interval over the turns that the processes of the models took."
    return TextTable(f"{study.title}: {MEANING.get(mode, mode)}", headings, sections, [note])


def _gain(base: Row, row: Row) -> Summary | None:
    """Percent by which a model is faster, over processes that took turns with the base's."""
    if base["error"] is not None or row["error"] is not None:
        return None
    speeds = [each["tokens_per_second"]["values"] for each in (row, base)]
    return summarise([100 * (own / other - 1) for own, other in zip(*speeds, strict=False)])
