"""The verbs of `pha`: for each its parser, and a function that calls the library and prints.

Whatever a verb needs is imported when it runs, so that `pha --help` is quick.
"""

from collections.abc import Callable

from pha.commands import (
    benchmark,
    comparison,
    data,
    evaluation,
    generation,
    inspection,
    scoring,
    sharing,
    studies,
    training,
)
from pha.commands.common import AddVerb

VERBS: tuple[Callable[[AddVerb], None], ...] = (
    training.add_demo,
    data.add_prepare,
    training.add_train,
    studies.add_sweep,
    studies.add_study,
    training.add_average,
    sharing.add_convert,
    training.add_recipes,
    inspection.add_params,
    evaluation.add_evaluate,
    comparison.add_compare,
    generation.add_generate,
    scoring.add_score,
    sharing.add_export,
    sharing.add_harness,
    inspection.add_mixing,
    inspection.add_report,
    inspection.add_doctor,
    benchmark.add_bench,
)
"""Every verb, in the order of `pha --help`."""
