"""A study as a declarative file: what is trained at each scale, compared, tabulated and drawn."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from typing import Any, TypeVar

import yaml

from pha.utils.errors import PHAError

KINDS = ("training", "mixing", "efficiency")
PLOTS = ("dots", "differences", "parameters", "accuracy", "curves", "settings", "shares")

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A preset and what is changed in it at one scale.

    Attributes:
        preset: name of a preset.
        set: recipe key -> value.
    """

    preset: str
    set: Settings


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the runs of a study are.

    Attributes:
        name: tiny, small or paper.
        about: in a line, for people.
        protocol: the recipe's protocol, unless a study names its own.
        seeds: how many, unless asked for otherwise.
        needs_data: whether a token store must be named, there being no source by default.
        train_tokens: protocol -> tokens of its training split, to plan with before it is there.
        set: recipe key -> value, for every run.
        models: name in studies -> preset and changes.
    """

    name: str
    about: str
    protocol: str
    seeds: int
    needs_data: bool
    train_tokens: dict[str, float]
    set: Settings
    models: dict[str, Model]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a study: a model and its settings, trained once for each seed.

    Attributes:
        name: key in the study, unique.
        label: in tables and plots.
        model: name in `Scale.models`.
        set: recipe key -> value.
        places: axis -> value, where the study goes over a grid.
        published: ids of published rows that report the same thing.
    """

    name: str
    label: str
    model: str
    set: Settings
    places: dict[str, str]
    published: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """One table or figure of the paper.

    Attributes:
        name: of the file.
        title: what is compared.
        paper: the tables and figures it answers to, in words; empty for a question of ours.
        question: what is asked, in a sentence.
        kind: `training`, `mixing` (reads the shares of the runs too) or `efficiency` (no training).
        protocol: in place of the scale's; empty for that.
        variants: what is compared.
        baseline: the variant that the others are compared with.
        contrasts: pairs of measures compared inside each run, such as average and best checkpoint.
        columns: measures in the table.
        published: ids of published rows or tables shown below.
        plots: names in `PLOTS`.
        axis: of the grid, along the plot `settings`.
        scales: scale -> recipe key -> value, on top of the scale's own.
        benchmark: scale -> lengths, batch and modes of an efficiency study.
    """

    name: str
    title: str
    question: str
    variants: tuple[Variant, ...]
    paper: str = ""
    kind: str = "training"
    protocol: str = ""
    baseline: str = ""
    contrasts: tuple[tuple[str, str], ...] = ()
    columns: tuple[str, ...] = ("validation", "test", "accuracy", "word", "byte")
    published: tuple[str, ...] = ()
    plots: tuple[str, ...] = ("dots",)
    axis: str = ""
    scales: dict[str, Settings]
    benchmark: dict[str, dict[str, Any]]

    def variant(self, name: str) -> Variant:
        """The variant of that name.

        Raises:
            PHAError: there is none; the closest names are suggested.
        """
        return closest(name, {each.name: each for each in self.variants}, "variant")


Named = TypeVar("Named")


def closest(name: str, known: Mapping[str, Named], what: str) -> Named:
    """`known[name]`.

    Raises:
        PHAError: there is no such name; the nearest ones are suggested.
    """
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose {', '.join(known)}"
    raise PHAError(f"there is no {what} {name!r}; {hint}")


def study_names() -> list[str]:
    """Every study that ships with the package."""
    folder = resources.files("pha.studies") / "definitions"
    return sorted(
        file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")
    )


def load_study(name: str) -> Study:
    """The study called `name`.

    Raises:
        PHAError: no such study; the nearest names are suggested.
    """
    closest(name, dict.fromkeys(study_names(), True), "study")
    return parse_study(name, _read(f"definitions/{name}.yaml"))


def load_scale(name: str) -> Scale:
    """The scale called `name`.

    Raises:
        PHAError: no such scale.
    """
    return closest(name, scales(), "scale")


@cache
def scales() -> dict[str, Scale]:
    """Name -> scale, from scales.yaml."""
    found = {}
    for name, content in _read("scales.yaml").items():
        _strict(content, Scale, f"scale {name}", given=("name",))
        models = {
            key: Model(preset=value["preset"], set=value.get("set", {}))
            for key, value in content["models"].items()
        }
        found[name] = Scale(name=name, **(content | {"models": models}))
    return found


def parse_study(name: str, content: Mapping[str, Any]) -> Study:
    """A checked study from the mapping that its file holds.

    `over` (axis -> value -> settings) multiplies every variant by the values of each axis.

    Raises:
        PHAError: an unknown or missing key, or names that do not fit together.
    """
    values = dict(content)
    axes: dict[str, dict[str, Settings]] = values.pop("over", {})
    _strict(values, Study, f"study {name}", given=("name", "scales", "benchmark"))
    variants = [
        variant
        for key, given in values.pop("variants").items()
        for variant in _variants(key, given or {}, axes, name)
    ]
    for key in ("columns", "published", "plots"):
        if key in values:
            values[key] = tuple(values[key])
    values["contrasts"] = tuple(tuple(pair) for pair in values.get("contrasts", ()))
    study = Study(
        name=name,
        variants=tuple(variants),
        scales=values.pop("scales", {}),
        benchmark=values.pop("benchmark", {}),
        **values,
    )
    _check(study)
    return study


def _variants(
    key: str, given: Mapping[str, Any], axes: Mapping[str, Mapping[str, Settings]], study: str
) -> Iterable[Variant]:
    _strict(given, Variant, f"study {study}, variant {key}", given=("name", "places", "label"))
    label = str(given.get("label", key))
    for values in itertools.product(*axes.values()):
        places = dict(zip(axes, values, strict=True))
        settings = dict(given.get("set", {}))
        for axis, value in places.items():
            settings |= axes[axis][value]
        words = [label, *(f"{axis} {value}" for axis, value in places.items())]
        yield Variant(
            name="/".join([key, *places.values()]),
            label=", ".join(word for word in words if word),
            model=given["model"],
            set=settings,
            places=places,
            published=tuple(given.get("published", ())),
        )


def _check(study: Study) -> None:
    where = f"study {study.name}"
    _require(study.kind in KINDS, f"{where}: kind is {study.kind!r}; choose {', '.join(KINDS)}")
    _require(bool(study.variants), f"{where} has no variants")
    if study.baseline:
        study.variant(study.baseline)
    for plot in study.plots:
        _require(plot in PLOTS, f"{where} has no plot {plot!r}; choose {', '.join(PLOTS)}")
    for name in (*study.scales, *study.benchmark):
        closest(name, scales(), "scale")
    for scale in scales().values():
        for variant in study.variants:
            closest(variant.model, scale.models, f"model at scale {scale.name}")


def _strict(content: Any, record: type[Any], where: str, given: tuple[str, ...] = ()) -> None:
    """Refuse unknown keys, and missing ones but those that are `given` or have a default."""
    _require(isinstance(content, Mapping), f"{where} is not a mapping")
    optional = {"set", "places", "published", *given}
    names = [item.name for item in fields(record)]
    for key in content:
        closest(key, dict.fromkeys(names, True), f"key in {where}")
    for item in fields(record):
        required = item.default is item.default_factory  # both are MISSING
        _require(
            not required or item.name in optional or item.name in content,
            f"{where} lacks {item.name}",
        )


def _read(path: str) -> dict[str, Any]:
    text = (resources.files("pha.studies") / path).read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PHAError(message)
