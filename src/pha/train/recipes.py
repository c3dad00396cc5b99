"""Recipes: a protocol from `pha/recipes/*.yaml` with a preset, or a YAML file of one's own."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pha.model.presets import PRESETS, preset
from pha.train.config import TrainConfig
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    import jsonargparse

SECTIONS = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "recipe"}


def protocols() -> dict[str, str]:
    """Name -> YAML text of every protocol that ships with the package."""
    folder = resources.files("pha") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files}


def describe(text: str) -> str:
    """The comment at the top of a recipe, on one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def _read(recipe: str) -> tuple[str, dict[str, Any]]:
    if recipe.endswith((".yaml", ".yml")) or Path(recipe).is_file():
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PHAError(f"recipe {recipe} cannot be read ({error})") from error
        name, model = Path(recipe).stem, None
    else:
        model, dot, protocol = recipe.rpartition(".")
        known = protocols()
        if not dot or protocol not in known or model not in PRESETS:
            names = [f"{m}.{p}" for p in known for m in PRESETS]
            close = difflib.get_close_matches(recipe, names, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise PHAError(
                f"there is no recipe {recipe!r}; {hint}`pha recipes` lists them, and a path to a "
                ".yaml file works too"
            )
        name, text = recipe, known[protocol]
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PHAError(f"recipe {recipe} is not YAML: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise PHAError(f"recipe {recipe} must be a mapping with {', '.join(SECTIONS)}")
    if model is not None:
        content["model"] = {"preset": model} | (content.get("model") or {})
    return name, content


def _preset_override(overrides: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model.preset", dest="preset")
    return finder.parse_known_args(overrides)[0].preset


# Pairs of which a configuration gives one: naming the first on the command line drops the other.
_EXCLUSIVE = (
    ("run.steps", "run.epochs"),
    ("run.epochs", "run.steps"),
    ("data.store", "data.source"),
    ("data.source", "data.store"),
)


def _yield_to(overrides: list[str], content: dict[str, Any]) -> None:
    named = {argument.split("=")[0].removeprefix("--") for argument in overrides}
    for key, other in _EXCLUSIVE:
        section, name = other.split(".")
        if key in named and other not in named and isinstance(content.get(section), dict):
            content[section].pop(name, None)


def make_parser(program: str = "pha train RECIPE") -> jsonargparse.ArgumentParser:
    """A parser of `--section.key value` for every key of `TrainConfig`.

    Raises:
        PHAError: jsonargparse is not installed.
    """
    try:
        import jsonargparse
    except ImportError as error:
        raise PHAError(
            f"recipes are read with {error.name}, which is not installed; run "
            "`pip install 'pha[train]'`"
        ) from error
    parser = jsonargparse.ArgumentParser(
        prog=program, exit_on_error=False, add_help=False, allow_abbrev=False, default_env=False
    )
    for name, section in SECTIONS.items():
        factory = section.default_factory
        assert isinstance(factory, type)
        parser.add_class_arguments(factory, name)
    return parser


def load_recipe(recipe: str, overrides: list[str] | None = None) -> TrainConfig:
    """A recipe as a checked configuration.

    Args:
        recipe: `PRESET.PROTOCOL`, or the path of a YAML file.
        overrides: command-line arguments such as `["--run.steps", "100"]`.

    Raises:
        PHAError: no such recipe, an unknown key, a wrong type, an impossible value.
    """
    name, content = _read(recipe)
    overrides = overrides or []
    model = content.get("model") or {}
    if not isinstance(model, dict):
        raise PHAError(f"recipe {recipe}: model must be a mapping")
    _yield_to(overrides, content)
    chosen = _preset_override(overrides) or model.get("preset")
    if chosen is not None:
        model = (preset(str(chosen)) if chosen != "custom" else {}) | model | {"preset": chosen}
    content["model"] = model
    return parse_config(content, overrides, name=content.pop("recipe", None) or name)


def parse_config(content: dict[str, Any], overrides: list[str], name: str | None) -> TrainConfig:
    """Check a nested mapping and command-line overrides against `TrainConfig`.

    Raises:
        PHAError: an unknown key, a wrong type, an impossible value.
    """
    parser = make_parser()
    try:
        parsed = parser.parse_args(overrides, namespace=parser.parse_object(content))
    except argparse.ArgumentError as error:
        raise PHAError(f"{name or 'configuration'}: {_one_line(error)}") from error
    sections: dict[str, Any] = {}
    for section, spec in SECTIONS.items():
        factory = spec.default_factory
        assert isinstance(factory, type)
        sections[section] = factory(**parsed[section].as_dict())
    config = TrainConfig(recipe=name, **sections)
    config.check()
    return config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
