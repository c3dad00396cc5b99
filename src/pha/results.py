"""The records of a run, each defined here once: `result.json` and the lines of `metrics.jsonl`.

Training writes them, and everything else reads them, through `pha.runs.RunFolder`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pha.utils.files import write_json
from pha.utils.formats import read_json
from pha.utils.records import record_from
from pha.utils.versions import check_format

VERSION = 1
"""Of `result.json`. Files of before it was counted have none."""

CONFIG_FORMAT = 1
"""Of `config.yaml` and other recipes, which may leave it out. A key that is added leaves it."""

METRICS_FORMAT = 1
"""Of `metrics.jsonl`, in its first line. A kind of record or a field that is added leaves it."""

HARDWARE = ("device", "cpu", "threads", "precision")
"""Keys of `provenance` that say what times are of."""

SOLVED = 0.9
"""Accuracy from which on a task is solved."""

JSON_FORMAT = 1
"""Of what studies, benchmarks, comparisons and scores write as JSON."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model scores on a split."""

    split: str  # name of the split
    loss: float  # mean negative log-likelihood (NLL) per token, in nats
    perplexity: float  # exp(loss), per token
    # exp(total NLL / (whitespace words + line ends)); not a number for a task, as are the next two
    word_perplexity: float
    byte_perplexity: float  # exp(total NLL / UTF-8 bytes)
    bits_per_byte: float  # total NLL / UTF-8 bytes, in bits
    accuracy: float  # fraction of tokens that were the top prediction


@dataclass(frozen=True)
class Part:
    """Some answers of a task."""

    answers: int
    loss: float  # nats per answer
    accuracy: float
    best: float | None  # nats per answer of the best predictor there is, where that is known


