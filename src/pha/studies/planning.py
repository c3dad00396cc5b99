"""From a study and a scale to runs: the same settings are one run, whichever study asks for it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pha.data import TokenStore
from pha.studies.definition import Scale, Settings, Study, Variant
from pha.studies.jobs import Job
from pha.train.config import TrainConfig
from pha.train.recipes import load_recipe
from pha.train.session import FREE_KEYS
from pha.utils.errors import PHAError

# Keys of which a run has one: naming either drops the other.
_PAIRS = (("run.steps", "run.epochs"), ("data.store", "data.source"))


@dataclass(frozen=True)
class PlannedRun:
    """A variant with a seed, and the run that is trained for it."""

    variant: Variant
    seed: int
    job: Job


@dataclass(frozen=True)
class StudyPlan:
    """A study at a scale, with all of its runs.

    Attributes:
        study: what is asked.
        scale: how large.
        seeds: of every variant.
        runs: one for each variant and seed; some may share a folder.
    """

    study: Study
    scale: Scale
    seeds: tuple[int, ...]
    runs: tuple[PlannedRun, ...]

    def jobs(self) -> list[Job]:
        """Every run once."""
        return list({run.job.out: run.job for run in self.runs}.values())

    def of(self, variant: Variant) -> list[PlannedRun]:
        """The runs of a variant, in the order of the seeds."""
        return [run for run in self.runs if run.variant is variant]


def plan_study(
    study: Study,
    scale: Scale,
    seeds: Sequence[int],
    folder: Path,
    store: str | None,
    overrides: Sequence[str] = (),
) -> StudyPlan:
    """Settle the settings of every run and the folder that it has.

    Settings are taken from the protocol, the scale, the model, the study at this scale, the variant
    and `overrides`, each over what comes before it.

    Args:
        study: what is asked.
        scale: how large.
        seeds: of every variant.
        folder: of all runs; a run lies in `PRESET-DIGEST/seed-N`, by the content of its settings.
        store: a token store, where it is not the protocol's own source that is read.
        overrides: arguments such as `--run.steps 4`, for every run.

    Raises:
        PHAError: no data named, a bad store, an impossible setting.
    """
    asked = parse_overrides(overrides)
    if store is not None:
        asked["data.store"] = store
    if scale.needs_data and not asked.keys() & {"data.store", "data.source"}:
        raise PHAError(
            f"scale {scale.name} needs a token store; make one with `pha prepare FOLDER "
            "--tokenizer bpe:8192 --out STORE` and add --data STORE"
        )
    digests: dict[str, str] = {}
    runs = []
    for variant in study.variants:
        settings = merge(
            scale.set,
            scale.models[variant.model].set,
            study.scales.get(scale.name, {}),
            variant.set,
            asked,
        )
        settings.pop("run.seed", None)
        preset = settings.pop("model.preset", scale.models[variant.model].preset)
        recipe = f"{preset}.{study.protocol or scale.protocol}"
        arguments = tuple(f"--{key}={_written(value)}" for key, value in settings.items())
        digest = _digest(load_recipe(recipe, list(arguments)), digests)
        home = folder / f"{preset}-{digest}"
        for seed in seeds:
            job = Job(recipe, home / f"seed-{seed}", (*arguments, f"--run.seed={seed}"))
            runs.append(PlannedRun(variant, seed, job))
    return StudyPlan(study, scale, tuple(seeds), tuple(runs))


def merge(*layers: Mapping[str, Any]) -> Settings:
    """Settings in which later layers win, and of two keys that exclude each other the later one."""
    merged: Settings = {}
    for layer in layers:
        for pair in _PAIRS:
            if layer.keys() & set(pair):
                for key in pair:
                    merged.pop(key, None)
        merged |= layer
    return merged


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`--section.key value` and `--section.key=value` as a mapping, values as written.

    Raises:
        PHAError: a word that is neither key nor value.
    """
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not re.fullmatch(r"--\w+\.\w+", key) or not (equals or rest):
            raise PHAError(f"{key!r} is not understood; settings are given as --section.key VALUE")
        found[key.removeprefix("--")] = value if equals else rest.pop(0)
    return found


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _digest(config: TrainConfig, stores: dict[str, str]) -> str:
    """A short name of all settings that touch the weights: those that are not the default.

    A setting that a later version adds, with the old behaviour as its default, changes no name.
    """
    asked, defaults = config.to_dict(), TrainConfig().to_dict()
    content = {
        f"{section}.{key}": value
        for section, values in asked.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != defaults[section][key] and f"{section}.{key}" not in FREE_KEYS
    }
    if config.data.store is not None:
        if config.data.store not in stores:
            stores[config.data.store] = TokenStore.open(Path(config.data.store)).sha256
        content["data"] = stores[config.data.store]
    else:
        content["data"] = [config.data.source, config.data.tokenizer]
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
