"""Run folder -> plain records: what a page can show, nothing about how it looks.

Everything beyond the folder itself is optional: a value that a run does not have is `None`, and
so is one that is not a finite number (a diverged loss, for instance). Control characters become
visible symbols here, once, so that nothing later has to ask whether a string may be printed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pha.runs import RunFolder
from pha.utils.errors import PHAError
from pha.utils.text import printable, shorten


@dataclass(frozen=True)
class TrainPoint:
    """A `train` record of `metrics.jsonl`; the loss is in nats per token."""

    step: int
    tokens: float | None
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    seconds: float | None


@dataclass(frozen=True)
class Scores:
    """Quality on one split: loss in nats per token, perplexities, accuracy from 0 to 1."""

    loss: float | None = None
    perplexity: float | None = None
    word_perplexity: float | None = None
    byte_perplexity: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class EvalPoint:
    """An `eval` record: scores after `step` steps, in the middle of training."""

    step: int
    tokens: float | None
    split: str
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """An entry of `result.json`'s evaluations: scores of the chosen weights."""

    split: str
    scores: Scores
    tokens: float | None
    words: float | None
    bytes: float | None
    seconds: float | None
    protocol: Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """Weights that the run chose among: its best checkpoint, or an average of several."""

    name: str
    steps: tuple[int, ...]
    validation_perplexity: float | None
    evaluation: Evaluation


@dataclass(frozen=True)
class LayerMixing:
    """Branch name -> softplus weight, and -> effective share, of one layer."""

    weights: Mapping[str, float]
    effective: Mapping[str, float]


@dataclass(frozen=True)
class MixingPoint:
    """A `mixing` record: the layers' mixing after `step` steps."""

    step: int
    tokens: float | None
    layers: tuple[LayerMixing, ...]


@dataclass(frozen=True)
class Sample:
    """A generated text: `text` continues `prompt` and does not repeat it."""

    prompt: str
    text: str
    temperature: float | None
    top_p: float | None
    seed: Any


@dataclass(frozen=True)
class Run:
    """One run folder. `label` tells it apart from the other runs of the page."""

    path: Path
    label: str
    finished: bool
    recipe: str | None
    seed: Any
    steps: float | None
    chosen: str | None
    chosen_step: float | None
    candidates: tuple[Candidate, ...]
    tokens_seen: float | None
    seconds: float | None
    tokens_per_second: float | None
    peak_memory_bytes: float | None
    utilisation: float | None
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    provenance: Mapping[str, Any]
    config: Mapping[str, Any]
    config_text: str
    train: tuple[TrainPoint, ...]
    evals: tuple[EvalPoint, ...]
    evaluations: tuple[Evaluation, ...]
    mixing: tuple[LayerMixing, ...]
    mixing_history: tuple[MixingPoint, ...]
    samples: tuple[Sample, ...]

    @property
    def parameters(self) -> float | None:
        """Total parameter count."""
        return number(section(self.model, "parameters").get("total"))

    def evaluation(self, split: str) -> Evaluation | None:
        """The first evaluation of the chosen weights on `split`."""
        return next((e for e in self.evaluations if e.split == split), None)

    def latest_eval(self, split: str) -> EvalPoint | None:
        """The evaluation made at the chosen step of training, else the last one made."""
        points = [point for point in self.evals if point.split == split]
        chosen = [point for point in points if point.step == self.chosen_step]
        best = chosen or points
        return best[-1] if best else None

    def diverged_at(self) -> int | None:
        """First step with a training loss that is not a finite number."""
        return next((point.step for point in self.train if point.loss is None), None)


