"""Verbs that train: demo, train, average, recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.table import Table

from pha.commands.common import Folder, console_for, print_json
from pha.utils.errors import PHAError


def demo(*, out: Folder = Path("runs/demo"), steps: int | None = None) -> None:
    """Train pha-tiny and attention-only-tiny, compare them, write a report.

    Reads the source text of this Python's standard library. What is finished is reused;
    after Ctrl-C the same command continues.

    Args:
        out: where
        steps: optimiser steps per model (the recipe's)
    """
    from pha.studies.demo import run_demo

    run_demo(out, Console(), steps)


def train(
    recipe: str,
    *overrides: str,
    data: Annotated[str | None, "STORE"] = None,
    out: Folder | None = None,
    resume: Literal["auto", "never"] = "auto",
    init_from: Annotated[str | None, "MODEL"] = None,
    dry_run: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Train a model by a recipe.

    RECIPE is PRESET.PROTOCOL (`pha recipes` lists both) or a YAML file. Any key can be set:
      pha train pha-tiny.text --data stores/mine --run.epochs 3 --model.dropout 0.2
    `pha recipes --keys` explains every key. The same command continues a stopped run.

    Args:
        recipe: PRESET.PROTOCOL, or a path that ends in .yaml
        data: token store made by `pha prepare`
        out: run folder (runs/RECIPE)
        resume: auto: continue from the newest checkpoint; never: refuse a folder in use
        init_from: start from these weights
        dry_run: say what it takes, do nothing
        quiet: progress, but no table at the end
        json: print the result as JSON
    """
    from pha.train.recipes import load_recipe
    from pha.train.session import run_training

    words = list(overrides)
    if data is not None:
        words += ["--data.store", data]
    if init_from is not None:
        words += ["--run.init_from", init_from]
    config = load_recipe(recipe, words)
    out = out or Path("runs") / str(config.recipe)
    console = console_for(json)
    result = run_training(config, out, console, resume, dry_run)
    if not result:
        return  # not the main process
    if json:
        print_json(result)
    elif not (dry_run or quiet):
        from pha.report.tables import results_table

        console.print(results_table([result]))
        console.print(f"run folder: {out}", highlight=False, soft_wrap=True)


def average(models: Sequence[Annotated[Path, "MODEL"]], *, out: Folder) -> None:
    """Average the weights of saved models.

    MODEL is a run, a checkpoint or a saved model; all must be of one shape. Runs average
    their own best checkpoints where run.average_best says so.

    Args:
        models: two or more of one shape
        out: folder of the averaged model
    """
    from pha.loading import model_folder
    from pha.train.averaging import average_models

    if out.exists() and any(out.iterdir()):
        raise PHAError(f"{out} is not empty; choose another --out")
    folders = [model_folder(path)[0] for path in models]
    average_models(folders, out)
    print(f"{out}: the average of {len(folders)} models")


def recipes(recipe: str | None = None, *, keys: bool = False) -> None:
    """List recipes, or explain their keys.

    Args:
        recipe: print this one, resolved
        keys: every key with type and default
    """
    import yaml

    from pha.model.presets import PRESETS
    from pha.train.recipes import describe, load_recipe, make_parser, protocols

    if keys:
        make_parser().print_help()
        return
    if recipe is not None:
        # A recipe without data of its own needs some to be shown.
        text = protocols().get(recipe.rpartition(".")[2], "source:")
        config = load_recipe(recipe, [] if "source:" in text else ["--data.store", "STORE"])
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
