"""The configuration of a training run: strict, typed, the same in YAML and on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pha.data.sampler import SPAN
from pha.model import ArchitectureConfig
from pha.peers import PREFIX
from pha.results import CONFIG_FORMAT
from pha.tasks.testing import make_tests
from pha.train.windows import Windows, check_windows
from pha.utils.errors import PHAError


@dataclass(kw_only=True)
class DataConfig:
    """What is read, and in which pieces.

    Attributes:
        store: folder of a token store made by `pha prepare`; or
        source: what to prepare one from (stdlib, files, a folder, a Hub data set), kept in a
            cache; or
        task: a synthetic task, whose sequences are drawn anew at every step.
        task_options: of the task.
        tests: of the task: label -> options that differ from `task_options`, `length` (tokens) and
            `rows`. The first one chooses the weights, on sequences of its own.
        tokenizer: for `source`: gpt2, gpt2:FOLDER, bytes, bpe:SIZE or a folder.
        sequence_length: T, tokens per sequence.
        packed_documents: reset the state and bound attention at document starts. Off for
            WikiText, whose benchmark ignores them.
        carry: what a row gets of the step before: `none`; `chunks`, the states and keys of the text
            that it continues, truncated backpropagation through time; or `states`, those that
            another text left, in `carry_share` of the steps.
        memory: keys that `chunks` carries; null: `model.attention_window` less one, or a sequence.
        carry_share: of the steps, for `states`; the others begin with nothing.
        long_documents: share of the sequences that lie in one document each, of more than
            `sequence_length` tokens; the others run on from document to document.
        planted_repeats: odds that a training sequence has 32 random tokens written into two of its
            places, so that `pha probe` asks nothing that training has not shown.
    """

    store: str | None = None
    source: str | None = None
    task: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: str = "bpe:2048"
    sequence_length: int = 1024
    packed_documents: bool = False
    carry: Literal["none", "chunks", "states"] = "none"
    memory: int | None = None
    carry_share: float = 0.5
    long_documents: float = 0.0
    planted_repeats: float = 0.0


@dataclass(kw_only=True)
class TransformersConfig:
    """A model of transformers in the place of ours, from random weights.

    Attributes:
        name: a peer of `pha bench`, a folder or a model of the Hub, whose shape it has; null: ours.
        set: fields of its own configuration to change, dropout among them.
    """

    name: str | None = None
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class OptimizerConfig:
    """Norms, mixing scalars, attention scales, A and dt are never decayed.

    Attributes:
        kind: `adamw`, or `muon`: Muon for the matrices between embedding and head, AdamW for all
            else.
        learning_rate: the peak.
        muon_learning_rate: the peak for Muon's matrices; null: `learning_rate`, which does for
            both, as Muon's updates are scaled to the size of AdamW's.
        muon_momentum: of Muon, with Nesterov's look ahead.
        state_space_learning_rate: cap on the rate of A and dt, which set the model's time scales.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled, on matrices only.
        gradient_clip: largest global norm of the gradient; 0 does not clip.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    muon_learning_rate: float | None = None
    muon_momentum: float = 0.95
    state_space_learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0


@dataclass(kw_only=True)
class ScheduleConfig:
    """How the learning rate moves.

    Attributes:
        kind: `cosine` from the peak to the floor, `plateau` (reduced when the validation
            perplexity stops falling), `warmup-stable-decay` (the peak, then linearly to the
            floor), or `constant`.
        warmup_steps: linear rise from zero; null: `warmup_fraction` of the run.
        warmup_fraction: part of the run that this rise takes where `warmup_steps` is null.
        decay_fraction: part of the run that the decay of `warmup-stable-decay` takes, at its end.
        floor: lowest rate, as a fraction of the peak.
        plateau_factor: what the rate is multiplied by on a plateau.
        plateau_patience: evaluations without a new best before that.
    """

    kind: Literal["cosine", "plateau", "warmup-stable-decay", "constant"] = "cosine"
    warmup_steps: int | None = None
    warmup_fraction: float = 0.0
    decay_fraction: float = 0.2
    floor: float = 0.1
    plateau_factor: float = 0.5
    plateau_patience: int = 1


