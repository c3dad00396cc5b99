"""Probes of long context: what a model makes of a text by position and by kind of token."""

from __future__ import annotations

from collections.abc import Callable

from pha.evals.probes.branches import horizon, need
from pha.evals.probes.needles import needles
from pha.evals.probes.reading import Progress, Question, Reading
from pha.evals.probes.texts import classes, context, planted, position
from pha.loading import LoadedModel

Probe = Callable[[LoadedModel, Question, Progress | None], Reading]
"""Asks a model."""

PROBES: dict[str, Probe] = {
    "position": position,
    "context": context,
    "classes": classes,
    "planted": planted,
    "needles": needles,
    "horizon": horizon,
    "need": need,
}
"""By the names in `pha probe --probes` and in studies."""
