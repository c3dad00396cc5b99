"""`pha sweep`: one recipe over the values of some of its keys, with several seeds for each."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from pha.report.dots import Dots, dot_plot, save_picture
from pha.studies.jobs import Job, run_jobs
from pha.studies.statistics import Summary, summarise
from pha.utils.errors import PHAError
from pha.utils.files import write_json, write_text
from pha.utils.hardware import default_device, provenance

MEASURES: dict[str, tuple[str, int]] = {
    "validation": ("validation", 2),
    "best": ("test, best checkpoint", 2),
    "average": ("test, average", 2),
    "test": ("test, chosen", 2),
    "word": ("test, per word", 1),
    "bits": ("test, bits/byte", 4),
}
"""Measure of a run -> heading and digits: perplexities per token but for the last two. The
validation split chooses weights and settings."""


@dataclass(frozen=True)
class Axis:
    """A key of the recipe and the values it takes, each as it is written on the command line."""

    key: str
    values: tuple[str, ...]

    @property
    def label(self) -> str:
        """The key without its section."""
        return self.key.rpartition(".")[2]


def parse_axis(text: str) -> Axis:
    """Read `KEY=V1,V2,...`; a value that is a list stands in brackets of its own.

    Raises:
        PHAError: not of this form.
    """
    key, equals, values = text.partition("=")
    # At commas outside brackets.
    parts = [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", values)]
    if not (equals and re.fullmatch(r"\w+\.\w+", key) and all(map(_is_yaml, parts))):
        raise PHAError(f"{text!r} is not SECTION.KEY=VALUE,VALUE,...")
    return Axis(key, tuple(parts))


def _is_yaml(text: str) -> bool:
    try:
        return yaml.safe_load(text) is not None
    except yaml.YAMLError:
        return False


@dataclass(frozen=True)
class Point:
    """One combination of values, and its runs.

    Attributes:
        settings: key -> value.
        jobs: a run for each seed.
    """

    settings: dict[str, str]
    jobs: tuple[Job, ...]

    @property
    def label(self) -> str:
        """The settings in words."""
        return ", ".join(f"{key.rpartition('.')[2]} {v}" for key, v in self.settings.items())


def make_points(
    recipe: str, axes: Sequence[Axis], seeds: Sequence[int], out: Path, overrides: Sequence[str]
) -> list[Point]:
    """Every combination of the axes' values, with a run below `out` for each seed."""
    points = []
    for values in itertools.product(*(axis.values for axis in axes)):
        settings = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        name = "-".join(f"{a.label}={v}" for a, v in zip(axes, values, strict=True)) or "runs"
        folder = out / re.sub(r"[^\w.=+-]+", "_", name)
        arguments = (*overrides, *(f"--{key}={value}" for key, value in settings.items()))
        jobs = (
            Job(recipe, folder / f"seed-{seed}", (*arguments, f"--run.seed={seed}"))
            for seed in seeds
        )
        points.append(Point(settings, tuple(jobs)))
    return points


def run_sweep(
    recipe: str,
    axes: Sequence[Axis],
    seeds: Sequence[int],
    out: Path,
    overrides: Sequence[str],
    console: Console,
    parallel: int = 1,
) -> dict[str, Any]:
    """Train every point with every seed; write sweep.json, sweep.md and a picture below `out`.

    Finished runs are reused. The best point is that of the lowest mean validation perplexity.

    Args:
        recipe: PRESET.PROTOCOL or a YAML file.
        axes: what varies; none for seeds alone.
        seeds: of weights, order of data and dropout.
        out: folder of everything.
        overrides: further arguments for every run, such as `--data.store=STORE`.
        console: for progress and the table.
        parallel: runs side by side.

    Returns:
        the content of sweep.json.

    Raises:
        PHAError: impossible values, a folder that holds other runs, a training that failed.
    """
    points = make_points(recipe, axes, seeds, out, overrides)
    jobs = [job for point in points for job in point.jobs]
    if len({job.out for job in jobs}) < len(jobs):
        raise PHAError("a value or a seed is given twice")
    outcomes = iter(run_jobs(jobs, console, parallel))
    rows = [_row(point, [next(outcomes) for _ in point.jobs]) for point in points]
    ranked = [row for row in rows if row["diverged"] == 0]
    best = min(ranked, key=lambda row: row["measures"]["validation"]["mean"], default=None)
    results = [run["result"] for row in rows for run in row["runs"] if run["result"]]
    content = {
        "recipe": recipe,
        "overrides": list(overrides),
        "axes": {axis.key: list(axis.values) for axis in axes},
        "seeds": list(seeds),
        "best": None if best is None else best["settings"],
        "points": [
            row | {"runs": [run | {"result": _brief(run["result"])} for run in row["runs"]]}
            for row in rows
        ],
        "protocol": results[0]["evaluations"][0]["protocol"] if results else None,
        "data": results[0]["data"] if results else None,
        "provenance": results[0]["provenance"] if results else None,
        "summarised": provenance(default_device(), "-"),
    }
    write_json(out / "sweep.json", content)
    headings, cells = table_cells(content)
    write_text(out / "sweep.md", markdown(headings, cells))
    console.print(_table(headings, cells, f"{recipe}: perplexity, mean ± deviation"))
    if best is not None and len(rows) > 1:
        console.print(f"lowest validation perplexity: {_words(best['settings'])}", highlight=False)
    series = _dots(rows, axes)
    if series:
        label = axes[0].key if axes else "seed"
        figure = dot_plot(series, label, "validation perplexity")
        save_picture(figure, out / "sweep", f"{recipe}: validation perplexity over {label}")
    return content


