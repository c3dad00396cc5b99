"""Verbs that train many models: sweep."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from pha.commands.common import AddVerb, console_for, print_json
from pha.utils.errors import PHAError


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


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0 or (numbers == [0] and "," not in text):
        raise PHAError(f"--seeds {text!r}: give how many, such as 3, or a list, such as 0,7,9")
    return list(range(numbers[0])) if len(numbers) == 1 else numbers