def collect(paths: Sequence[Path]) -> list[Run]:
    """Read run folders, in the order given.

    Raises:
        PHAError: no path, a folder given twice, one that is not a run, or a damaged file.
    """
    if not paths:
        raise PHAError("a report needs at least one run folder")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise PHAError(f"{path} is given twice")
        seen.add(path.resolve())
    folders = [_run_folder(path) for path in paths]
    results = [_mapping(f.result, f.read_result()) if f.result.is_file() else {} for f in folders]
    labels = _labels(folders, results)
    return [_read(*each) for each in zip(folders, results, labels, strict=True)]


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def section(mapping: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The nested mapping at `key`, or an empty one."""
    value = mapping.get(key)
    return value if isinstance(value, Mapping) else {}


def _run_folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    if not path.is_dir():
        raise PHAError(f"{path} is not a run folder: there is no such folder")
    if not any(file.is_file() for file in (folder.config, folder.metrics, folder.result)):
        raise PHAError(
            f"{path} is not a run folder: it has no config.yaml, metrics.jsonl or result.json"
        )
    return folder


def _labels(folders: Sequence[RunFolder], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The shortest kind of name that tells all runs apart."""
    names = [str(r.get("name") or f.name) for f, r in zip(folders, results, strict=True)]
    own = [folder.name for folder in folders]
    parents = [f"{folder.path.resolve().parent.name}/{folder.name}" for folder in folders]
    for labels in (names, own, parents):
        clean = [shorten(label, 80) or "run" for label in labels]
        if len(set(clean)) == len(clean):
            return clean
    return [f"{shorten(label, 80)} ({index})" for index, label in enumerate(parents, start=1)]


def _read(folder: RunFolder, result: Mapping[str, Any], label: str) -> Run:
    config, config_text = _read_config(folder.config)
    records = _read_metrics(folder)
    train = _points(records, "train", _train_point)
    history = _points(records, "mixing", _mixing_point)
    run = section(config, "run")
    speeds = [p.tokens_per_second for p in train if p.tokens_per_second is not None]
    # An unfinished run has no totals yet: its last record says how far it came.
    last = train[-1] if train else None
    seconds, tokens = (last.seconds, last.tokens) if last else (None, None)
    final_mixing = _layers(result.get("mixing"))
    return Run(
        path=folder.path,
        label=label,
        finished=folder.result.is_file(),
        recipe=_text(result.get("recipe", config.get("recipe"))),
        seed=result.get("seed", run.get("seed")),
        steps=number(result.get("steps", last.step if last else None)),
        chosen=_text(result.get("chosen")),
        chosen_step=number(result.get("chosen_step")),
        candidates=tuple(_candidate(entry) for entry in _entries(result.get("candidates"))),
        tokens_seen=number(result.get("tokens_seen", tokens)),
        seconds=number(result.get("seconds", seconds)),
        tokens_per_second=number(
            result.get("tokens_per_second", statistics.median(speeds) if speeds else None)
        ),
        peak_memory_bytes=number(result.get("peak_memory_bytes")),
        utilisation=number(result.get("utilisation")),
        model=section(result, "model"),
        data=section(result, "data"),
        provenance=section(result, "provenance"),
        config=config,
        config_text=config_text,
        train=train,
        evals=_points(records, "eval", _eval_point),
        evaluations=tuple(_evaluation(entry) for entry in _entries(result.get("evaluations"))),
        mixing=final_mixing or (history[-1].layers if history else ()),
        mixing_history=history,
        samples=tuple(_sample(entry) for entry in _entries(result.get("samples"))),
    )


def _read_config(path: Path) -> tuple[Mapping[str, Any], str]:
    if not path.is_file():
        return {}, ""
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise PHAError(f"{path} cannot be read as text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}," if mark else ""
        raise PHAError(f"{path}{where} is not YAML") from error
    return _mapping(path, config or {}), printable(text)


def _read_metrics(folder: RunFolder) -> list[Mapping[str, Any]]:
    try:
        records = list(folder.read_metrics())
    except UnicodeDecodeError as error:
        raise PHAError(f"{folder.metrics} cannot be read as text") from error
    return [_mapping(folder.metrics, record) for record in records]


def _mapping(path: Path, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PHAError(f"{path} holds a {type(value).__name__} where names and values belong")
    return {printable(str(key)): _printable(item) for key, item in value.items()}


def _printable(value: Any) -> Any:
    """`value` with every string in it printable, and every key a string."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list | tuple) else value


Point = TypeVar("Point", TrainPoint, EvalPoint, MixingPoint)


def _points(
    records: Iterable[Mapping[str, Any]], kind: str, make: Callable[[int, Mapping[str, Any]], Point]
) -> tuple[Point, ...]:
    """Records of one kind as points, steps ascending.

    A run resumed from a checkpoint repeats the steps after it; what was first written for them
    is superseded.
    """
    points: list[Point] = []
    last: dict[str | None, int] = {}
    for record in records:
        step = number(record.get("step"))
        if record.get("kind") != kind or step is None:
            continue
        point = make(int(step), record)
        split = _split(point)
        if point.step <= last.get(split, -1):
            points = [p for p in points if p.step < point.step or _split(p) != split]
        last[split] = point.step
        points.append(point)
    return tuple(points)


def _split(point: TrainPoint | EvalPoint | MixingPoint) -> str | None:
    return point.split if isinstance(point, EvalPoint) else None


def _train_point(step: int, record: Mapping[str, Any]) -> TrainPoint:
    names = ("tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds")
    return TrainPoint(step, *(number(record.get(name)) for name in names))


def _eval_point(step: int, record: Mapping[str, Any]) -> EvalPoint:
    split = str(record.get("split", "validation"))
    return EvalPoint(step, number(record.get("tokens")), split, _scores(record))


def _mixing_point(step: int, record: Mapping[str, Any]) -> MixingPoint:
    return MixingPoint(step, number(record.get("tokens")), _layers(record.get("layers")))


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        split=str(entry.get("split", "test")),
        scores=_scores(entry),
        tokens=number(entry.get("tokens")),
        words=number(entry.get("words")),
        bytes=number(entry.get("bytes")),
        seconds=number(entry.get("seconds")),
        protocol=section(entry, "protocol"),
    )


def _scores(entry: Mapping[str, Any]) -> Scores:
    return Scores(**{name: number(entry.get(name)) for name in Scores.__dataclass_fields__})


def _layers(value: Any) -> tuple[LayerMixing, ...]:
    return tuple(
        LayerMixing(_shares(entry, "weights"), _shares(entry, "effective"))
        for entry in _entries(value)
    )


def _shares(entry: Mapping[str, Any], key: str) -> dict[str, float]:
    values = {str(name): number(value) for name, value in section(entry, key).items()}
    return {name: value for name, value in values.items() if value is not None}


def _candidate(entry: Mapping[str, Any]) -> Candidate:
    steps = entry.get("steps")
    return Candidate(
        name=_text(entry.get("name")) or "?",
        steps=tuple(s for s in steps if isinstance(s, int)) if isinstance(steps, list) else (),
        validation_perplexity=number(entry.get("validation_perplexity")),
        evaluation=_evaluation(section(entry, "evaluation")),
    )


def _sample(entry: Mapping[str, Any]) -> Sample:
    return Sample(
        prompt=str(entry.get("prompt") or ""),
        text=str(entry.get("text") or ""),
        temperature=number(entry.get("temperature")),
        top_p=number(entry.get("top_p")),
        seed=entry.get("seed"),
    )


def _entries(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