def measures(result: dict[str, Any]) -> dict[str, float]:
    """The figures of one run, by the names of `MEASURES`; `average` only where there is one."""
    evaluation = result["evaluations"][0]
    by_name = {candidate["name"]: candidate for candidate in result["candidates"]}
    found = {
        "validation": by_name[result["chosen"]]["validation_perplexity"],
        "best": by_name["best checkpoint"]["evaluation"]["perplexity"],
        "test": evaluation["perplexity"],
        "word": evaluation["word_perplexity"],
        "bits": evaluation["bits_per_byte"],
    }
    if "average" in by_name:
        found["average"] = by_name["average"]["evaluation"]["perplexity"]
    return found


def _row(point: Point, outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    runs = [
        {
            "run": str(job.out),
            "status": outcome["status"],
            "step": outcome.get("step"),
            "result": outcome["result"].to_dict() if "result" in outcome else None,
        }
        for job, outcome in zip(point.jobs, outcomes, strict=True)
    ]
    found = [measures(run["result"]) for run in runs if run["result"]]
    names = [name for name in MEASURES if found and all(name in each for each in found)]
    return {
        "settings": point.settings,
        "diverged": sum(run["status"] == "diverged" for run in runs),
        "measures": {n: summarise([each[n] for each in found]).to_dict() for n in names},
        "runs": runs,
    }


def _brief(result: dict[str, Any] | None) -> dict[str, Any] | None:
    if result is None:
        return None
    keys = ("seed", "steps", "tokens_seen", "seconds", "chosen", "peak_memory_bytes")
    return {key: result[key] for key in keys} | {"measures": measures(result)}


def table_cells(content: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table, from the content of sweep.json."""
    rows = content["points"]
    names = [name for name in MEASURES if any(name in row["measures"] for row in rows)]
    if "average" not in names and "best" in names:
        names.remove("best")  # the same as the chosen weights
    headings = [
        *(key.rpartition(".")[2] for key in content["axes"]),
        "seeds",
        *(MEASURES[name][0] for name in names),
    ]
    if any(row["diverged"] for row in rows):
        headings.append("diverged")
    cells = []
    for row in rows:
        values = [row["measures"].get(name) for name in names]
        shown = [
            "-" if value is None else Summary(**value).show(MEASURES[name][1])
            for name, value in zip(names, values, strict=True)
        ]
        line = [*row["settings"].values(), str(len(row["runs"])), *shown]
        cells.append(line + ([str(row["diverged"])] if "diverged" in headings else []))
    return headings, cells


def markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _table(headings: Sequence[str], cells: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for line in cells:
        table.add_row(*line)
    return table


def _words(settings: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items()) or "as in the recipe"


def _dots(rows: Sequence[dict[str, Any]], axes: Sequence[Axis]) -> list[Dots]:
    """A series for each combination of all axes but the first, whose values are the places."""
    series: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        values = list(row["settings"].values())
        name = ", ".join(f"{a.label} {v}" for a, v in zip(axes[1:], values[1:], strict=True))
        found = [run["result"] for run in row["runs"] if run["result"]]
        if found:
            place = values[0] if values else "all"
            series.setdefault(name, {})[place] = [measures(each)["validation"] for each in found]
    return [Dots(name, places) for name, places in series.items()]
