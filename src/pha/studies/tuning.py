"""What the trials of a study come to: each variant's own value of the setting that is tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pha.studies.jobs import Job
from pha.studies.measures import MEASURES
from pha.studies.planning import StudyPlan, plan_study
from pha.utils.text import perplexity


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
