"""What is settled before a run costs anything: data, devices, configuration, plan."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from rich.console import Console

from pha.data.display import PreparationDisplay
from pha.data.preparation import cached_store
from pha.data.store import TokenStore
from pha.foreign import ForeignModel
from pha.loading import load_model
from pha.model import ArchitectureConfig
from pha.model.config import vars_of
from pha.ops import unusual
from pha.peers import PREFIX
from pha.results import RunResult
from pha.runs import RunFolder
from pha.train.config import TrainConfig, TransformersConfig
from pha.train.data import TaskData, TextData, TrainingData
from pha.train.optim import Schedule
from pha.train.plan import Card, Plan, make_plan
from pha.train.trackers import require_trackers
from pha.utils.errors import PHAError
from pha.utils.files import cache_folder
from pha.utils.hardware import choose_precision, device_name
from pha.utils.progress import make_console
from pha.utils.text import count, duration, flop, memory

# The main process prepares data and evaluates at the end while the others wait for it in a
# collective, which by default fails after minutes. `run.timeout` is what ends a hanging run.
LONGEST_WAIT = timedelta(hours=12)
MOST_WARMUP = 0.2
"""Of a run's steps: a longer warm-up is more often a mistake than meant."""

# Keys that may change when a run is resumed: they touch neither the weights nor the order of data.
FREE_KEYS = {
    "format",
    "recipe",
    "data.store",
    "data.source",
    "data.tokenizer",
    "run.shards",
    "run.keep_checkpoints",
    "run.imports",
    "run.trackers",
    "run.sample_tokens",
    "run.log_every",
    "run.watch_every",
    "run.timeout",
    "run.gradient_checkpointing",
}


def open_data(config: TrainConfig, console: Console) -> TrainingData:
    """The task of a run or its token store, prepared and kept in the cache if it names a source.

    Raises:
        PHAError: no store there, a damaged one, or a source without text.
    """
    if config.data.task is not None:
        return TaskData(config.data)
    if config.data.store is not None:
        return TextData(TokenStore.open(Path(config.data.store)), config.data)
    assert config.data.source is not None
    source, tokenizer = config.data.source, config.data.tokenizer
    with PreparationDisplay(console) as display:
        store = cached_store(source, tokenizer, cache_folder() / "stores", display)
    return TextData(store, config.data)


def resolve(
    config: TrainConfig, run: RunFolder, data: TrainingData, device: torch.device
) -> TrainConfig:
    """Fill in what was left to choose: vocabulary, precision; on resuming, as it was before.

    Raises:
        PHAError: the run folder holds a run with another configuration.
    """
    if config.run.init_from is not None:
        begin, other = config.run.init_from, config.transformers
        loaded = load_model(Path(begin), changes=other.set, attention=config.run.init_attention)
        data.require_tokenizer(loaded.tokenizer)
        if isinstance(loaded.model, ForeignModel):
            other = replace(other, name=begin.removeprefix(PREFIX))
            config = replace(config, model=ArchitectureConfig(), transformers=other)
        else:
            fields = vars_of(loaded.model.config) | {"dropout": config.model.dropout}
            config = replace(
                config, model=ArchitectureConfig(**fields), transformers=TransformersConfig()
            )
    model = replace(config.model, vocab_size=data.vocab_size)
    settings = replace(config.run)
    before = run.read_config().get("run", {})
    if settings.precision == "auto":
        settings.precision = before.get("precision", "auto")
    if settings.micro_batch is None:
        settings.micro_batch = before.get("micro_batch")
    settings.precision = choose_precision(settings.precision, device)  # type: ignore[assignment]
    resolved = replace(config, model=model, run=settings)
    resolved.check()
    require_same_run(run, resolved.to_dict())
    return resolved


def require_same_run(run: RunFolder, now: dict[str, Any]) -> None:
    """Refuse a folder that holds a run with another, resolved configuration.

    A key that is not in its config.yaml had its default then.

    Raises:
        PHAError: naming the first key that differs.
    """
    saved, defaults = run.read_config(), TrainConfig().to_dict()
    for section, values in now.items() if saved else ():
        if section in FREE_KEYS:
            continue
        for key, value in values.items():
            before = saved.get(section, {}).get(key, defaults[section].get(key))
            if f"{section}.{key}" not in FREE_KEYS and before != value:
                raise PHAError(
                    f"{run.path} holds a run with {section}.{key} {before!r}, not {value!r}; "
                    "choose another --out, or ask for the same settings to continue it"
                )


def finished_result(run: RunFolder, config: TrainConfig) -> RunResult | None:
    """The result of a run that has ended under this configuration; None if it has not ended.

    Unlike `run_training` this neither opens the data nor settles what the configuration leaves
    open, so it costs nothing.

    Raises:
        PHAError: the folder holds a run with another configuration.
    """
    if not run.result.is_file():
        return None
    saved = run.read_config()
    if not saved:
        raise PHAError(f"{run.path} has a result without a config.yaml; choose another folder")
    asked = config.to_dict()
    asked["model"]["vocab_size"] = saved.get("model", {}).get("vocab_size")
    if config.run.init_from is not None:
        asked |= {section: saved.get(section, {}) for section in ("model", "transformers")}
    for key, unsettled in (("precision", "auto"), ("micro_batch", None)):
        if asked["run"][key] == unsettled:
            asked["run"][key] = saved.get("run", {}).get(key)
    require_same_run(run, asked)
    return run.read_result()


