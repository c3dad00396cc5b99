"""The stages: which commands each runs, in which order, with which models and sizes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pha.utils.files import read_json, write_json
from scripts.gpu.steps import FOLDER, SECONDS, Step


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        precision: of whole models.
        model: what is trained and compared with peers.
        peers: of `model` in training and decoding.
        prefill: the models of the paper's Table 8.
        train_length: T of training.
        batches: of training, of which the fastest is used from then on.
        prefill_lengths: T of prefill.
        decode_lengths: T of the prompts.
        op_model: preset whose shapes the ops have.
        op_shapes: batch and T of each op.
        seconds: of measuring in each process.
        recipe: overrides of the recipe for both models that are trained.
        attention_only: overrides that make `model` an attention-only one of its size.
    """

    precision: str
    model: str
    peers: tuple[str, ...]
    prefill: tuple[str, ...]
    train_length: int
    batches: tuple[int, ...]
    prefill_lengths: tuple[int, ...]
    decode_lengths: tuple[int, ...]
    op_model: str
    op_shapes: dict[str, tuple[tuple[int, int], ...]]
    seconds: float
    recipe: tuple[str, ...]
    attention_only: tuple[str, ...]


FULL = Sizes(
    precision="bf16",
    model="pha-125m",
    peers=("hf:gpt2", "hf:llama", "hf:falcon-h1", "hf:mamba2"),
    prefill=("pha-180m", "attention-only-180m", "attention-only-180m-shallow"),
    train_length=1024,
    batches=(8, 16, 32, 64, 128),
    prefill_lengths=(2048, 4096, 8192, 16384, 32768, 65536),
    decode_lengths=(2048, 16384),
    op_model="pha-180m",
    op_shapes={
        "gated-scan": ((32, 1024), (1, 16384)),
        "loss": ((32, 1024),),
        "attention": ((32, 1024),),
        "documents": ((8, 4096),),
    },
    seconds=2.0,
    recipe=(
        *("--data.sequence_length", "1024", "--run.global_batch", "128"),
        *("--run.precision", "bf16", "--run.evaluations", "10", "--run.evaluate_tokens", "1000000"),
        *("--schedule.kind", "warmup-stable-decay", "--schedule.warmup_steps", "null"),
        *("--schedule.warmup_fraction", "0.05"),
        *("--optimizer.learning_rate", "2e-3", "--model.dropout", "0.0"),
    ),
    # 124.7M parameters with the vocabulary of GPT-2, where pha-125m has 124.9M.
    attention_only=(
        *("--model.preset", "custom", "--model.branches", "[attention]"),
        *("--model.hidden_size", "608", "--model.num_hidden_layers", "28"),
        *("--model.num_attention_heads", "8", "--model.num_key_value_heads", "2"),
        *("--model.head_dim", "76", "--model.primary_ffn_expansion", "2.2"),
    ),
)

TINY = Sizes(
    precision="fp32",
    model="pha-tiny",
    peers=("hf:gpt2-tiny",),
    prefill=("pha-tiny",),
    train_length=32,
    batches=(1, 2),
    prefill_lengths=(32, 64),
    decode_lengths=(32,),
    op_model="pha-tiny",
    op_shapes={"gated-scan": ((2, 32),), "loss": ((2, 32),), "documents": ((2, 32),)},
    seconds=0.02,
    recipe=(
        *("--data.sequence_length", "32", "--run.global_batch", "4", "--run.precision", "fp32"),
        *("--run.evaluations", "2", "--run.evaluate_tokens", "200", "--run.sample_tokens", "4"),
        *("--schedule.warmup_steps", "2", "--model.dropout", "0.0"),
    ),
    attention_only=("--model.preset", "attention-only-tiny"),
)


@dataclass(frozen=True)
class Plan:
    """What a whole run of the script needs to know.

    Attributes:
        sizes: `FULL` or `TINY`.
        work: folder of all steps.
        minutes: of each stage.
        runs: processes for each row of a benchmark.
        compiled: whether models are measured under torch.compile too.
        data: a token store, or text to make one from; None for this Python's standard library.
        tokenizer: for text.
        steps: of training; 0 for as many as the time allows.
    """

    sizes: Sizes
    work: Path
    minutes: float
    runs: int
    compiled: bool
    data: Path | None
    tokenizer: str
    steps: int

    def result(self, name: str) -> list[dict[str, Any]]:
        """The rows that the benchmarks in a step's folder left; none if there are none."""
        paths = sorted((self.work / name).glob("bench-*.json"))
        return [row for path in paths for row in read_json(path)["rows"]]


