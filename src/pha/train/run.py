"""A run: locked, trained, finished."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate.utils import broadcast_object_list
from rich.console import Console

from pha.results import RunResult
from pha.train.checkpoint import Progress
from pha.train.config import TrainConfig
from pha.train.diagnose import deterministic
from pha.train.finish import finish
from pha.train.models import make_model
from pha.train.session import Session, open_session, print_plan, require_same_run
from pha.train.trackers import start_trackers
from pha.train.trainer import Trainer
from pha.utils.errors import PHAError, is_out_of_memory
from pha.utils.files import write_text
from pha.utils.hardware import keep_freed_memory
from pha.utils.outputs import writing
from pha.utils.text import memory


def run_training(
    config: TrainConfig,
    out: Path,
    console: Console,
    resume: Literal["auto", "never"] = "auto",
) -> RunResult | None:
    """Train, evaluate and write `out/result.json`; None but in the main process.

    A finished run with the same configuration is returned as it is.

    Raises:
        PHAError: bad data, a run folder in the way, numbers that went bad.
        TrainingInterruptedError: stopped by a signal, resumable.
    """
    session = open_session(config, out, console, resume)
    plan, run, console = session.plan, session.run, session.console
    if run.result.is_file():
        finished = run.read_result()
        if finished.data.get("sha256") != session.data.sha256:
            raise PHAError(f"{out} is finished, on other data; choose another --out")
        console.print(f"{out} is finished; its result.json is as it was", soft_wrap=True)
        return finished if session.accelerator.is_main_process else None
    print_plan(session)
    needed = plan.weights_bytes + plan.activation_bytes + plan.carried_bytes
    if needed > plan.free_bytes:
        raise PHAError(
            f"this needs about {memory(needed)} and "
            f"{memory(plan.free_bytes)} is free; lower data.sequence_length or use a smaller preset"
        )
    repeatable = deterministic(session.config.run.deterministic)
    with _alone(session), writing(out), _enough_memory(), repeatable:
        progress = _train(session)
        result = finish(session, progress) if session.accelerator.is_main_process else None
        session.accelerator.wait_for_everyone()
    return result


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    """Says what to change where memory runs out; the last checkpoint stays as it is."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise PHAError(
            "there is not enough memory: set run.gradient_checkpointing true, or lower "
            "run.micro_batch or data.sequence_length, or use a smaller preset"
        ) from error


@contextlib.contextmanager
def _alone(session: Session) -> Iterator[None]:
    """Hold the run folder for all processes of this run.

    Raises:
        PHAError: another run holds it, or has left another configuration there meanwhile.
    """
    with contextlib.ExitStack() as held:
        refused = [""]
        if session.accelerator.is_main_process:
            try:
                held.enter_context(session.run.lock())
                require_same_run(session.run, session.config.to_dict())
            except PHAError as error:
                refused = [str(error)]
        broadcast_object_list(refused)
        if refused[0]:
            raise PHAError(refused[0])
        yield


def _train(session: Session) -> Progress:
    plan, run, data, accelerator = session.plan, session.run, session.data, session.accelerator
    # As it was asked for, or was first chosen: on more devices a share may be less.
    micro = session.config.run.micro_batch or plan.micro_batch
    config = replace(session.config, run=replace(session.config.run, micro_batch=micro))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    elif accelerator.device.type == "cuda":
        # The products that planning measures take 0.8 GB, more than a small run.
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    accelerator.wait_for_everyone()  # all have looked at the folder before anything appears in it
    model, tokenizer = make_model(config), data.tokenizer()
    # So that generation from a saved model ends where a document does.
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    trainer = Trainer(config, plan, run, model, tokenizer, data, accelerator, session.console)
    if trainer.resume():
        if trainer.progress.data_sha256 != data.sha256:
            raise PHAError(f"{data.name} is not the data that {run.path} was trained on")
        session.console.print(f"continuing after step {trainer.progress.step}", highlight=False)
    trainer.progress.data_sha256 = data.sha256
    if accelerator.is_main_process:  # only now, as a refusal changes nothing of a run that is there
        write_text(run.config, yaml.safe_dump(config.to_dict(), sort_keys=False))
    start_trackers(accelerator, config, run)
    progress = trainer.train()
    if config.run.trackers:
        accelerator.end_training()
    return progress
