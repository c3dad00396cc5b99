"""Verbs that train many models: sweep and study."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pha.commands.common import AddVerb, console_for, print_json
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from pha.studies.definition import Scale, Study


def add_sweep(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "sweep",
        sweep,
        "train a recipe over several values of its keys, and several seeds",
        "  pha sweep pha-tiny.text --data STORE --over optimizer.learning_rate=1e-3,2e-3,4e-3 \\\n"
        "      --seeds 3 --out runs/rates\n"
        "Several --over make a grid. Other keys of the recipe can be set as in `pha train`. What\n"
        "is finished is reused; the same command continues. Writes sweep.json, .md, .svg, .png.",
    )
    sub.add_argument("recipe", metavar="RECIPE")
    sub.add_argument(
        "--over",
        metavar="KEY=V1,V2,...",
        action="append",
        default=[],
        help="a key of the recipe and its values; again for a grid",
    )
    sub.add_argument(
        "--seeds", default="1", help="how many (3: seeds 0, 1, 2), or which (0,7,9); default 1"
    )
    sub.add_argument("--data", metavar="STORE", help="token store made by `pha prepare`")
    sub.add_argument("--out", type=Path, required=True, help="folder of all runs")
    sub.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    sub.add_argument("--dry-run", action="store_true", help="say what it takes, do nothing")
    sub.add_argument("--json", action="store_true", help="print the summary as JSON")


def sweep(options: Namespace, overrides: list[str]) -> None:
    """`pha sweep`."""
    from pha.studies.sweep import make_points, parse_axis, run_sweep

    if options.data is not None:
        overrides = [*overrides, "--data.store", options.data]
    axes = [parse_axis(text) for text in options.over]
    seeds = _seeds(options.seeds)
    console = console_for(options)
    if options.dry_run:
        from pha.studies.cost import estimate

        points = make_points(options.recipe, axes, seeds, options.out, overrides)
        cost = estimate([job for point in points for job in point.jobs], console)
        if options.json:
            print_json(cost)
        return
    content = run_sweep(options.recipe, axes, seeds, options.out, overrides, console, options.jobs)
    if options.json:
        print_json(content)
    else:
        console.print(f"table, JSON and picture: {options.out}/sweep.*", highlight=False)


def add_study(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "study",
        study,
        "a table or figure of the paper: train what is missing, compare, tabulate, draw",
        "  pha study list\n"
        "  pha study branches --data STORE --dry-run\n"
        "  pha study branches --data STORE\n"
        "  pha study wikitext103 --scale paper\n"
        "Runs lie in OUT/runs by the content of their settings, and studies share them; what is\n"
        "finished is reused, and the same command continues. Settings of all runs can be given as\n"
        "in `pha train`. Writes OUT/NAME-SCALE: study.json, table.md, .tex, .csv, and the plots.",
    )
    sub.add_argument("name", metavar="NAME", help="a study, or list")
    sub.add_argument("--scale", default="tiny", help="tiny, small or paper (tiny)")
    sub.add_argument("--data", metavar="STORE", help="token store made by `pha prepare`")
    sub.add_argument("--seeds", help="how many (3: seeds 0, 1, 2), or which (0,7,9); the scale's")
    sub.add_argument("--out", type=Path, default=Path("studies"), help="folder of all (studies)")
    sub.add_argument("--jobs", type=int, default=1, help="runs side by side, a GPU each (1)")
    sub.add_argument("--cluster", metavar="PARTITION", help="run on Slurm, through submitit")
    sub.add_argument("--dry-run", action="store_true", help="say what it takes, do nothing")
    sub.add_argument("--json", action="store_true", help="print as JSON")


def study(options: Namespace, overrides: list[str]) -> None:
    """`pha study`."""
    if options.name == "list":
        if overrides:
            raise PHAError(
                f"{overrides[0]!r} is not understood; `pha study list` takes no settings"
            )
        _list_studies(options)
        return
    from pha.studies.definition import load_scale, load_study

    chosen, scale = load_study(options.name), load_scale(options.scale)
    folder = options.out / f"{chosen.name}-{scale.name}"
    if chosen.kind == "efficiency":
        _efficiency(options, chosen, scale, folder, overrides)
        return
    from pha.studies.planning import plan_study

    seeds = list(range(scale.seeds)) if options.seeds is None else _seeds(options.seeds)
    if len(set(seeds)) < len(seeds):
        raise PHAError(f"--seeds {options.seeds} names one twice")
    runs, console = options.out / "runs", console_for(options)
    plan = plan_study(chosen, scale, seeds, runs, options.data, overrides)
    if options.dry_run:
        from pha.studies.study_cost import study_cost

        cost = study_cost(plan, console)
        if options.json:
            print_json(cost)
        return
    from pha.studies.study import run_study

    content = run_study(plan, folder, console, options.jobs, options.cluster)
    if options.json:
        print_json(content)


def _efficiency(
    options: Namespace, chosen: Study, scale: Scale, folder: Path, overrides: list[str]
) -> None:
    if overrides or options.data or options.seeds or options.cluster or options.jobs != 1:
        raise PHAError(
            f"study {chosen.name} trains nothing; leave out --data, --seeds, --jobs, --cluster and "
            "settings of runs"
        )
    console = console_for(options)
    if options.dry_run:
        from pha.studies.efficiency import describe

        lines = describe(chosen, scale)
        if options.json:
            print_json(lines)
        else:
            console.print("\n".join(lines), highlight=False)
        return
    from pha.studies.study import run_efficiency

    content = run_efficiency(chosen, scale, folder, console)
    if options.json:
        print_json(content)


def _list_studies(options: Namespace) -> None:
    from pha.studies.definition import load_study, scales, study_names

    studies = [load_study(name) for name in study_names()]
    if options.json:
        print_json([{"name": s.name, "title": s.title, "paper": s.paper} for s in studies])
        return
    from rich.table import Table

    console = console_for(options)
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