@dataclass(kw_only=True)
class RunConfig:
    """How long, how large, how often.

    Attributes:
        steps: optimiser steps; or
        epochs: passes over the training split; or
        flops: FLOPs of training, those of the mixers counted, as close as whole steps come.
        global_batch: sequences per optimiser step, however they are cut.
        micro_batch: sequences per forward pass and device, at most its share; chosen from memory
            when null.
        context_parallel: processes that share a sequence, a piece each, for sequences longer than
            one device has memory for.
        shards: processes that hold a part of every weight, gradient and moment each, for models
            larger than one device has memory for; groups of so many then share the work.
        precision: fp32, bf16 (autocast), or auto: bf16 where the device does it faster.
        seed: of the weights, the order of the data and dropout.
        gradient_checkpointing: keep only what enters each layer and compute the rest again in the
            backward pass: less memory, about a third more time, the same weights.
        compile: compile forward and backward with torch.compile: a minute or so at the start, and a
            C++ compiler on a CPU, Triton on a GPU.
        windows: attention's window from step to step: odds, such as {16: 0.5, full: 0.5}, or a
            schedule of [step, window], such as [[0, 16], [1000, full]]; null: the model's own,
            which evaluations always have.
        deterministic: deterministic kernels only (on a GPU slower; a CPU run always is).
        evaluate_every: steps between evaluations on the validation split; null: `evaluations`.
        evaluations: how many are made in a run, at even distances, where that is null.
        evaluate_tokens: validation tokens in those; null: the whole split. The end uses all.
        checkpoint_every: steps between checkpoints; null: at every evaluation.
        keep_checkpoints: how many of the newest to keep, to resume from.
        keep_best: of how many evaluations the weights are kept, the best by perplexity.
        average_best: how many of these are averaged at the end, in float32; the average is chosen
            if it is better than the best one on the whole validation split. 1: no average.
        log_every: steps between lines in metrics.jsonl.
        watch_every: steps between looks at every layer's numbers; 0 watches nothing.
        timeout: seconds that several processes wait for a step, an evaluation or a checkpoint,
            before they end and name the one that hangs.
        trackers: what mirrors metrics.jsonl: any that Accelerate knows, such as tensorboard, wandb,
            trackio and mlflow.
        imports: modules of your own to import first, such as one that registers a branch; those of
            `--import` are added.
        init_from: a model or run to start the weights from, with its tokenizer.
        init_attention: options of attention that differ from those of a model of ours there, such
            as {theta: 1.0e+6}.
        sample_tokens: length of the text samples made at the end; 0 makes none.
    """

    steps: int | None = None
    epochs: float | None = None
    flops: float | None = None
    global_batch: int = 24
    micro_batch: int | None = None
    context_parallel: int = 1
    shards: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    gradient_checkpointing: bool = False
    compile: bool = False
    windows: Windows | None = None
    deterministic: bool = False
    evaluate_every: int | None = None
    evaluations: int = 10
    evaluate_tokens: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    keep_best: int = 1
    average_best: int = 1
    log_every: int = 10
    watch_every: int = 50
    timeout: float = 1800.0
    trackers: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)
    init_from: str | None = None
    init_attention: dict[str, Any] = field(default_factory=dict)
    sample_tokens: int = 96

    def __post_init__(self) -> None:
        if isinstance(self.windows, dict):  # as JSON has them, through which settings may go
            self.windows = {str(window): odds for window, odds in self.windows.items()}


MOST = 1 << 53
"""Of any number: floats count no further, and beyond it is only infinity."""
MOST_FLOPS = 1e30

_ALLOWED: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "at least 0": lambda value: value >= 0,
    "above 0": lambda value: value > 0,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
}
# Section and rule -> keys; a key that may be null may always be so.
_RULES = {
    ("data", "at least 1"): "sequence_length",
    ("data", "at least 0"): "memory",
    ("data", "in [0, 1]"): "carry_share long_documents planted_repeats",
    ("run", "at least 1"): (
        "steps global_batch micro_batch context_parallel shards evaluate_every evaluations "
        "evaluate_tokens checkpoint_every keep_checkpoints keep_best average_best log_every"
    ),
    ("run", "at least 0"): "sample_tokens seed watch_every",
    ("run", "above 0"): "epochs flops timeout",
    ("schedule", "at least 0"): "warmup_steps plateau_patience",
    ("schedule", "in [0, 1]"): "floor warmup_fraction decay_fraction plateau_factor",
    ("optimizer", "at least 0"): "weight_decay gradient_clip",
    ("optimizer", "above 0"): "learning_rate muon_learning_rate state_space_learning_rate epsilon",
    ("optimizer", "in [0, 1)"): "beta1 beta2 muon_momentum",
}


