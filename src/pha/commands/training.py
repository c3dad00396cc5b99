"""Verbs that train: demo, train, average, recipes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pha.commands.common import AddVerb, console_for, print_json


def add_demo(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "demo",
        demo,
        "train pha-tiny and attention-only-tiny, compare them, write a report",
        "Reads the source text of this Python's standard library. What is finished is reused;\n"
        "after Ctrl-C the same command continues.",
    )
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), help="where (runs/demo)")
    sub.add_argument("--steps", type=int, help="optimiser steps per model (the recipe's)")


def add_train(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "train",
        train,
        "train a model by a recipe",
        "RECIPE is PRESET.PROTOCOL (`pha recipes` lists both) or a YAML file. Any key can be set:\n"
        "  pha train pha-tiny.text --data stores/mine --run.epochs 3 --model.dropout 0.2\n"
        "`pha recipes --keys` explains every key. The same command continues a stopped run.",
    )
    sub.add_argument("recipe", metavar="RECIPE")
    sub.add_argument("--data", metavar="STORE", help="token store made by `pha prepare`")
    sub.add_argument("--out", type=Path, help="run folder (runs/RECIPE)")
    sub.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: continue from the newest checkpoint; never: refuse a folder in use",
    )
    sub.add_argument("--init-from", metavar="MODEL", help="start from these weights")
    sub.add_argument("--dry-run", action="store_true", help="say what it takes, do nothing")
    sub.add_argument("--quiet", action="store_true", help="progress, but no table at the end")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def add_average(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "average",
        average,
        "average the weights of saved models",
        "MODEL is a run, a checkpoint or a saved model; all must be of one shape. Runs average\n"
        "their own best checkpoints where run.average_best says so.",
    )
    sub.add_argument("models", metavar="MODEL", nargs="+", type=Path)
    sub.add_argument("--out", type=Path, required=True, help="folder of the averaged model")


def add_recipes(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb("recipes", recipes, "list recipes, or explain their keys")
    sub.add_argument("name", metavar="RECIPE", nargs="?", help="print this one, resolved")
    sub.add_argument("--keys", action="store_true", help="every key with type and default")


def demo(options: Namespace) -> None:
    """`pha demo`."""
    from pha.studies.demo import run_demo

    run_demo(options.out, Console(), options.steps)


def train(options: Namespace, overrides: list[str]) -> None:
    """`pha train`."""
    from pha.train.recipes import load_recipe
    from pha.train.run import run_training
    from pha.train.session import plan_training

    if options.data is not None:
        overrides = [*overrides, "--data.store", options.data]
    if options.init_from is not None:
        overrides = [*overrides, "--run.init_from", options.init_from]
    config = load_recipe(options.recipe, overrides)
    out = options.out or Path("runs") / str(config.recipe)
    console = console_for(options)
    if options.dry_run:
        plan = plan_training(config, out, console, options.resume)
        if options.json:
            print_json(plan)
        return
    result = run_training(config, out, console, options.resume)
    if result is None:
        return  # not the main process
    if options.json:
        print_json(result.to_dict())
    elif not options.quiet:
        from pha.report.tables import results_table

        console.print(results_table([result]))
        console.print(f"run folder: {out}", highlight=False)


def average(options: Namespace) -> None:
    """`pha average`."""
    from pha.loading import model_folder
    from pha.train.averaging import average_models
    from pha.utils.errors import PHAError

    if options.out.exists() and any(options.out.iterdir()):
        raise PHAError(f"{options.out} is not empty; choose another --out")
    folders = [model_folder(path)[0] for path in options.models]
    average_models(folders, options.out)
    print(f"{options.out}: the average of {len(folders)} models")


def recipes(options: Namespace) -> None:
    """`pha recipes`."""
    import yaml

    from pha.model.presets import PRESETS
    from pha.train.recipes import describe, load_recipe, make_parser, protocols

    if options.keys:
        make_parser().print_help()
        return
    if options.name is not None:
        config = load_recipe(options.name, _any_data(options.name))
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        return
    console = Console()
    table = Table(title="RECIPE = PRESET.PROTOCOL", title_justify="left")
    table.add_column("protocol", no_wrap=True)
    table.add_column("what it is")
    for name, text in protocols().items():
        table.add_row(name, describe(text))
    console.print(table)
    console.print("presets: " + "  ".join(PRESETS), highlight=False)


def _any_data(name: str) -> list[str]:
    """Arguments that let a recipe without data of its own be shown."""
    from pha.train.recipes import protocols

    text = protocols().get(name.rpartition(".")[2], "source:")
    return [] if "source:" in text else ["--data.store", "STORE"]
