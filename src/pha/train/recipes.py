"""Recipes: a protocol from `pha/recipes/*.yaml` with a preset, or a YAML file of one's own."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from pha.model.presets import PRESETS, preset
from pha.peers import PEERS, PREFIX
from pha.results import CONFIG_FORMAT
from pha.tasks import TASKS
from pha.tasks.testing import recipe_of
from pha.train.config import TrainConfig
from pha.train.keys import SECTIONS, in_words, recipe_keys, require_keys
from pha.utils.errors import PHAError
from pha.utils.formats import read_yaml
from pha.utils.modules import ASKED, import_modules
from pha.utils.text import did_you_mean
from pha.utils.versions import check_format

if TYPE_CHECKING:
    import jsonargparse

Settings = dict[str, Any]
"""`section.key` -> value."""


def protocols() -> dict[str, str]:
    """Name -> YAML text of every protocol that ships with the package."""
    folder = resources.files("pha") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files}


def task_recipe(name: str) -> dict[str, Any]:
    """The recipe of a task: what all share, and what it says itself."""
    content = read_yaml(resources.files("pha.tasks") / "recipe.yaml")
    for key, value in recipe_of(name).items():
        section, _, rest = key.partition(".")
        content.setdefault(section, {})[rest] = value
    return content


def describe(text: str) -> str:
    """The comment at the top of a recipe, on one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def _read(recipe: str) -> tuple[str, dict[str, Any]]:
    if recipe.lower().endswith((".yaml", ".yml")) or Path(recipe).is_file():
        return Path(recipe).stem, read_yaml(Path(recipe))
    model, dot, protocol = recipe.rpartition(".")
    known = [*protocols(), *TASKS]
    foreign = model.startswith(PREFIX)
    if not dot or protocol not in known or not (foreign or model in PRESETS):
        names = [f"{m}.{p}" for p in known for m in (*PRESETS, *(PREFIX + peer for peer in PEERS))]
        close = difflib.get_close_matches(recipe, names, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise PHAError(
            f"there is no recipe {recipe!r}; {hint}`pha recipes` lists them, and a path to a "
            ".yaml file works too"
        )
    content = task_recipe(protocol) if protocol in TASKS else yaml.safe_load(protocols()[protocol])
    if foreign:  # whose dropout is a field of its own
        del content["model"]
        return recipe, content | {"transformers": {"name": model.removeprefix(PREFIX)}}
    content["model"] = {"preset": model} | content.get("model", {})
    if model.startswith("pha-plus-"):
        # Half of PHA+ is its optimiser, with which twice the rate is best [docs/decisions.md].
        rate = 2 * content["optimizer"]["learning_rate"]
        content["optimizer"] |= {"kind": "muon", "learning_rate": rate}
    return recipe, content


# Of these a configuration gives one: naming it drops the others.
LENGTHS = ("run.steps", "run.epochs", "run.flops")
_EXCLUSIVE = (
    LENGTHS,
    ("data.store", "data.source", "data.task"),
)


def merge(*layers: Mapping[str, Any]) -> Settings:
    """Settings in which later layers win, and of two keys that exclude each other the later one."""
    merged: Settings = {}
    for layer in layers:
        for keys in _EXCLUSIVE:
            if layer.keys() & set(keys):
                for key in keys:
                    merged.pop(key, None)
        merged |= layer
    return merged


@cache
def make_parser() -> jsonargparse.ArgumentParser:
    """A parser of `--section.key value` for every key of `TrainConfig`.

    Raises:
        PHAError: jsonargparse is not installed.
    """
    try:
        import jsonargparse
    except ImportError as error:
        raise PHAError(
            f"recipes are read with {error.name}, which is not installed; run "
            "`pip install 'pha-lm[train]'`"
        ) from error
    parser = jsonargparse.ArgumentParser(
        prog="pha train RECIPE",
        exit_on_error=False,
        add_help=False,
        allow_abbrev=False,
        default_env=False,
    )
    for name, kind in SECTIONS.items():
        parser.add_class_arguments(kind, name)
    return parser


def parse_overrides(words: Sequence[str]) -> Settings:
    """`--section.key value` and `--section.key=value` as settings, of the types of the keys.

    Raises:
        PHAError: a word that is neither key nor value, an unknown key, a wrong type.
    """
    words = list(words)
    options = [word.partition("=") for word in words if word.startswith("--")]
    require_keys(option.removeprefix("--") for option, _, _ in options)
    try:
        given = make_parser().parse_args(words, defaults=False)
    except argparse.ArgumentError as error:
        after = dict(pairwise(words))
        values = {key: value if equals else after.get(key) for key, equals, value in options}
        said = {key.removeprefix("--"): value for key, value in values.items()}
        raise PHAError(_in_words(error, said)) from error
    return {
        f"{section}.{key}": value
        for section, keys in given.as_dict().items()
        for key, value in keys.items()
    }


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the words of a command line, which `parse_overrides` reads back."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]


def load_recipe(
    recipe: str,
    overrides: Sequence[str] | Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> TrainConfig:
    """A recipe as a checked configuration.

    Args:
        recipe: `PRESET.PROTOCOL`, or the path of a YAML file.
        overrides: command-line arguments such as `["--run.steps", "100"]`, or settings.
        defaults: settings for what the recipe leaves open, such as the data.

    Raises:
        PHAError: no such recipe, an unknown key, a wrong type, an impossible value.
    """
    name, content = _read(recipe)
    check_format(Path(recipe), content.pop("format", 0), CONFIG_FORMAT)
    name = str(content.pop("recipe", None) or name)
    if not isinstance(overrides, Mapping):
        overrides = parse_overrides(overrides or [])
    settings = merge(defaults, _flat(content, recipe), overrides)
    modules = settings.get("run.imports") or []
    if not isinstance(modules, list) or not all(isinstance(each, str) for each in modules):
        raise PHAError(f"run.imports is {modules!r}; give a list of names of modules")
    import_modules(modules, "run.imports")
    settings["run.imports"] = list(dict.fromkeys([*ASKED, *modules]))
    chosen = settings.get("model.preset")
    if chosen not in (None, "custom"):
        shape = {f"model.{key}": value for key, value in preset(str(chosen)).items()}
        settings = shape | settings
    return _checked(settings, name)


def _flat(content: Mapping[str, Any], recipe: str) -> Settings:
    settings: Settings = {}
    for section, values in content.items():
        if not isinstance(values, dict | None):
            raise PHAError(f"recipe {recipe}: {section} must be a mapping")
        settings |= {f"{section}.{key}": value for key, value in (values or {}).items()}
    return settings


def _checked(settings: Settings, name: str) -> TrainConfig:
    nested: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, rest = key.partition(".")
        nested.setdefault(section, {})[rest] = value
    try:
        require_keys(settings)
    except PHAError as error:
        raise PHAError(f"{name}: {error}") from error
    try:
        # The dataclasses add the defaults, for which jsonargparse takes twenty times as long.
        parsed = make_parser().parse_object(nested, defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise PHAError(f"{name}: {_in_words(error, settings)}") from error
    sections = {name: kind(**parsed.get(name, {})) for name, kind in SECTIONS.items()}
    config = TrainConfig(recipe=name, **sections)
    config.check()
    return config


def _in_words(error: Exception, given: Mapping[str, Any]) -> str:
    """What jsonargparse says of a value, in terms of what a user writes."""
    text = " ".join(str(error).split())
    named = re.search(r'key "([\w.]+)"', text)
    if named is None or named[1] not in recipe_keys() or named[1] not in given:
        return text
    key = recipe_keys()[named[1]]
    hint = did_you_mean(str(given[key.name]), key.choices)
    return f"{key.name} is {given[key.name]!r}; it must be {in_words(key.hint)}{hint}"
