"""A study as a declarative file: what is trained at each scale, compared, tabulated and drawn."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from pha.evals.probes import PROBES
from pha.peers import PREFIX
from pha.studies.measures import MEASURES
from pha.train.recipes import Settings
from pha.utils.errors import PHAError
from pha.utils.formats import read_yaml
from pha.utils.records import record_from

LEAST = 3  # sizes of a model, of which a line has an interval
KINDS = ("training", "mixing", "tasks", "laws", "efficiency")
PLOTS = (
    *("dots", "differences", "parameters", "accuracy", "cache", "time", "curves", "settings"),
    *("shares", "tests", "state", "distances", "laws"),
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A preset (of a sweep, a whole recipe) and what is changed in it at one scale."""

    preset: str
    set: Settings = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the runs of a study are."""

    name: str  # tiny, small or paper; of a sweep, its recipe
    about: str  # in a line, for people
    protocol: str  # the recipe's protocol, unless a study names its own; empty for a sweep
    seeds: int  # how many, unless asked for otherwise
    needs_data: bool  # whether a token store must be named, there being no source by default
    # protocol -> tokens of its training split, to plan with before it is there
    train_tokens: dict[str, float]
    set: Settings  # recipe key -> value, for every run
    models: dict[str, Model]  # name in studies -> preset and changes

    def model(self, name: str) -> Model:
        """What a name is at this scale; one with `hf:` stands for itself.

        Raises:
            PHAError: there is no such name.
        """
        if name not in self.models and name.startswith(PREFIX):
            return Model(preset=name)
        return closest(name, self.models, f"model at scale {self.name}")

    @property
    def words(self) -> str:
        """In tables and plots."""
        return f"scale {self.name}" if self.name in scales() else self.name


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a study: a model and its settings, trained once for each seed."""

    name: str  # key in the study, unique
    label: str  # in tables and plots
    model: str  # name in `Scale.models`, or hf: and a model of transformers
    set: Settings = field(default_factory=dict)  # recipe key -> value
    # axis -> value, where the study goes over a grid or the variant says so, and the label without
    places: dict[str, str] = field(default_factory=dict)
    base: str = ""
    # ids of published rows that report the same thing
    published: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A setting that every variant chooses for itself, by validation perplexity in short runs."""

    key: str  # of a recipe, such as optimizer.learning_rate
    values: list[float]  # that are tried, each with one seed
    set: Settings = field(default_factory=dict)  # of those runs, over all else


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What an efficiency study asks of `pha bench`."""

    modes: list[str]
    lengths: list[int]
    batch: int
    precision: str
    runs: int = 3  # processes for each case
    seconds: float = 2.0  # how long each goes on measuring


@dataclass(frozen=True, kw_only=True)
class Study:
    """One table or figure of the paper, or a question of one's own."""

    name: str  # of the file
    title: str  # what is compared
    question: str  # what is asked, in a sentence
    paper: str = ""  # the tables and figures it answers to, in words; empty for a question of ours
    variants: list[Variant] = field(default_factory=list)  # what is compared
    # `training`, `mixing` (reads the shares of the runs too), `tasks` (counts the seeds that solve
    # one, with a table of its own), `laws` (fits a power law to each model over the sizes of it) or
    # `efficiency` (no training)
    kind: str = "training"
    protocol: str = ""  # in place of the scale's; empty for that
    tune: Tuning | None = None  # what every variant chooses before it is trained
    baseline: str = ""  # the variant that the others are compared with
    # pairs of measures compared inside each run, such as average and best checkpoint
    contrasts: list[list[str]] = field(default_factory=list)
    # measures in the table
    columns: list[str] = field(
        default_factory=lambda: ["validation", "test", "accuracy", "word", "byte"]
    )
    # ids of published rows or tables shown below
    published: list[str] = field(default_factory=list)
    plots: list[str] = field(default_factory=lambda: ["dots"])  # names in `PLOTS`
    axis: str = ""  # of the grid, along the plot `settings` or the sizes of `laws`
    probes: list[str] = field(default_factory=list)  # of `pha probe`, asked of every finished run
    probe_length: int | None = None  # the longest context that they look at, as in `pha probe`
    # scale -> recipe key -> value, on top of the scale's own
    scales: dict[str, Settings] = field(default_factory=dict)
    # scale -> what an efficiency study measures
    benchmark: dict[str, Benchmark] = field(default_factory=dict)


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


def _shipped() -> dict[str, Traversable]:
    folder = resources.files("pha.studies") / "definitions"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(".yaml"): f for f in files if f.name.endswith(".yaml")}


def study_names() -> list[str]:
    """Every study that ships with the package."""
    return list(_shipped())


def load_study(name: str) -> Study:
    """The study called `name`, or in the file `name` where that ends in .yaml.

    Raises:
        PHAError: no such study (the nearest names are suggested), or a file that holds none.
    """
    if name.lower().endswith((".yaml", ".yml")):
        return parse_study(Path(name).stem, read_yaml(Path(name)))
    return parse_study(name, read_yaml(closest(name, _shipped(), "study")))


def load_scale(name: str) -> Scale:
    """The scale called `name`.

    Raises:
        PHAError: no such scale.
    """
    return closest(name, scales(), "scale")


@cache
def scales() -> dict[str, Scale]:
    """Name -> scale, from scales.yaml."""
    content = read_yaml(resources.files("pha.studies") / "scales.yaml")
    return {
        name: make(Scale, f"scale {name}", {"name": name, **given})
        for name, given in content.items()
    }