def _pha(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pha", *words)


def environment(plan: Plan) -> Iterator[Step]:
    """What is installed, what the machine offers, whether every backend agrees with its oracle."""
    yield Step("environment", "doctor", _pha("doctor", "--json"), output="doctor.json")
    if shutil.which("nvidia-smi"):
        yield Step("environment", "nvidia-smi", ("nvidia-smi",), output="nvidia-smi.txt")
    if find_spec("pip"):
        command = (sys.executable, "-m", "pip", "list", "--disable-pip-version-check")
        yield Step("environment", "pip", command, output="pip.txt")


def tests(plan: Plan) -> Iterator[Step]:
    """Everything marked `gpu`; files without such tests may need packages that are not here."""
    folder = Path(__file__).parents[2] / "tests"
    files = sorted(p for p in folder.rglob("test_*.py") if "mark.gpu" in p.read_text("utf-8"))
    command = (
        *(sys.executable, "-m", "pytest", "-m", "gpu", "-rfEs", f"--junitxml={FOLDER}/tests.xml"),
        *("--continue-on-collection-errors", *map(str, files)),
    )
    yield Step("tests", "tests", command)


def _bench(
    stage: str, name: str, plan: Plan, mode: str, models: Sequence[str], *words: str
) -> Step:
    command = (
        *_pha("bench", mode, "--models", ",".join(models), *words),
        *("--runs", str(plan.runs), "--seconds", str(plan.sizes.seconds)),
        *("--seconds-limit", SECONDS, "--out", FOLDER),
    )
    return Step(stage, name, command)


def _shape(batch: int, length: int) -> tuple[str, ...]:
    return "--batch", str(batch), "--lengths", str(length)


def kernels(plan: Plan) -> Iterator[Step]:
    """Each backend of scan, loss and attention against what the machine can do."""
    sizes = plan.sizes
    for mode, shapes in sizes.op_shapes.items():
        for batch, length in shapes:
            yield _bench(
                *("kernels", f"{mode}-b{batch}-t{length}", plan, mode, [sizes.op_model]),
                *_shape(batch, length),
                *("--precision", sizes.precision),
            )


def bench(plan: Plan) -> Iterator[Step]:
    """Whole models: training at every batch size and beside peers, prompts, decoding."""
    sizes, stage = plan.sizes, "bench"
    common = ("--precision", sizes.precision)
    for batch in sizes.batches:
        yield _bench(
            *(stage, f"train-b{batch}", plan, "train", [sizes.model]),
            *(*_shape(batch, sizes.train_length), *common),
        )
    best = best_batch(plan)
    if best is not None:
        batch = best["batch"]
        shape = _shape(batch, sizes.train_length)
        if plan.compiled:
            yield _bench(
                *(stage, f"train-compiled-b{batch}", plan, "train", [sizes.model, sizes.peers[0]]),
                *(*shape, *common, "--compile"),
            )
        yield _bench(
            *(stage, f"train-peers-b{batch}", plan, "train", [sizes.model, *sizes.peers]),
            *(*shape, *common),
        )
    for length in sizes.prefill_lengths:
        yield _bench(
            *(stage, f"prefill-t{length}", plan, "prefill", sizes.prefill),
            *(*_shape(1, length), *common),
        )
    for length in sizes.decode_lengths:
        yield _bench(
            *(stage, f"decode-t{length}", plan, "decode", [sizes.model, *sizes.peers[:2]]),
            *(*_shape(1 if sizes is TINY else 32, length), *common),
        )


def best_batch(plan: Plan, compiled: bool = False) -> dict[str, Any] | None:
    """The fastest row of training at the several batch sizes; None if none was measured.

    Args:
        plan: where the steps ran.
        compiled: whether to consider what was measured under torch.compile too.
    """
    names = [f"train-b{batch}" for batch in plan.sizes.batches]
    if compiled:
        names += [f"train-compiled-b{batch}" for batch in plan.sizes.batches]
    rows = [
        row
        for name in names
        for row in plan.result(name)
        if row["error"] is None and row["model"] == plan.sizes.model
    ]
    return max(rows, key=lambda row: row["tokens_per_second"]["median"], default=None)


def train(plan: Plan) -> Iterator[Step]:
    """The model and an attention-only one of its size on the same tokens, as the time allows."""
    store = plan.work / "store"
    if plan.data is not None and (plan.data / "store.json").is_file():
        store = plan.data
    else:
        source = "stdlib" if plan.data is None else str(plan.data)
        words = ("prepare", source, "--tokenizer", plan.tokenizer, "--out", str(store))
        yield Step("train", "prepare", _pha(*words))
    words = run_length(plan)
    for name, shape in (("pha", ()), ("attention", plan.sizes.attention_only)):
        out = ("--data", str(store), "--out", str(plan.work / "runs" / name), "--quiet")
        command = _pha(
            "train", f"{plan.sizes.model}.text", *out, *plan.sizes.recipe, *words, *shape
        )
        yield Step("train", f"train-{name}", command)


def run_length(plan: Plan) -> list[str]:
    """Overrides for the number of steps, and for what made the fastest step.

    They are settled once and kept, for a run that is continued must not change its length. Two
    runs share four fifths of the stage; the rest is for evaluations and starting up.
    """
    path = plan.work / "run-length.json"
    if path.is_file():
        kept: list[str] = read_json(path)
        return kept
    best = best_batch(plan, compiled=True)
    if best is None or plan.sizes is TINY:
        words = ["--run.steps", str(plan.steps or (8 if plan.sizes is TINY else 500))]
    else:
        tokens = 0.4 * 60 * plan.minutes * best["tokens_per_second"]["median"]
        batch = int(plan.sizes.recipe[plan.sizes.recipe.index("--run.global_batch") + 1])
        steps = plan.steps or max(20, int(tokens / (batch * plan.sizes.train_length)))
        words = ["--run.steps", str(steps), "--run.micro_batch", str(min(batch, best["batch"]))]
        words += ["--run.compile", json.dumps(best["compiled"])]
    write_json(path, words)
    return words


STAGES: dict[str, Callable[[Plan], Iterator[Step]]] = {
    "environment": environment,
    "tests": tests,
    "kernels": kernels,
    "bench": bench,
    "train": train,
}
"""By name, in order."""
