"""The numerics watch: what a run's numbers look like by layer, what is wrong, where spikes began.

Gradients are measured at every step. At every `run.watch_every`-th step some rows of its first
micro-batch go through the layers once more, without gradients and with hooks that listen. So the
training step itself stays as it is, be it compiled, recomputed or shared by processes, and its
weights get the same bits as without a watch.

A value has left its range if its logarithm is more than 6 robust standard deviations (1.4826 times
the median absolute deviation, at least 0.01) from the median of the values before it. A loss that
leaves its range upwards is a spike. It began where, in the 20 steps up to it, an activation or a
gradient first left its own range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pha.model import Branch, Diagnostics
from pha.modeling import PHAForCausalLM
from pha.results import LayerWatch, Record, WarningRecord, WatchRecord
from pha.train.sharding import mixing_of, norms
from pha.utils.text import percent

LIMIT = 6.0  # robust standard deviations
SPREAD = 0.01  # the least that counts as one, in logarithms
WINDOW = 60  # values of a series that are kept
RECENT = 20  # steps in which a spike may have begun
KNOWN = 10  # values that a value is compared with, at least

TOKENS = 4096  # of a micro-batch that are looked at
PLACES = 128  # of a sequence at which a branch is asked for its diagnostics

DEAD = 0.01  # share of the mix
SATURATED = 0.5  # share of gates or states
GATE_EDGE, DECAY_EDGE = 1e-3, 1e-6  # this close to 0 or 1 a gate or a decay is saturated
# Norms square in float32 what they get: beyond this that is infinite. A sixteenth of it is near.
TOO_LARGE = math.sqrt(torch.finfo(torch.float32).max) / 16


class Place(NamedTuple):
    """What is measured where, which makes a series of values over the steps."""

    what: str  # `loss`, `gradient`, `entering` a layer, `output` of a branch, `leaving` the last
    layer: int | None = None
    branch: str | None = None

    def __str__(self) -> str:
        if self.what == "gradient":
            return f"the gradient of layer {self.layer}"
        if self.what == "output":
            return f"the output of {self.branch} in layer {self.layer}"
        return f"what enters layer {self.layer}" if self.what == "entering" else "the last layer"


class Trouble(NamedTuple):
    """Something that is wrong in a layer."""

    what: str
    layer: int
    branch: str | None

    def __str__(self) -> str:
        return f"{self.what} in layer {self.layer}" + (f" ({self.branch})" if self.branch else "")


Values = dict[Place, dict[str, float]]
"""What a look found, in the order of computation: named numbers, `rms` and `largest` at least."""


class Watch:
    """Watches one model while it trains.

    Args:
        model: without what may be wrapped around it.
        every: steps between looks at the activations.
        tokens: of a step.
        autocast: makes the context of its forward pass.

    Attributes:
        records: what there is to record of the last step.
    """

    def __init__(
        self,
        model: PHAForCausalLM,
        every: int,
        tokens: int,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self.model, self.every, self.tokens, self.autocast = model, every, tokens, autocast
        self.records: list[Record] = []
        self.series: dict[Place, list[tuple[int, float]]] = {}  # the latest (step, logarithm)
        self.troubles: list[Trouble] = []  # as of the last look
        self.spiking = False
        self._layers = [list(layer.parameters()) for layer in model.model.layers]
        self._norms: Tensor | None = None
        self._values: Values = {}

    def before(self, step: int, inputs: dict[str, Any]) -> None:
        """Look at a micro-batch of step number `step`, counted from 1, if one is due."""
        self._values = {}
        if step == 1 or step % self.every == 0:
            self._look(step, inputs)

    def gradients(self) -> None:
        """Measure the step's gradients, which are not clipped yet; this waits for nothing."""
        self._norms = norms([p.grad for layer in self._layers for p in layer if p.grad is not None])

    def after(self, step: int, loss: float, inputs: dict[str, Any]) -> None:
        """Take in the loss of the step, before its update; a spike is looked at, in `inputs`."""
        gradients = self._add_gradients(step)
        news: list[tuple[str, int | None, str | None, int, str]] = []
        self.records = []
        before = [ln for _, ln in self.series.get(Place("loss"), ())]
        self._add(step, Place("loss"), loss)
        was, self.spiking = self.spiking, _departure(before, _ln(loss)) > LIMIT
        if self.spiking and not was:
            if not self._values:
                self._look(step, inputs)
            began, place = self.origin(step)
            text = f"the loss is {loss:.4g} after {math.exp(median(before)):.4g}; "
            text += f"it began at step {began} with {place}" if place else "no layer left its range"
            layer, branch = (place.layer, place.branch) if place else (None, None)
            news.append(("loss spike", layer, branch, began, text))
        at = {"step": step, "tokens": step * self.tokens}
        if self._values:
            looked = self._record(at, gradients)
            self.records.append(looked)
            found = troubles_of(looked)
            news += [(*t, step, text) for t, text in found.items() if t not in self.troubles]
            self.troubles = list(found)
        for what, layer, branch, began, message in news:
            record = WarningRecord(
                **at, what=what, layer=layer, branch=branch, began=began, message=message
            )
            self.records.append(record)

    def origin(self, step: int) -> tuple[int, Place | None]:
        """Step and place of what first left its range in the last steps up to `step`.

        Within one step activations come before gradients, which follow from them; of activations
        the first in the order of computation, of gradients the one that went farthest.
        """
        found: list[tuple[int, float, Place]] = []
        for place, series in self.series.items():
            before = [ln for at, ln in series if at <= step - RECENT]
            for at, ln in series:
                far = abs(_departure(before, ln))
                if at > step - RECENT and far > LIMIT and place != Place("loss"):
                    found.append((at, -far if place.what == "gradient" else -math.inf, place))
                    break
        began, _, where = min(found, key=lambda each: each[:2], default=(step, 0.0, None))
        return began, where

    def explain(self, step: int) -> str:
        """What left its range before that step, in which numbers went bad; empty if nothing."""
        began, place = self.origin(step)
        return f"; {place} left its range at step {began}" if place and began < step else ""

    @property
    def status(self) -> str:
        """What is wrong now, in a few words for the progress line; empty if nothing is."""
        names = ["loss spike"] * self.spiking + [str(trouble) for trouble in self.troubles]
        more = f" (+{len(names) - 1})" if len(names) > 1 else ""
        return f"  ! {names[0]}{more}" if names else ""

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on as if never interrupted, plain JSON values."""
        series = [[list(place), values] for place, values in self.series.items()]
        return {"series": series, "troubles": self.troubles, "spiking": self.spiking}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; an empty one is the beginning."""
        series = state.get("series", [])
        self.series = {Place(*place): [(at, ln) for at, ln in values] for place, values in series}
        self.troubles = [Trouble(*each) for each in state.get("troubles", [])]
        self.spiking = state.get("spiking", False)

    def _add(self, step: int, place: Place, value: float) -> None:
        series = self.series.setdefault(place, [])
        series.append((step, _ln(value)))
        del series[:-WINDOW]

    def _add_gradients(self, step: int) -> list[float]:
        """Enter and return the rms of every layer's gradient."""
        assert self._norms is not None
        norms = iter(self._norms.tolist())
        found = []
        for layer, parameters in enumerate(self._layers):
            sizes = [p.numel() for p in parameters if p.grad is not None]
            squares = math.fsum(next(norms) ** 2 for _ in sizes)
            found.append(float(f"{math.sqrt(squares / max(1, sum(sizes))):.5g}"))
            self._add(step, Place("gradient", layer), found[-1])
        return found

    def _look(self, step: int, inputs: dict[str, Any]) -> None:
        rows = max(1, TOKENS // inputs["input_ids"].shape[1])
        starts = inputs["document_starts"]
        with self.autocast():
            self._values = measure(
                self.model,
                input_ids=inputs["input_ids"][:rows],
                document_starts=None if starts is None else starts[:rows],
            )
        for place, values in self._values.items():
            self._add(step, place, values["rms"])

    def _record(self, at: dict[str, int], gradients: Sequence[float]) -> WatchRecord:
        values = self._values
        layers = [
            LayerWatch(
                **values[Place("entering", index)],
                gradient=gradient,
                branches={p.branch: v for p, v in values.items() if p.branch and p.layer == index},
            )
            for index, gradient in enumerate(gradients)
        ]
        mixing = mixing_of(self.model)
        leaving = values[Place("leaving")]["rms"]
        return WatchRecord(**at, layers=layers, leaving=leaving, mixing=mixing)


def measure(model: PHAForCausalLM, **inputs: Any) -> Values:
    """Sizes of what enters the layers and of what their branches put out, with diagnostics."""
    found: dict[Place, dict[str, Tensor]] = {}

    def entering(index: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            found[Place("entering", index)] = _size(arguments[0])

        return hook

    def output(index: int, name: str) -> Any:
        def hook(branch: Branch, arguments: tuple[Any, ...], y: Tensor) -> None:
            z = arguments[0][:, :: max(1, y.shape[1] // PLACES)]
            found[Place("output", index, name)] = _size(y) | _numbers(branch.diagnostics(z))

        return hook

    def leaving(_: nn.Module, __: Any, x: Tensor) -> None:
        found[Place("leaving")] = _size(x)

    # Not compiled, in which form no module shows its output.
    with ExitStack() as hooks, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for index, layer in enumerate(model.model.layers):
            hooks.enter_context(layer.register_forward_pre_hook(entering(index)))
            branches: nn.ModuleDict = layer.branches  # type: ignore[assignment]
            for name, branch in branches.items():
                hooks.enter_context(branch.register_forward_hook(output(index, name)))
        hooks.enter_context(layer.register_forward_hook(leaving))
        model.states(**inputs)
    numbers = torch.stack([x.float() for each in found.values() for x in each.values()])
    flat = (float(f"{number:.5g}") for number in numbers.tolist())  # one wait for all of them
    return {place: {name: next(flat) for name in each} for place, each in found.items()}


def _size(x: Tensor) -> dict[str, Tensor]:
    low, high = x.aminmax()
    norm = torch.linalg.vector_norm(x, dtype=torch.float32)
    return {"rms": norm / math.sqrt(x.numel()), "largest": torch.maximum(-low, high)}


def _numbers(of: Diagnostics) -> dict[str, Tensor]:
    """Half-lives in tokens, shares of what is saturated, temperatures and how many are clamped."""
    found: dict[str, Tensor] = {}
    if of.decays is not None:
        decays = of.decays.float()
        # The decay next to 1 is the slowest there is; 1 itself would never forget.
        half_lives = -math.log(2) / decays.clamp(max=1 - 2**-24).log()
        found |= _spread("half_life", half_lives)
        found["saturated_states"] = _share_near_ends(decays, DECAY_EDGE)
    if of.gates is not None:
        found["saturated_gates"] = _share_near_ends(of.gates.float(), GATE_EDGE)
    if of.temperatures is not None:
        found |= _spread("temperature", of.temperatures.float())
        found["clamped"] = (of.temperatures >= of.temperature_limit * (1 - 1e-6)).sum()
    return found


def _spread(name: str, x: Tensor) -> dict[str, Tensor]:
    return {f"{name}_min": x.min(), f"{name}_median": x.median(), f"{name}_max": x.max()}


def _share_near_ends(x: Tensor, edge: float) -> Tensor:
    return ((x < edge) | (x > 1 - edge)).float().mean()


def troubles_of(record: WatchRecord) -> dict[Trouble, str]:
    """What is wrong in what a look has found, with a line on each."""
    found: dict[Trouble, str] = {}
    for index, layer in enumerate(record.layers):
        largest = [layer.largest, *(values["largest"] for values in layer.branches.values())]
        if not all(value < TOO_LARGE for value in largest):
            text = f"layer {index} has values up to {max(largest):.2g}, which soon overflow"
            found[Trouble("overflow", index, None)] = text
        shares = record.mixing[index].effective if record.mixing else {}
        for name, values in layer.branches.items():
            share = shares.get(name, 1.0) if values["rms"] > 0 else 0.0
            gates, states = (values.get(f"saturated_{what}", 0.0) for what in ("gates", "states"))
            clamped = values.get("clamped", 0.0)
            for what, wrong, text in (
                ("dead branch", share < DEAD, f"has a share of {percent(share)}"),
                (
                    "saturated gates",
                    gates > SATURATED,
                    f"has {percent(gates)} of its gates within {GATE_EDGE:g} of 0 or 1",
                ),
                (
                    "saturated states",
                    states > SATURATED,
                    f"keeps or forgets everything in {percent(states)} of its states",
                ),
                ("clamped temperature", clamped > 0, f"has {clamped:.0f} at the clamp"),
            ):
                if wrong:
                    found[Trouble(what, index, name)] = f"{name} in layer {index} {text}"
    return found


def _departure(before: Sequence[float], ln: float) -> float:
    """How many robust standard deviations a logarithm is above those before it; 0 if too few."""
    if len(before) < KNOWN:
        return 0.0
    middle = median(before)
    return (ln - middle) / max(SPREAD, 1.4826 * median(abs(each - middle) for each in before))


def _ln(value: float) -> float:
    """Rounded, for a state of few bytes; zero and what is not a number have one as well."""
    if not math.isfinite(value):
        return 1e3
    return round(math.log(max(value, 1e-30)), 5)
