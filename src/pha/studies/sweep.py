"""A sweep: a study of one recipe over values of its keys, said on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from pha.studies.definition import Model, Scale, Study, Variant, grid, scales
from pha.train.recipes import Settings, load_recipe, merge, parse_overrides
from pha.utils.errors import PHAError
from pha.utils.text import split_commas


def make_sweep(recipe: str, over: Sequence[str], asked: Settings) -> tuple[Study, Scale]:
    """The study of a recipe at all combinations of the axes' values.

    An axis is `SECTION.KEY=V1,V2`; without any, seeds alone are compared.

    Raises:
        PHAError: no such recipe or key, an axis of another form, a key or value given twice.
    """
    axes = dict(map(parse_axis, over))
    if len(axes) < len(over):
        raise PHAError("--over names a key twice; give all of its values at once")
    short = [key.rpartition(".")[2] for key in axes]
    names = short if len(set(short)) == len(axes) else list(axes)
    one = Variant(name=recipe, label="" if axes else recipe, model=recipe)
    variants = list(grid(one, dict(zip(names, axes.values(), strict=True))))
    run = load_recipe(recipe, merge(variants[0].set, asked)).run
    study = Study(
        name="sweep",
        title=f"{recipe} over {', '.join(axes) or 'seeds'}",
        question="Which setting has the lowest validation perplexity, and how far do seeds agree?",
        variants=variants,
        columns=[
            *("validation", "test"),
            *(("best", "average") if run.average_best > 1 else ()),
            *("word", "bits"),
        ],
        plots=["settings" if axes else "dots"],
        axis=names[0] if axes else "",
        baseline=variants[0].name if axes else "",
    )
    scale = Scale(
        name=recipe,
        about="a recipe as it is",
        protocol="",
        seeds=1,
        needs_data=False,
        train_tokens=scales()["paper"].train_tokens,
        set={},
        models={recipe: Model(preset=recipe)},
    )
    return study, scale


def parse_axis(text: str) -> tuple[str, dict[str, Settings]]:
    """Read `KEY=V1,V2,...`: the key, and for each value as it is written the setting it makes.

    A value that is a list stands in brackets of its own.

    Raises:
        PHAError: not of this form, no such key, a value that it does not take or that comes twice.
    """
    key, equals, values = text.partition("=")
    parts = split_commas(values)
    if not (equals and re.fullmatch(r"\w+\.\w+", key) and all(map(_is_yaml, parts))):
        raise PHAError(f"{text!r} is not SECTION.KEY=VALUE,VALUE,...")
    if key == "run.seed":
        raise PHAError("seeds are not swept over with the rest: give them with --seeds")
    settings = [parse_overrides([f"--{key}={part}"]) for part in parts]
    if any(settings.count(each) > 1 for each in settings):
        raise PHAError(f"{text!r} has a value that is given twice")
    return key, dict(zip(parts, settings, strict=True))


def _is_yaml(text: str) -> bool:
    try:
        return yaml.safe_load(text) is not None
    except yaml.YAMLError:
        return False
