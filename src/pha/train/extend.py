"""Longer contexts for a trained model: stages of further training.

A stage is an ordinary run on sequences of up to four times the length before, with a larger base of
the rotary embedding, states that other texts left, and long documents. `pha.train.gates` judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pha.data.sampler import windows_in_documents
from pha.data.store import TokenStore, is_store
from pha.loading import load_model, model_folder
from pha.model import BRANCHES
from pha.modeling import PHAConfig
from pha.peers import PREFIX
from pha.runs import RunFolder
from pha.train.config import ScheduleConfig, TrainConfig
from pha.train.data import TextData
from pha.train.recipes import load_recipe
from pha.train.run import run_training
from pha.train.session import open_data
from pha.utils.errors import PHAError

GROWTH = 4  # of the length in a stage, at most
RATE = 0.2  # of the peak rate of the first training


@dataclass(frozen=True)
class Stage:
    """One stage: a run, and what is new in it."""

    out: Path
    length: int  # tokens of a sequence
    base: float | None  # of the rotary embedding; None: as it was
    config: TrainConfig

    @property
    def tokens(self) -> int:
        """That it is trained on."""
        assert self.config.run.steps is not None
        return self.config.run.steps * self.config.run.global_batch * self.length


@dataclass(frozen=True)
class Extension:
    """All that is settled before anything is written."""

    model: Path
    trained: int  # tokens of its longest sequences so far
    stages: list[Stage]
    store: TokenStore
    split: str  # that the gates are measured on
    notes: list[str]  # what is not as one might think

    @property
    def length(self) -> int:
        """The length in the end."""
        return self.stages[-1].length


def lengths_of_stages(trained: int, to: int) -> list[int]:
    """Lengths of the stages from `trained` tokens to `to`."""
    lengths = [trained]
    while lengths[-1] < to:
        lengths.append(min(GROWTH * lengths[-1], to))
    return lengths[1:]


def extended_base(base: float, head_dim: int, trained: int, length: int) -> float:
    """The largest of the base, the bound of its length, and what slows the last pair by s.

    The bound is 0.0424 T^1.628 (fitted in arXiv 2405.14591); with s = length / trained, base
    s^(K / (K - 2)) turns the slowest pair of a head of size K no further in `length` tokens than
    before in `trained`.
    """
    slowed = base * (length / trained) ** (head_dim / (head_dim - 2)) if head_dim > 2 else base
    return max(base, 0.0424 * length**1.628, slowed)


def current_base(config: PHAConfig) -> float | None:
    """The largest base of layers that attend by rotary positions beyond the trained length."""
    trained = config.longest_trained
    return max(
        (
            layer.get("theta") or config.rope_theta
            for layer in config.attention_options()
            if layer.get("positions", "rotary") == "rotary"
            and min(layer.get("window") or math.inf, config.attention_window or math.inf) > trained
        ),
        default=None,
    )


def plan_extension(
    model: Path,
    to: int,
    out: Path,
    console: Console,
    *,
    data: Path | None = None,
    share: float = 0.05,
    base: float | None = None,
    length_scaling: bool = False,
) -> Extension:
    """Settle the stages; nothing is written.

    Args:
        model: a finished run of ours on a text.
        to: tokens of a sequence in the end.
        out: stages lie in `stage-1`, `stage-2`, ... of this folder.
        console: for the preparation of data.
        data: a store; the run's own data when absent.
        share: of the tokens that the model has seen, in each stage.
        base: of the rotary embedding, in all stages; None follows `extended_base`.
        length_scaling: let attention multiply its cosines by tau + ln(n / T) from here on.

    Raises:
        PHAError: no such run, a length that is none, or data that do not fit.
    """
    if str(model).startswith(PREFIX):
        raise PHAError(f"{model} is a model of transformers; this extends runs of PHA")
    if not 0 < share <= 1:
        raise PHAError(f"--share {share:g}: above 0 and at most 1")
    if base is not None and not 0 < base < math.inf:
        raise PHAError(f"--base {base:g}: a number above 0, or auto")
    loaded = load_model(model)
    shape, run = loaded.pha.config, loaded.run
    if run is None or not run.config.is_file():
        raise PHAError(f"{model} is no run, whose settings this needs; give its run folder")
    seen, config = _tokens_seen(run), load_recipe(str(run.config))
    trained = shape.longest_trained
    if to <= trained:
        raise PHAError(f"--to {to}: {model} was trained on {trained} tokens; give more")
    store = _open_store(config, data, run, console)
    store.require_tokenizer(loaded.tokenizer)
    split = "test" if "test" in store.splits else "validation"
    if (most := store.counts(split).tokens - 1) < to:
        raise PHAError(
            f"--to {to}: the {split} split of {store.path} has {most} tokens after the first; "
            "take a longer text, or a shorter length"
        )
    before = current_base(shape)
    if base is not None and before is None:
        raise PHAError(f"--base: no layer of {model} attends by rotary positions at any distance")
    notes = [] if before else ["the base of the rotary embedding stays: nothing turns beyond it"]
    options: dict[str, Any] = {}
    if length_scaling and not any(x.get("length_scaling") for x in shape.attention_options()):
        if not shape.attention_options() or shape.attention_logits != "scaled-cosine":
            raise PHAError(f"--length-scaling: {model} has no temperatures to scale; leave it out")
        options["length_scaling"] = trained
    starts, count = store.document_starts("train"), store.counts("train").tokens
    chunks = config.data.carry == "chunks"
    if not chunks and any(BRANCHES[name].states for name in shape.branch_names):
        if config.run.context_parallel > 1:
            notes.append("no states are passed on: pieces of rows (run.context_parallel) take none")
        else:
            config = replace(config, data=replace(config.data, carry="states", carry_share=0.5))
    per_step = config.run.global_batch * config.data.sequence_length
    stages: list[Stage] = []
    begin, length = model, trained
    for number, longer in enumerate(lengths_of_stages(trained, to), start=1):
        if before is not None:
            before = base or extended_base(before, shape.head_dim, length, longer)
            options = options | {"theta": before}
        long = not chunks and len(starts) > 1
        long = long and len(windows_in_documents(starts, count, longer)) > 0
        if not long:
            why = "on which rows go on" if chunks else "which has no documents of more tokens"
            notes.append(f"{longer} tokens: plain windows of the text, {why}")
        rows = max(1, round(per_step / longer))
        if (windows := (count - 1) // longer) < rows:
            raise PHAError(
                f"--to {to}: the training split of {store.path} has {windows} sequences of "
                f"{longer} tokens, fewer than the {rows} of a step; take more text"
            )
        stage = _stage_config(config, longer, rows, max(1, round(share * seen / (rows * longer))))
        stage.data.store, stage.data.source = str(store.path), None
        stage.data.long_documents = 0.5 if long else 0.0
        stage.run.init_from, stage.run.init_attention = str(begin), options
        stage.check()
        stages.append(Stage(out / f"stage-{number}", longer, before, stage))
        begin, length = stages[-1].out, longer
    for each in stages:
        RunFolder(each.out).require_usable()
    return Extension(model, trained, stages, store, split, notes)


def train_stages(extension: Extension, console: Console) -> bool:
    """Train what is not finished; whether this is the main process.

    Raises:
        PHAError: what `run_training` raises.
        TrainingInterruptedError: stopped by a signal; the same call continues.
    """
    results = [run_training(stage.config, stage.out, console) for stage in extension.stages]
    return results[-1] is not None


def _open_store(
    config: TrainConfig, data: Path | None, run: RunFolder, console: Console
) -> TokenStore:
    """The store named, or that of the run."""
    if config.data.task is not None:
        raise PHAError(f"{run.path} was trained on a task; this extends models of texts")
    if data is not None:
        return TokenStore.open(data)
    if config.data.store is not None and not is_store(Path(config.data.store)):
        raise PHAError(f"the data of {run.path}, {config.data.store}, are not here; give --data")
    opened = open_data(config, console)
    assert isinstance(opened, TextData)
    return opened.store


def _tokens_seen(run: RunFolder) -> int:
    """That a model was trained on, in its run and in those that it went on from.

    Raises:
        PHAError: a run that has not finished.
    """
    begin = load_recipe(str(run.config)).run.init_from
    before = None
    if begin is not None and Path(begin).is_dir():
        before = model_folder(Path(begin))[1]
    known = before is not None and before.config.is_file() and before.result.is_file()
    return run.read_result().tokens_seen + (_tokens_seen(before) if before and known else 0)


def _stage_config(config: TrainConfig, length: int, rows: int, steps: int) -> TrainConfig:
    """As the model was trained, at another length, for a short while, at a low rate."""
    old, run = config.optimizer, config.run
    return replace(
        config,
        data=replace(config.data, sequence_length=length),
        optimizer=replace(
            old,
            learning_rate=RATE * old.learning_rate,
            muon_learning_rate=old.muon_learning_rate and RATE * old.muon_learning_rate,
            state_space_learning_rate=RATE * old.state_space_learning_rate,
        ),
        schedule=ScheduleConfig(kind="cosine", warmup_fraction=0.05, floor=0.0),
        run=replace(
            run,
            steps=steps,
            epochs=None,
            flops=None,
            global_batch=rows,
            micro_batch=None,
            compile=False,
            # A schedule is over; odds stay.
            windows=run.windows if isinstance(run.windows, dict) else None,
            evaluate_every=None,
            checkpoint_every=None,
        ),
    )
