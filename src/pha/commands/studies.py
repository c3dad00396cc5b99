"""Verbs that train many models: sweep and study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

from pha.commands.common import (
    DryRun,
    Folder,
    Json,
    Recipe,
    Store,
    answer,
    outcome_console,
    progress_console,
)
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from pha.studies.definition import Scale
    from pha.studies.planning import StudyPlan

Seeds = Annotated[str | None, "SEEDS", "how many (3: seeds 0, 1, 2), or which (0,7,9)"]
Jobs = Annotated[int, "N", "runs side by side, a GPU each"]
Partition = Annotated[str | None, "PARTITION", "run on Slurm, through submitit"]


def sweep(
    recipe: Recipe,
    *overrides: str,
    over: Sequence[Annotated[str, "KEY=V1,V2,..."]] = (),
    seeds: Seeds = None,
    data: Store | None = None,
    jobs: Jobs = 1,
    cluster: Partition = None,
    out: Folder,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """A study of one recipe: several values of its keys, and several seeds.

      pha sweep pha-tiny.text --data STORE --over optimizer.learning_rate=1e-3,2e-3,4e-3 \\
          --seeds 3 --out runs/rates
    Several --over make a grid, in which the lowest validation perplexity is the best.
    Runs lie in OUT/runs by the content of their settings, and studies share them; what is
    finished is reused, and the same command continues. Settings of all runs can be given as
    in `pha train`. Writes OUT: study.json, table.md, .tex, .csv, and a plot.

    Args:
        over: a key of the recipe and its values; again for a grid
        seeds: how many (3: seeds 0, 1, 2), or which (0,7,9); one where left out
        out: folder of all
    """
    from pha.studies.planning import plan_study
    from pha.studies.sweep import make_sweep

    asked = _asked(overrides, data)
    study, scale = make_sweep(recipe, over, asked)
    plan = plan_study(study, scale, _seeds(seeds, scale), out / "runs", asked)
    _run(plan, out, jobs, cluster, dry_run, json)


def study(
    name: str,
    *overrides: str,
    scale: str = "tiny",
    seeds: Seeds = None,
    data: Store | None = None,
    only: Annotated[str | None, "A,B,..."] = None,
    jobs: Jobs = 1,
    cluster: Partition = None,
    times: Annotated[Path | None, "STUDY.JSON"] = None,
    out: Folder = Path("studies"),
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """A table or figure of the paper: train what is missing, compare, draw.

      pha study list
      pha study branches --data STORE --dry-run
      pha study branches --data STORE
      pha study wikitext103 --scale paper
    NAME may also be a .yaml file of your own.
    Runs lie in OUT/runs by the content of their settings, and studies share them; what is
    finished is reused, and the same command continues. Settings of all runs can be given as
    in `pha train`. Writes OUT/NAME-SCALE: study.json, table.md, .tex, .csv, and the plots.

    Args:
        name: a study, a .yaml file, or list
        scale: tiny, small or paper
        only: these variants, in a table of their own
        seeds: how many (3: seeds 0, 1, 2), or which (0,7,9); the scale's where left out
        times: training speeds from this study, a short one of the same variants on one machine
        out: folder of all
    """
    from pha.studies.definition import load_scale, load_study
    from pha.studies.definition import only as only_variants
    from pha.studies.planning import plan_study

    if name == "list":
        if overrides:
            raise PHAError(
                f"{overrides[0]!r} is not understood; `pha study list` takes no settings"
            )
        _list_studies(json)
        return
    chosen, size = load_study(name), load_scale(scale)
    folder = out / f"{chosen.name}-{size.name}"
    if chosen.kind != "efficiency":
        if only is not None:
            chosen = only_variants(chosen, [name.strip() for name in only.split(",")])
        asked = _asked(overrides, data)
        plan = plan_study(chosen, size, _seeds(seeds, size), out / "runs", asked)
        _run(plan, folder, jobs, cluster, dry_run, json, times)
        return
    if overrides or data or seeds or only or cluster or times or jobs != 1:
        raise PHAError(
            f"study {chosen.name} trains nothing; leave out --data, --seeds, --only, --jobs, "
            "--cluster, --times and settings of runs"
        )
    if dry_run:
        from pha.studies.efficiency import describe

        lines = describe(chosen, size)
        answer(json, lines, *lines)
    else:
        from pha.studies.study import run_efficiency

        shown = outcome_console(json)
        answer(json, run_efficiency(chosen, size, folder, progress_console(), shown))


def _asked(overrides: Sequence[str], data: Path | None) -> dict[str, Any]:
    from pha.train.recipes import parse_overrides

    asked = parse_overrides(list(overrides))
    if "run.seed" in asked:
        raise PHAError("all runs have the seeds of --seeds; leave out --run.seed")
    return asked | ({} if data is None else {"data.store": str(data)})


def _run(
    plan: StudyPlan,
    folder: Path,
    jobs: int,
    cluster: str | None,
    dry_run: bool,
    json: bool,
    times: Path | None = None,
) -> None:
    from pha.studies.cost import study_cost
    from pha.studies.study import run_study
    from pha.studies.times import Times

    shown = outcome_console(json)
    if dry_run:
        answer(json, study_cost(plan, shown))
    else:
        progress = progress_console()
        names = [variant.name for variant in plan.study.variants]
        measured = None if times is None else Times.read(times, names)
        record = run_study(plan, folder, progress, jobs, cluster, times=measured, shown=shown)
        answer(json, record)


def _list_studies(json: bool) -> None:
    from pha.studies.definition import load_study, scales, study_names

    studies = [load_study(name) for name in study_names()]
    record = [{"name": s.name, "title": s.title, "paper": s.paper} for s in studies]
    table = Table("study", "question", "paper", "variants", title="studies", title_justify="left")
    for each in studies:
        table.add_row(each.name, each.question, each.paper, str(len(each.variants)))
    lines = [f"{s.name}: {s.about}, {s.seeds} seeds" for s in scales().values()]
    answer(json, record, table, *lines)


def _seeds(text: str | None, scale: Scale) -> list[int]:
    if text is None:
        return list(range(scale.seeds))
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0 or (numbers == [0] and "," not in text):
        raise PHAError(f"--seeds {text!r}: give how many, such as 3, or a list, such as 0,7,9")
    if len(set(numbers)) < len(numbers):
        raise PHAError(f"--seeds {text} names one twice")
    return list(range(numbers[0])) if len(numbers) == 1 else numbers