def parse_study(name: str, content: Mapping[str, Any]) -> Study:
    """A checked study from the mapping that its file holds.

    `over` (axis -> value -> settings) multiplies every variant by the values of each axis. `like`
    names a study that ships with the package, whose keys hold where there are none of its own.

    Raises:
        PHAError: an unknown or missing key, or names that do not fit together.
    """
    where = f"study {name}"
    if like := content.get("like"):
        model = read_yaml(closest(str(like), _shipped(), "study"))
        content = model | {key: value for key, value in content.items() if key != "like"}
    over = _mapping(content.get("over", {}), f"{where}: over")
    variants = _mapping(content.get("variants", {}), f"{where}: variants")
    axes = {
        axis: {
            str(value): _mapping(given, f"{where}: {axis} {value}")
            for value, given in _mapping(of_axis, f"{where}: {axis}").items()
        }
        for axis, of_axis in over.items()
    }
    values = {key: value for key, value in content.items() if key not in ("over", "variants")}
    study = make(Study, where, {"name": name, **values})
    # Inside of these, keys that there are not would be left out.
    if study.tune is not None:
        make(Tuning, f"{where}: tune", content["tune"])
    for scale in study.benchmark:
        make(Benchmark, f"{where}: benchmark.{scale}", content["benchmark"][scale])
    for key, given in variants.items():
        given = _mapping({} if given is None else given, f"{where}: variant {key}")
        named = {"name": key, "label": key, **given}
        study.variants.extend(grid(make(Variant, f"{where}, variant {key}", named), axes))
    _require(bool(study.variants), f"{where} has no variants")
    _require(study.kind in KINDS, f"{where}: kind is {study.kind!r}; choose {', '.join(KINDS)}")
    if study.baseline:
        closest(study.baseline, {each.name: each for each in study.variants}, "variant")
    for plot in study.plots:
        _require(plot in PLOTS, f"{where} has no plot {plot!r}; choose {', '.join(PLOTS)}")
    over_axis = bool({"settings", "laws"} & {study.kind, *study.plots})
    _require(
        not over_axis or all(study.axis in v.places for v in study.variants),
        f"{where}: laws, of kind or plot, and the plot settings go along an axis, one of "
        f"{', '.join(axes) or 'a grid (over)'}, or a place (places) of every variant",
    )
    models = {(v.base, v.places.get(study.axis)) for v in study.variants}
    _require(
        study.kind != "laws"
        or (len(models) == len(study.variants) >= LEAST * len({base for base, _ in models})),
        f"{where}: kind laws fits models over sizes: give each variant its model (base) and its "
        f"size, {LEAST} or more sizes to a model",
    )
    shares = study.kind == "mixing" or "shares" in study.plots
    _require(
        not shares or len(study.variants) == 1,
        f"{where}: kind mixing and the plot shares are of one model; give one variant",
    )
    _require(
        study.kind != "efficiency" or not any(v.set for v in study.variants),
        f"{where}: kind efficiency measures presets as they are; leave out set",
    )
    for name in (*study.columns, *itertools.chain(*study.contrasts)):
        closest(name, MEASURES, f"measure in {where}")
    _require(all(len(pair) == 2 for pair in study.contrasts), f"{where}: contrasts are pairs")
    _require(study.tune is None or bool(study.tune.values), f"{where}: tune has no values")
    for probe in study.probes:
        _require(probe in PROBES, f"{where}: no probe {probe!r}; choose {', '.join(PROBES)}")
    _require(
        study.probe_length is None or study.probe_length >= 2,
        f"{where}: probe_length is {study.probe_length}; give at least 2",
    )
    for scale in (*study.scales, *study.benchmark):
        load_scale(scale)
    for known in scales().values():
        for variant in study.variants:
            known.model(variant.model)
    return study


def only(study: Study, names: Sequence[str]) -> Study:
    """The study with these variants alone.

    Raises:
        PHAError: it has no such variant.
    """
    known = {each.name: each for each in study.variants}
    chosen = [closest(name, known, "variant") for name in dict.fromkeys(names)]
    baseline = study.baseline if study.baseline in names else ""
    return replace(study, variants=chosen, baseline=baseline)


def grid(variant: Variant, axes: Mapping[str, Mapping[str, Settings]]) -> Iterator[Variant]:
    """A variant at every combination of the axes' values."""
    for values in itertools.product(*axes.values()):
        places = dict(zip(axes, values, strict=True))
        words = [variant.label, *(f"{axis} {value}" for axis, value in places.items())]
        settings = variant.set
        for axis, value in places.items():
            settings = settings | axes[axis][value]
        yield replace(
            variant,
            name="/".join([variant.name, *values]),
            label=", ".join(word for word in words if word),
            base=variant.base or variant.label,
            set=settings,
            places=variant.places | places,
        )


Record = TypeVar("Record")


def make(record: type[Record], where: str, content: dict[str, Any]) -> Record:
    """A dataclass from a mapping.

    Raises:
        PHAError: a key that it does not have, or what `record_from` refuses.
    """
    names = {item.name: item for item in fields(record)}  # type: ignore[arg-type]
    for key in content:
        closest(str(key), names, f"key in {where}")
    return record_from(record, content, where)


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    _require(isinstance(value, dict), f"{where} is not a mapping")
    found: dict[Any, Any] = value
    return found


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PHAError(message)
