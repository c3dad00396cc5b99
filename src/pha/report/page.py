"""Run folders -> `report.html`: one file without scripts, fonts or anything else to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pha import __version__
from pha.report import figures, plots
from pha.report.collect import Run, collect
from pha.report.compare import comparisons, warnings
from pha.report.facts import fact_groups
from pha.report.headline import headline
from pha.results import Sample
from pha.utils.errors import PHAError
from pha.utils.files import write_text
from pha.utils.text import plain, printable


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what the runs made of it: (index of the run, sample)."""

    text: str
    samples: list[tuple[int, Sample]]


def write_report(runs: Sequence[Path], out: Path, title: str | None = None) -> Path:
    """Write one self-contained HTML page that compares training runs.

    The page depends on the run folders alone: the same folders give the same bytes.

    Args:
        runs: run folders (`pha.runs.RunFolder`), finished or not, in the order to show.
        out: the file to write; an existing one is replaced in one step.
        title: heading of the page; by default the names of the runs.

    Returns:
        `out`.

    Raises:
        PHAError: a path is not a run folder or holds a damaged file, or `out` cannot be written.
    """
    if out.is_dir():
        raise PHAError(f"{out} is a folder: name the file to write")
    html = _render(collect(runs), title)
    try:
        write_text(out, html)
    except OSError as error:
        raise PHAError(f"{out} cannot be written ({error.strerror or error})") from error
    return out


def _render(runs: Sequence[Run], title: str | None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pha.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
    )
    environment.filters["plain"] = plain
    return environment.get_template("report.html.j2").render(
        title=title or _title(runs),
        headline=headline(runs),
        warnings=warnings(runs),
        runs=runs,
        glyphs=[plots.MARKERS[i % len(plots.MARKERS)][1] for i in range(len(runs))],
        colors=[i % plots.SERIES_COUNT for i in range(len(runs))],
        light=plots.LIGHT,
        dark=plots.DARK,
        comparisons=comparisons(runs),
        curves=figures.learning_curves(runs),
        histories=figures.training_histories(runs),
        mixing=[figures.mixing(run, index) for index, run in enumerate(runs)],
        prompts=_prompts(runs),
        fact_groups=fact_groups(runs),
        version=__version__,
    )


def _visible(value: Any) -> Any:
    """Whatever the page shows, with control characters made visible."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 2:
        return f"Comparison of {len(runs)} runs"
    return " and ".join(run.label for run in runs)


def _prompts(runs: Sequence[Run]) -> list[Prompt]:
    """Samples by prompt, so that continuations of the same prompt stand side by side."""
    prompts: dict[str, list[tuple[int, Sample]]] = {}
    for index, run in enumerate(runs):
        for sample in run.result.samples if run.result else ():
            prompts.setdefault(sample.prompt, []).append((index, sample))
    return [Prompt(text, samples) for text, samples in prompts.items()]