@dataclass(frozen=True, kw_only=True)
class Evaluation(Scores):
    """Scores with what they are of."""

    tokens: int  # tokens scored; of a task, answers
    # words and line ends, and UTF-8 bytes, that they spell; not a number for a task
    words: float
    bytes: float
    seconds: float  # wall time
    protocol: dict[str, Any]  # how it was measured
    best: float | None = None  # of a task, as in `Part`
    # of a task: answers that rest on what stands 1, 2 to 3, 4 to 7, ... tokens before them, by the
    # first of these numbers
    parts: dict[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerMixing:
    """Branch name -> softplus weight, and -> effective share, of one layer."""

    weights: dict[str, float]
    effective: dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """Weights that a run may end with."""

    name: str  # `best checkpoint` or `average`
    steps: list[int]  # the optimiser steps they come from, best first
    # what decides: of the whole split where there is something to decide
    validation_perplexity: float
    evaluation: Evaluation  # on the test split


@dataclass(frozen=True)
class Sample:
    """A generated text: `text` continues `prompt` and does not repeat it."""

    prompt: str
    text: str
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Parameters:
    """Parameter counts; `components` add up to `total`."""

    total: int
    embedding: int
    non_embedding: int
    components: dict[str, int]


@dataclass(frozen=True)
class ModelSize:
    """The preset, if the model is one, and its size; older runs do not say all of it."""

    preset: str | None
    parameters: Parameters
    cache_bytes: int | None = None  # `pha.costs.cache_bytes`, at the length of training
    flops_per_token: float | None = None  # `pha.costs.training_flops`, at that length


def hardware(provenance: dict[str, Any]) -> str:
    """What times with this provenance are of, in words."""
    known = {key: provenance[key] for key in HARDWARE if provenance.get(key)}
    if "threads" in known:
        known["threads"] = f"threads: {known['threads']}"
    return ", ".join(dict.fromkeys(known.values()))


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """`result.json`: what a finished run came to."""

    name: str
    recipe: str | None  # PRESET.PROTOCOL or the recipe's file
    seed: int
    steps: int
    tokens_seen: int
    seconds: float  # of training, evaluations apart, as is `tokens_per_second`
    tokens_per_second: float
    # fraction of the time that waited for data; older runs do not say
    data_wait: float | None = None
    utilisation: float  # of `matmul_flops`, the measured rate of matrix products in FLOP/s
    matmul_flops: float
    peak_memory_bytes: int
    # name of the candidate whose weights are in `model/`; older runs do not say
    chosen: str | None = None
    chosen_step: int | None  # its step, if it is of one
    candidates: list[Candidate] = field(default_factory=list)
    model: ModelSize
    evaluations: list[Evaluation]  # of the chosen weights
    best_validation_perplexity: float  # on what is evaluated during training
    # of a task: the first evaluation during training with `SOLVED` of the answers right
    solved_step: int | None = None
    mixing: list[LayerMixing]  # of every layer
    samples: list[Sample]
    data: dict[str, Any]  # what the token store says of itself, hashes included
    provenance: dict[str, Any]  # versions, hardware, commit, date and command

    def evaluation(self, split: str) -> Evaluation | None:
        """The first evaluation of the chosen weights on `split`."""
        return next((each for each in self.evaluations if each.split == split), None)

    def candidate(self, name: str) -> Candidate | None:
        """The candidate of that name."""
        return next((each for each in self.candidates if each.name == name), None)

    @property
    def hardware(self) -> str:
        """What its times are of; those of other hardware do not compare."""
        return hardware(self.provenance)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        return {"version": VERSION, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write the file in one step."""
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> RunResult:
        """Read a file of this version or an older one.

        Raises:
            PHAError: the file is absent, damaged, or of a newer version.
        """
        content = read_json(path)
        version = content.get("version", 0) if isinstance(content, dict) else 0
        check_format(path, version, VERSION)
        return record_from(cls, content, str(path))


@dataclass(frozen=True, kw_only=True)
class Record:
    """A line of `metrics.jsonl`: what held after `step` optimiser steps and `tokens` tokens."""

    step: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TrainRecord(Record):
    """Training since the record before: loss in nats per token, gradient norm, speed, time."""

    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    utilisation: float
    data_wait: float | None = None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvalRecord(Scores, Record):
    """An evaluation in the middle of training, and the seconds that it took."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class MixingRecord(Record):
    """The mixing of every layer."""

    layers: list[LayerMixing]


@dataclass(frozen=True)
class LayerWatch:
    """A layer at some tokens of one step."""

    rms: float  # of what enters it
    largest: float  # absolute value in that
    gradient: float  # rms over the gradient of its parameters, before clipping
    # branch -> named numbers: rms and largest of its output before any norm, and as it has them
    # half_life_* in tokens, saturated_states, saturated_gates, temperature_*, clamped
    branches: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class WatchRecord(Record):
    """What the numerics watch saw in that step, before its update."""

    layers: list[LayerWatch]
    leaving: float  # rms of what leaves the last layer
    mixing: list[LayerMixing]


@dataclass(frozen=True, kw_only=True)
class WarningRecord(Record):
    """Something that began to be wrong, as the numerics watch noticed at that step."""

    what: str  # such as `loss spike` or `dead branch`
    layer: int | None = None  # in which it began
    branch: str | None = None
    began: int  # at which step
    message: str


KINDS: dict[str, type[Record]] = {
    "train": TrainRecord,
    "eval": EvalRecord,
    "mixing": MixingRecord,
    "watch": WatchRecord,
    "warning": WarningRecord,
}
"""`kind` of a line -> its record."""


@dataclass(frozen=True)
class Metrics:
    """`metrics.jsonl`, by kind, each in the order of steps."""

    train: list[TrainRecord] = field(default_factory=list)
    eval: list[EvalRecord] = field(default_factory=list)
    mixing: list[MixingRecord] = field(default_factory=list)
    watch: list[WatchRecord] = field(default_factory=list)
    warning: list[WarningRecord] = field(default_factory=list)