@dataclass(kw_only=True)
class TrainConfig:
    """Everything about a run; `recipe` is the name of what it came from, for the record."""

    recipe: str | None = None
    model: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    transformers: TransformersConfig = field(default_factory=TransformersConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def model_name(self) -> str | None:
        """The preset, or `hf:` and the name of another model; None where it has no name."""
        other = self.transformers.name
        return self.model.preset if other is None else PREFIX + other

    def to_dict(self) -> dict[str, Any]:
        """Plain nested mapping, as written to config.yaml, with its format."""
        return {"format": CONFIG_FORMAT, **asdict(self)}

    def check(self) -> None:
        """Refuse impossible values and combinations.

        Raises:
            PHAError: naming the key and what would be right.
        """
        self.model.check()
        data, optimizer, run = self.data, self.optimizer, self.run
        _require(
            [data.store, data.source, data.task].count(None) == 2,
            "name the data: --data STORE (made by `pha prepare`), data.source or data.task, one "
            "of them",
        )
        given = [length is not None for length in (run.steps, run.epochs, run.flops)]
        _require(sum(given) == 1, "give one of run.steps, run.epochs and run.flops")
        for (section, rule), keys in _RULES.items():
            for key in keys.split():
                value = getattr(getattr(self, section), key)
                limit = MOST_FLOPS if key == "flops" else MOST
                allowed = value is None or (_ALLOWED[rule](value) and value <= limit)
                most = "" if value is None or value <= limit else f", and at most {limit}"
                _require(allowed, f"{section}.{key} is {value}; it must be {rule}{most}")
        _require(
            not data.planted_repeats
            or (data.sequence_length >= 2 * SPAN and not data.packed_documents),
            f"data.planted_repeats needs data.sequence_length from {2 * SPAN} on and "
            "data.packed_documents false, so that a sequence holds both copies",
        )
        _require(
            optimizer.muon_learning_rate is None or optimizer.kind == "muon",
            "optimizer.muon_learning_rate is set, but optimizer.kind is adamw; set it to muon, or "
            "leave the rate out",
        )
        _require(
            run.average_best <= run.keep_best,
            f"run.average_best is {run.average_best}, more than the run.keep_best "
            f"({run.keep_best}) that are kept; raise run.keep_best",
        )
        _require(
            not self.transformers.set or bool(self.transformers.name or run.init_from),
            "transformers.set is for a model of transformers; name it, or use model.FIELD",
        )
        if self.transformers.name is not None:
            ours = ArchitectureConfig(vocab_size=self.model.vocab_size)
            changed = [k for k, v in vars(self.model).items() if v != getattr(ours, k)]
            _require(
                not changed,
                f"model.{min(changed, default='')} is a field of ours; {self.model_name} takes its "
                "own in transformers.set",
            )
            _require(
                not (run.compile and data.packed_documents),
                "run.compile needs rows of one length, and the documents of packed rows go through "
                f"{self.model_name} apart; set one of run.compile and data.packed_documents false",
            )
        _require(
            data.memory is None or data.carry == "chunks",
            f"data.memory is {data.memory}, and data.carry {data.carry} carries no keys; set "
            "data.carry chunks, or leave data.memory out",
        )
        _require(
            data.carry == "none" or self.transformers.name is None,
            f"data.carry is {data.carry}, and {self.model_name} cannot begin anew in a single row "
            "of a batch, as ours can; leave data.carry out",
        )
        _require(
            data.carry == "none" or not run.compile,
            f"data.carry is {data.carry}, whose past grows, and run.compile needs one shape; leave "
            "one of them out",
        )
        ranks = run.context_parallel
        _require(
            data.sequence_length % ranks == 0,
            f"data.sequence_length ({data.sequence_length}) must be a multiple of "
            f"run.context_parallel ({ranks}), so that all pieces are equally long",
        )
        for name, is_set in (
            ("data.carry", data.carry != "none"),
            ("run.compile", run.compile),
            ("transformers.name", self.transformers.name is not None),
        ):
            _require(
                ranks == 1 or not is_set,
                f"run.context_parallel needs whole sequences at every step of a model of ours that "
                f"is not compiled; leave {name} out, or run.context_parallel",
            )
        _require(
            not data.long_documents or data.carry != "chunks",
            "data.long_documents draws rows anew, and data.carry chunks goes on in them; leave one "
            "of them out",
        )
        _require(
            not run.init_attention or run.init_from is not None,
            "run.init_attention changes the model of run.init_from; name one, or use model.FIELD",
        )
        self._check_task()
        check_windows(run.windows)
        _require(
            run.windows is None or self.transformers.name is None,
            f"run.windows is of our attention; leave it out for {self.model_name}",
        )
        _require(run.trackers is not None, "run.trackers is null; write [] for none")

    def _check_task(self) -> None:
        data = self.data
        if data.task is None:
            _require(
                not (data.task_options or data.tests),
                "data.task_options and data.tests belong to a task; name data.task, or leave them",
            )
            return
        _require(
            not data.packed_documents,
            "data.packed_documents is for texts; the sequences of a task stand apart already",
        )
        _require(data.carry == "none", "data.carry is for texts; no sequence of a task goes on")
        _require(data.long_documents == 0, "data.long_documents is for texts; leave it out")
        _require(data.planted_repeats == 0, "data.planted_repeats is for texts; leave it out")
        _require(self.run.epochs is None, "a task has no epochs; give run.steps or run.flops")
        make_tests(data.task, data.task_options, data.tests, data.sequence_length)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PHAError(message)
