"""From a study and a scale to runs: the same settings are one run, whichever study asks for it.

Where variants choose a setting for themselves, short runs, the trials, come first.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

from pha.data import TokenStore
from pha.data.store import RECORD
from pha.peers import PREFIX
from pha.studies.definition import Scale, Study, grid
from pha.studies.jobs import Job
from pha.studies.measures import MEASURES
from pha.studies.published import find_published
from pha.train.config import TrainConfig
from pha.train.recipes import Settings, load_recipe, merge
from pha.train.session import FREE_KEYS
from pha.utils.errors import PHAError
from pha.utils.text import file_name, perplexity


@dataclass(frozen=True)
class StudyPlan:
    """A study at a scale, with all of its runs."""

    study: Study  # what is asked
    scale: Scale  # how large
    seeds: Sequence[int]  # of every variant
    # variant -> its runs, in the order of the seeds; no two variants share one
    runs: dict[str, list[Job]]
    folder: Path  # of all runs
    asked: Settings  # for all of them
    # short runs that have to be looked at before; the plan itself is then of a value in the middle
    trials: StudyPlan | None = None

    def jobs(self) -> list[Job]:
        """Every run."""
        return list(chain.from_iterable(self.runs.values()))


def plan_study(
    study: Study, scale: Scale, seeds: Sequence[int], folder: Path, asked: Settings
) -> StudyPlan:
    """Settle the settings of every run and the folder that it has.

    Settings are taken from the protocol, the scale, the model, the study at this scale, the variant
    and `asked`, each over what comes before it. A run lies in `folder/PRESET-DIGEST/seed-N`, by the
    content of its settings.

    Raises:
        PHAError: no data named, a bad store, an impossible setting, no such published row, two
            variants of one run, or probes of a task.
    """
    find_published(study.published)
    named = bool(asked.keys() & {"data.store", "data.source"})
    if named and study.kind == "tasks":
        raise PHAError(f"study {study.name} draws its own data; leave out --data")
    protocol = study.protocol or scale.protocol
    if study.tune is not None and study.tune.key not in asked:
        tune = study.tune
        over = {tune.key: {f"{value:g}": {tune.key: value} for value in tune.values}}
        tried = [one for variant in study.variants for one in grid(variant, over)]
        trials = plan_study(
            replace(study, variants=tried, tune=None, baseline=""),
            *(scale, [0], folder, merge(asked, tune.set)),
        )
        middle = tune.values[len(tune.values) // 2]
        guess = [replace(x, set=x.set | {tune.key: middle}) for x in study.variants]
        guessed = replace(study, variants=guess, tune=None)
        return replace(plan_study(guessed, scale, seeds, folder, asked), trials=trials)
    runs: dict[str, list[Job]] = {}
    homes: dict[Path, str] = {}  # folder of runs -> label of the variant
    for variant in study.variants:
        model = scale.model(variant.model)
        shared, at_scale = scale.set, study.scales.get(scale.name, {})
        if model.preset.startswith(PREFIX):  # the shape of ours is nothing to it
            shared, at_scale = (
                {key: value for key, value in given.items() if not key.startswith("model.")}
                for given in (shared, at_scale)
            )
        settings = merge(shared, model.set, at_scale, variant.set, asked)
        settings.pop("run.seed", None)
        recipe = f"{model.preset}.{protocol}" if protocol else model.preset
        config = load_recipe(recipe, settings)
        if scale.needs_data and not (named or config.data.task):
            raise PHAError(
                f"{scale.words} needs a token store; make one with `pha prepare FOLDER "
                "--tokenizer bpe:8192 --out STORE` and add --data STORE"
            )
        if config.data.task and study.probes:
            raise PHAError(
                f"probes ask about a text, and the task {config.data.task} has none; leave them out"
            )
        home = folder / f"{file_name(config.model_name or 'custom')}-{_digest(config)}"
        if home in homes:
            raise PHAError(
                f"{homes[home]} and {variant.label} come to the same run, so there is nothing to "
                "compare; leave out settings of all runs that undo what they differ in"
            )
        homes[home] = variant.label
        runs[variant.name] = [
            Job(recipe, home / f"seed-{seed}", settings | {"run.seed": seed}) for seed in seeds
        ]
    return StudyPlan(study, scale, seeds, runs, folder, asked)


def _digest(config: TrainConfig) -> str:
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
        record = Path(config.data.store) / RECORD
        changed = record.stat().st_mtime_ns if record.is_file() else 0
        content["data"] = _store_sha256(record.parent, changed)
    elif config.data.task is None:
        content["data"] = [config.data.source, config.data.tokenizer]
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@lru_cache
def _store_sha256(folder: Path, changed: int) -> str:
    """Of a store whose record was written then; opened once, for a plan has many runs."""
    # Every run checks the tokens themselves before it trains.
    return TokenStore.open(folder, verify=False).sha256


@dataclass(frozen=True)
class Choice:
    """A variant, the validation perplexities of its trials, and the value of the lowest."""

    variant: str  # name
    label: str
    key: str  # of the setting
    tried: dict[str, float | None]  # value -> perplexity; None where the trial diverged
    value: float

    def sentence(self) -> str:
        """What was chosen, and from what."""
        tried = ", ".join(f"{value} ({perplexity(found)})" for value, found in self.tried.items())
        values = list(map(float, self.tried))
        ends = ", at an end of what was tried" * (self.value in (min(values), max(values)))
        return (
            f"{self.label} has {self.key} {self.value:g}{ends}: "
            f"validation perplexity after the trials {tried}."
        )


def settle(plan: StudyPlan) -> tuple[StudyPlan, list[Choice]]:
    """The plan with what each variant chose, once the trials have ended."""
    if plan.trials is None:
        return plan, []
    choices: list[Choice] = []
    variants = []
    trials = {each.name: each for each in plan.trials.study.variants}
    for variant in plan.study.variants:
        own = {name: x for name, x in trials.items() if name.rpartition("/")[0] == variant.name}
        tried: dict[str, float | None] = {}
        for name, trial in own.items():
            key, value = list(trial.places.items())[-1]
            tried[value] = _perplexity(plan.trials.runs[name][0])
        best = min(tried, key=lambda value: tried[value] or math.inf)
        chosen = trials[f"{variant.name}/{best}"].set[key]
        choices.append(Choice(variant.name, variant.label, key, tried, chosen))
        variants.append(replace(variant, set=variant.set | {key: chosen}))
    study = replace(plan.study, variants=variants)
    return plan_study(study, plan.scale, plan.seeds, plan.folder, plan.asked), choices


def _perplexity(job: Job) -> float | None:
    """On the validation split, of a trial that has ended; None where it diverged."""
    result = job.result()
    found = None if result is None else MEASURES["validation"].value(result)
    return found if found is not None and math.isfinite(found) else None
