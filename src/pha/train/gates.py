"""Gates of an extension: what a model made for longer contexts must be able to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from pha.evals.compare import BLOCK_TOKENS, Interval
from pha.evals.perplexity import evaluate
from pha.evals.probes import needles
from pha.evals.probes.reading import Panel, Question, Reading, contrast, points_of
from pha.evals.protocols import Protocol
from pha.evals.where import octave_bins, octaves
from pha.loading import load_model
from pha.train.extend import Extension
from pha.utils.errors import PHAError
from pha.utils.hardware import default_device

TOLERANCE = 0.005  # by which the loss at the old length may rise, relative

Progress = Callable[[str, int, int], None]
"""Is called with what is measured, how many steps are done, and how many there are in all."""


@dataclass(frozen=True)
class Gate:
    """A claim about the model; `passed` is None where it could not be measured, `words` say why."""

    name: str
    value: float | None
    limit: float  # at most, of a loss; above, of a gain
    passed: bool | None
    words: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the gates say, and what they rest on."""

    losses: dict[str, dict[int, float]]  # before and after -> length -> nats per token
    gain: Interval | None  # of needles at the new length, in nats
    gates: list[Gate]
    readings: dict[str, list[Reading]]  # before and after -> loss by position at the new length

    @property
    def passed(self) -> bool:
        """Whether all gates are."""
        return all(gate.passed for gate in self.gates)


def judge(extension: Extension, progress: Progress | None = None) -> Verdict:
    """Measure both models at both lengths, on the same tokens, and ask needles at the new length.

    Args:
        extension: of which all stages are trained.
        progress: of the measurements.
    """
    old, new = extension.trained, extension.length
    store, split = extension.store, extension.split
    config = extension.stages[-1].config
    total = (store.counts(split).tokens - 1) // new * new
    places = np.arange(total) % new + 1
    labels, members = octave_bins(places, old, new)[1:]
    losses: dict[str, dict[int, float]] = {}
    readings = {}
    device, precision = default_device(), config.run.precision
    for name, path in (("before", extension.model), ("after", extension.stages[-1].out)):
        loaded = load_model(path, device)
        losses[name] = {}
        for length in (old, new):  # the longer one last, whose losses are kept
            nats = np.empty(total, dtype=np.float32)
            found = evaluate(
                *(loaded.model, store, split),
                Protocol(length, length, config.data.packed_documents),
                precision=precision,
                max_tokens=total,
                losses=nats,
                piece=2048,
                progress=progress and partial(progress, f"{name}, {length} tokens"),
            )
            losses[name][length] = found.loss
        points = points_of(
            *(nats, members, labels, np.arange(total) // BLOCK_TOKENS), places=octaves(old, new)
        )
        panel = Panel("loss by position", "nats per token", points, "position (tokens)")
        readings[name] = [Reading("position", {"length": new, "split": split}, [panel])]
    gain, words = None, ""
    try:
        question = Question(store, split, new, new, precision=precision)
        asked = needles(loaded, question, progress and partial(progress, "needles"))
        gain = contrast(asked.panels[0].points[0])
    except PHAError as error:
        words = str(error)
    after, limit = losses["after"], losses["before"][old] * (1 + TOLERANCE)
    gates = [
        Gate(f"loss at {old}: at most 0.5% above before", after[old], limit, after[old] <= limit),
        Gate(
            f"loss at {new}: at most that at {old}",
            after[new],
            after[old],
            after[new] <= after[old],
        ),
        Gate(
            f"needle gain at {new}: its interval above 0",
            *(None if gain is None else gain.mean, 0.0, None if gain is None else gain.low > 0),
            words,
        ),
    ]
    return Verdict(losses, gain, gates, readings)
