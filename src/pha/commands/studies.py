"""Verbs that train many models: sweep and study."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pha.commands.common import AddVerb, console_for, print_json
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from pha.studies.definition import Scale, Study

_REUSE = (
    "Runs lie in OUT/runs by the content of their settings, and studies share them; what is\n"
    "finished is reused, and the same command continues. Settings of all runs can be given as\n"
    "in `pha train`. "
)


def add_sweep(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "sweep",
        sweep,
        "a study of one recipe: several values of its keys, and several seeds",
        "  pha sweep pha-tiny.text --data STORE --over optimizer.learning_rate=1e-3,2e-3,4e-3 \\\n"
        "      --seeds 3 --out runs/rates\n"
        "Several --over make a grid, in which the lowest validation perplexity is the best.\n"
        + _REUSE
        + "Writes OUT: study.json, table.md, .tex, .csv, and a plot.",
    )
    sub.add_argument("recipe", metavar="RECIPE")
    sub.add_argument(
        "--over",
        metavar="KEY=V1,V2,...",
        action="append",
        default=[],
        help="a key of the recipe and its values; again for a grid",
    )
    _add_run_options(sub, "1")
    sub.add_argument("--out", type=Path, required=True, help="folder of all")


def _add_run_options(sub: ArgumentParser, seeds: str) -> None:
    """What `pha sweep` and `pha study` share."""
    sub.add_argument(
        "--seeds", help=f"how many (3: seeds 0, 1, 2), or which (0,7,9); default {seeds}"
    )
    sub.add_argument("--data", metavar="STORE", help="token store made by `pha prepare`")
    sub.add_argument("--jobs", type=int, default=1, help="runs side by side, a GPU each (1)")
    sub.add_argument("--cluster", metavar="PARTITION", help="run on Slurm, through submitit")
    sub.add_argument("--dry-run", action="store_true", help="say what it takes, do nothing")
    sub.add_argument("--json", action="store_true", help="print as JSON")


def sweep(options: Namespace, overrides: list[str]) -> None:
    """`pha sweep`."""
    from pha.studies.sweep import make_sweep

    asked = _asked(options, overrides)
    study, scale = make_sweep(options.recipe, options.over, asked)
    _run(options, study, scale, options.out, asked)


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
        "NAME may also be a .yaml file of your own.\n"
        + _REUSE
        + "Writes OUT/NAME-SCALE: study.json, table.md, .tex, .csv, and the plots.",
    )
    sub.add_argument("name", metavar="NAME", help="a study, a .yaml file, or list")
    sub.add_argument("--scale", default="tiny", help="tiny, small or paper (tiny)")
    _add_run_options(sub, "the scale's")
    sub.add_argument("--out", type=Path, default=Path("studies"), help="folder of all (studies)")


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
    else:
        _run(options, chosen, scale, folder, _asked(options, overrides))


def _asked(options: Namespace, overrides: list[str]) -> dict[str, Any]:
    from pha.train.recipes import parse_overrides

    store = {} if options.data is None else {"data.store": options.data}
    return parse_overrides(overrides) | store


def _run(
    options: Namespace, study: Study, scale: Scale, folder: Path, asked: dict[str, Any]
) -> None:
    from pha.studies.planning import plan_study

    seeds = list(range(scale.seeds)) if options.seeds is None else _seeds(options.seeds)
    plan = plan_study(study, scale, seeds, options.out / "runs", asked)
    console = console_for(options)
    if options.dry_run:
        from pha.studies.cost import study_cost

        content = study_cost(plan, console)
    else:
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
    if len(set(numbers)) < len(numbers):
        raise PHAError(f"--seeds {text} names one twice")
    return list(range(numbers[0])) if len(numbers) == 1 else numbers
