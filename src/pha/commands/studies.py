"""Verbs that train many models: sweep and study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table

from pha.commands.common import DryRun, Folder, Json, Recipe, Store, answer, console_for
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from pha.studies.definition import Scale, Study


def sweep(
    recipe: Recipe,
    *overrides: str,
    over: Sequence[Annotated[str, "KEY=V1,V2,..."]] = (),
    seeds: str = "1",
    data: Store | None = None,
    out: Folder,
    jobs: int = 1,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train a recipe over several values of its keys, and several seeds.

      pha sweep pha-tiny.text --data STORE --over optimizer.learning_rate=1e-3,2e-3,4e-3 \\
          --seeds 3 --out runs/rates
    Several --over make a grid. Other keys of the recipe can be set as in `pha train`. What
    is finished is reused; the same command continues. Writes sweep.json, .md, .svg, .png.

    Args:
        over: a key of the recipe and its values; again for a grid
        seeds: how many (3: seeds 0, 1, 2), or which (0,7,9)
        out: folder of all runs
        jobs: runs side by side
        json: print the summary as JSON
    """
    from pha.studies.sweep import make_points, parse_axis, run_sweep

    words = list(overrides)
    if data is not None:
        words += ["--data.store", str(data)]
    axes = [parse_axis(text) for text in over]
    which = _seeds(seeds)
    console = console_for(json)
    if dry_run:
        from pha.studies.cost import estimate

        points = make_points(recipe, axes, which, out, words)
        cost = estimate([job for point in points for job in point.jobs], console)
        if json:
            answer(True, cost)
        return
    content = run_sweep(recipe, axes, which, out, words, console, jobs)
    if json:
        answer(True, content)
    else:
        console.print(f"table, JSON and picture: {out}/sweep.*", highlight=False)


def study(
    name: str,
    *overrides: str,
    scale: str = "tiny",
    data: Store | None = None,
    seeds: str | None = None,
    out: Folder = Path("studies"),
    jobs: int = 1,
    cluster: Annotated[str | None, "PARTITION"] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """A table or figure of the paper: train what is missing, compare, draw.

      pha study list
      pha study branches --data STORE --dry-run
      pha study branches --data STORE
      pha study wikitext103 --scale paper
    Runs lie in OUT/runs by the content of their settings, and studies share them; what is
    finished is reused, and the same command continues. Settings of all runs can be given as
    in `pha train`. Writes OUT/NAME-SCALE: study.json, table.md, .tex, .csv, and the plots.

    Args:
        name: a study, or list
        scale: tiny, small or paper
        seeds: how many (3: seeds 0, 1, 2), or which (0,7,9); the scale's
        out: folder of all
        jobs: runs side by side, a GPU each
        cluster: run on Slurm, through submitit
    """
    console = console_for(json)
    if name == "list":
        if overrides:
            raise PHAError(
                f"{overrides[0]!r} is not understood; `pha study list` takes no settings"
            )
        _list_studies(json, console)
        return
    from pha.studies.definition import load_scale, load_study

    chosen, size = load_study(name), load_scale(scale)
    folder = out / f"{chosen.name}-{size.name}"
    if chosen.kind == "efficiency":
        if overrides or data or seeds or cluster or jobs != 1:
            raise PHAError(
                f"study {name} trains nothing; leave out --data, --seeds, --jobs, --cluster and "
                "settings of runs"
            )
        _efficiency(chosen, size, folder, dry_run, json, console)
        return
    from pha.studies.planning import plan_study

    which = list(range(size.seeds)) if seeds is None else _seeds(seeds)
    if len(set(which)) < len(which):
        raise PHAError(f"--seeds {seeds} names one twice")
    plan = plan_study(
        chosen, size, which, out / "runs", str(data) if data else None, list(overrides)
    )
    if dry_run:
        from pha.studies.study_cost import study_cost

        content = study_cost(plan, console)
    else:
        from pha.studies.study import run_study

        content = run_study(plan, folder, console, jobs, cluster)
    if json:
        answer(True, content)


def _efficiency(
    chosen: Study, scale: Scale, folder: Path, dry_run: bool, json: bool, console: Console
) -> None:
    if not dry_run:
        from pha.studies.study import run_efficiency

        content = run_efficiency(chosen, scale, folder, console)
        if json:
            answer(True, content)
        return
    from pha.studies.efficiency import describe

    lines = describe(chosen, scale)
    if json:
        answer(True, lines)
    else:
        console.print("\n".join(lines), highlight=False)


def _list_studies(json: bool, console: Console) -> None:
    from pha.studies.definition import load_study, scales, study_names

    studies = [load_study(name) for name in study_names()]
    if json:
        answer(True, [{"name": s.name, "title": s.title, "paper": s.paper} for s in studies])
        return
    table = Table("study", "question", "paper", "variants", title="studies", title_justify="left")
    for each in studies:
        table.add_row(each.name, each.question, each.paper, str(len(each.variants)))
    console.print(table)
    for scale in scales().values():
        console.print(f"{scale.name}: {scale.about}, {scale.seeds} seeds", highlight=False)


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0 or (numbers == [0] and "," not in text):
        raise PHAError(f"--seeds {text!r}: give how many, such as 3, or a list, such as 0,7,9")
    return list(range(numbers[0])) if len(numbers) == 1 else numbers
