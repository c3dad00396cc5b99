"""The records of a run, each defined here once: `result.json` and the lines of `metrics.jsonl`.

Training writes them, and everything else reads them, through `pha.runs.RunFolder`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pha.utils.errors import PHAError
from pha.utils.files import read_json, write_json
from pha.utils.records import record_from

VERSION = 1
"""Of `result.json`. Files of before it was counted have none."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model scores on a split.

    Attributes:
        split: name of the split.
        loss: mean negative log-likelihood (NLL) per token, in nats.
        perplexity: exp(loss), per token.
        word_perplexity: exp(total NLL / (whitespace words + line ends)).
        byte_perplexity: exp(total NLL / UTF-8 bytes).
        bits_per_byte: total NLL / UTF-8 bytes, in bits.
        accuracy: fraction of tokens that were the top prediction.
    """

    split: str
    loss: float
    perplexity: float
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Evaluation(Scores):
    """Scores with what they are of.

    Attributes:
        tokens: tokens scored.
        words: words and line ends they spell.
        bytes: UTF-8 bytes they spell.
        seconds: wall time.
        protocol: how it was measured.
    """

    tokens: int
    words: float
    bytes: float
    seconds: float
    protocol: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LayerMixing:
    """Branch name -> softplus weight, and -> effective share, of one layer."""

    weights: dict[str, float]
    effective: dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """Weights that a run may end with.

    Attributes:
        name: `best checkpoint` or `average`.
        steps: the optimiser steps they come from, best first.
        validation_perplexity: what decides: of the whole split where there is something to decide.
        evaluation: on the test split.
    """

    name: str
    steps: list[int]
    validation_perplexity: float
    evaluation: Evaluation


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
    """The preset, if the model is one, and its size."""

    preset: str | None
    parameters: Parameters


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """`result.json`: what a finished run came to.

    Attributes:
        recipe: PRESET.PROTOCOL or the recipe's file.
        seconds: of training, evaluations apart, as is `tokens_per_second`.
        data_wait: fraction of the time that waited for data; older runs do not say.
        utilisation: of `matmul_flops`, the measured rate of matrix products in FLOP/s.
        chosen: name of the candidate whose weights are in `model/`; older runs do not say.
        chosen_step: its step, if it is of one.
        evaluations: of the chosen weights.
        best_validation_perplexity: on what is evaluated during training.
        mixing: of every layer.
        data: what the token store says of itself, hashes included.
        provenance: versions, hardware, commit, date and command.
    """

    name: str
    recipe: str | None
    seed: int
    steps: int
    tokens_seen: int
    seconds: float
    tokens_per_second: float
    data_wait: float | None = None
    utilisation: float
    matmul_flops: float
    peak_memory_bytes: int
    chosen: str | None = None
    chosen_step: int | None
    candidates: list[Candidate] = field(default_factory=list)
    model: ModelSize
    evaluations: list[Evaluation]
    best_validation_perplexity: float
    mixing: list[LayerMixing]
    samples: list[Sample]
    data: dict[str, Any]
    provenance: dict[str, Any]

    def evaluation(self, split: str) -> Evaluation | None:
        """The first evaluation of the chosen weights on `split`."""
        return next((each for each in self.evaluations if each.split == split), None)

    def candidate(self, name: str) -> Candidate | None:
        """The candidate of that name."""
        return next((each for each in self.candidates if each.name == name), None)

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
        if isinstance(version, int) and version > VERSION:
            raise PHAError(
                f"{path} has version {version} of this format and this pha reads up to {VERSION}; "
                "update pha"
            )
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


KINDS: dict[str, type[Record]] = {"train": TrainRecord, "eval": EvalRecord, "mixing": MixingRecord}
"""`kind` of a line -> its record."""


@dataclass(frozen=True)
class Metrics:
    """`metrics.jsonl`, by kind, each in the order of steps."""

    train: list[TrainRecord]
    eval: list[EvalRecord]
    mixing: list[MixingRecord]