def print_plan(session: Session) -> dict[str, Any]:
    """Say what the run will take; the plan and the configuration as a mapping."""
    config, plan, run = session.config, session.plan, session.config.run
    device = session.accelerator.device
    cut = f"{plan.micro_batch} at a time" if plan.accumulation > 1 else "at once"
    carried = f", {memory(plan.carried_bytes)} carried" if plan.carried_bytes else ""
    rate = f"{flop(plan.matmul_flops)}/s"
    lines = [
        f"model      {config.model_name or 'custom'}, {count(plan.parameters)} parameters",
        f"device     {device_name(device)}, {run.precision}, matrix products at {rate} measured"
        if session.card is None
        else f"device     one with {memory(session.card.memory)} and {rate}, {run.precision}",
        f"batch      {run.global_batch} sequences of {config.data.sequence_length} tokens, {cut}",
        f"length     {plan.steps} steps, {count(plan.tokens)} tokens"
        + (f", {plan.steps / plan.steps_per_epoch:.2f} epochs" if config.data.task is None else ""),
        f"memory     {memory(plan.weights_bytes)} for weights, gradients and moments, "
        f"{memory(plan.activation_bytes)} for a micro-batch{carried}; "
        f"{memory(plan.free_bytes)} free",
        f"work       {flop(plan.flops)}, those of mixers counted",
        *_network(plan),
        *_ops(session),
        *_warm_up(config, plan),
        f"time       about {duration(plan.seconds)} if 40% of that rate is reached",
    ]
    for line in lines:
        session.console.print(line, highlight=False, markup=False, soft_wrap=True)
    return {"plan": asdict(plan), "config": config.to_dict()}


def _warm_up(config: TrainConfig, plan: Plan) -> list[str]:
    warmup = Schedule(config.schedule, config.optimizer.learning_rate, plan.steps).warmup
    if warmup <= MOST_WARMUP * plan.steps:
        return []
    return [
        f"warning    the warm-up takes {warmup} of {plan.steps} steps; set "
        "schedule.warmup_steps null and schedule.warmup_fraction 0.05"
    ]


def _ops(session: Session) -> list[str]:
    if session.config.transformers.name is not None:
        return ["watch      off: it knows the layers of ours alone"]
    if session.card is not None:
        return []
    return [f"ops        {unusual(session.accelerator.device.type)}"]


def _network(plan: Plan) -> list[str]:
    if plan.devices == 1:
        return []
    parts = [f"{memory(plan.gradient_bytes)} of gradients"]
    parts += [f"{memory(size)} of {name}" for name, size in plan.gathered_bytes.items() if size]
    return [
        f"network    to and from each of {plan.devices} devices in a step: {', '.join(parts)}",
    ]


@dataclass(frozen=True)
class Session:
    """A run that is fully decided and has not yet been paid for."""

    config: TrainConfig
    plan: Plan
    run: RunFolder
    data: TrainingData
    accelerator: Accelerator
    console: Console
    card: Card | None = None


def _require_compiler(device: torch.device) -> None:
    """Refuse, before anything is spent, a machine without what torch.compile needs."""
    if device.type == "cuda":
        missing = None if find_spec("triton") else "Triton"
    else:
        compilers = (os.environ.get("CXX") or "", "g++", "clang++", "cl")
        missing = None if any(map(shutil.which, compilers)) else "a C++ compiler"
    if missing is not None:
        raise PHAError(f"run.compile needs {missing}, which is not here; leave run.compile out")


def open_session(
    config: TrainConfig,
    out: Path,
    console: Console,
    resume: Literal["auto", "never"] = "auto",
    devices: int | None = None,
    card: Card | None = None,
) -> Session:
    """Open devices and data, settle what was left open, plan.

    Args:
        config: the run.
        out: its folder.
        console: for the preparation of data, and for the plan.
        resume: `never` refuses a folder that is in use.
        devices: that the plan is for, a process each; None for the processes that there are.
        card: what these are; None for such as this one.

    Raises:
        PHAError: bad data, a run folder in the way, an impossible plan, processes that cannot meet.
    """
    run = RunFolder(out)
    run.require_usable()
    if resume == "never" and _used(out):
        raise PHAError(f"{out} is not empty; choose another --out, or --resume auto to continue it")
    if config.run.deterministic:
        # cuBLAS reads this when it is first used, which planning does.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    require_trackers(config.run.trackers)
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # says whoever started this one
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise PHAError(
            "torchrun restarted this on a store that still holds addresses of processes that have "
            "ended, for which new ones wait; start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    accelerator = Accelerator(
        # Processes that torchrun started on a machine without a GPU are joined only if told so.
        cpu=processes > 1 and not torch.accelerator.is_available(),
        # Autocast is the trainer's own: Accelerate fixes one precision for the whole process.
        mixed_precision="no",
        log_with=config.run.trackers or None,
        project_dir=str(out) if config.run.trackers else None,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            # Without it every gradient has a second copy, which is what is sent.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    if accelerator.num_processes != processes:
        raise PHAError(
            f"{processes} processes were started and {accelerator.num_processes} joined into "
            "one run; start them with torchrun, or just one"
        )
    if config.run.compile:
        _require_compiler(accelerator.device)
    console = console if accelerator.is_main_process else make_console(quiet=True)
    with accelerator.main_process_first():
        data = open_data(config, console)
    device = accelerator.device
    if card is not None and config.run.precision == "auto":
        config = replace(config, run=replace(config.run, precision="bf16"))
    config = resolve(config, run, data, device)
    # What is measured could differ between processes: the main one decides for all.
    precision = [config.run.precision]
    broadcast_object_list(precision)
    config = replace(config, run=replace(config.run, precision=precision[0]))
    processes = devices or processes
    plans = [make_plan(config, data.windows(), device, precision[0], processes, card)]
    broadcast_object_list(plans)
    return Session(config, plans[0], run, data, accelerator, console, card)


def _used(folder: Path) -> bool:
    return folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
