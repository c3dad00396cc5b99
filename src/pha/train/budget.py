"""As many steps as a time allows, by the speed that a few of them are measured at."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.console import Console

from pha.runs import RunFolder
from pha.train.config import TrainConfig
from pha.train.run import run_training
from pha.utils.errors import PHAError
from pha.utils.progress import make_console
from pha.utils.text import duration

UNITS = {"s": 1, "min": 60, "h": 3600}
TRIAL = 0.05
"""Of the time, at most, that is spent on finding the speed."""

_FIRST, _MOST = 4, 50  # steps of a trial


def read_seconds(text: str) -> float:
    """Seconds of `20min`, `90s` or `2h`.

    Raises:
        PHAError: another form, or no time.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", text.strip())
    if found is None or float(found[1]) == 0:
        raise PHAError(f"--budget {text}: give a time such as 20min, 90s or 2h")
    return float(found[1]) * UNITS[found[2]]


def fit_budget(config: TrainConfig, out: Path, seconds: float, console: Console) -> TrainConfig:
    """The run with as many steps as fit into a time, its evaluations and its test counted.

    A run that has begun keeps the steps that it began with, so that it goes on exactly.

    Args:
        config: the run; its length is replaced.
        out: its folder.
        seconds: in all, the trial counted.
        console: for what was found.

    Raises:
        PHAError: no step fits, several processes, or what `run_training` raises.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PHAError("--budget measures one process; with several give run.steps")
    begun = RunFolder(out).read_config().get("run", {}).get("steps")
    if begun is not None:
        if type(begun) is not int:
            raise PHAError(f"{RunFolder(out).config} is damaged: run.steps is {begun!r}")
        console.print(f"{out} has begun with {begun} steps", highlight=False, soft_wrap=True)
        return _with_steps(config, begun)
    begin = time.monotonic()
    steps = _FIRST
    while True:
        step, rest = _measure(_with_steps(config, steps))
        spent = time.monotonic() - begin
        more = int((TRIAL * seconds - spent) / (step * 2))
        if more <= steps or steps >= _MOST:
            break
        steps = min(more, _MOST)
    left = seconds - spent - rest
    fitted = int(left / step)
    if fitted < 1:
        raise PHAError(
            f"a step takes {step:.2g} s and evaluations {rest:.2g} s; give a longer --budget, or "
            "lower run.evaluations, run.evaluate_tokens or run.global_batch"
        )
    console.print(
        f"budget     {duration(seconds)}: {fitted} steps of {step * 1e3:.3g} ms, "
        f"{duration(rest)} for evaluations, {duration(spent)} for finding out",
        highlight=False,
        soft_wrap=True,
    )
    return _with_steps(config, fitted)


def _with_steps(config: TrainConfig, steps: int) -> TrainConfig:
    return replace(config, run=replace(config.run, steps=steps, epochs=None, flops=None))


def _measure(config: TrainConfig) -> tuple[float, float]:
    """Seconds of a step, and of all that the run does besides, by a run that is thrown away."""
    made = 1 if config.run.average_best == 1 else 2  # evaluations, as one cannot be averaged
    run = replace(config.run, log_every=1, evaluate_every=None, evaluations=made, trackers=[])
    with TemporaryDirectory() as folder:
        place = RunFolder(Path(folder) / "trial")
        begin = time.monotonic()
        run_training(replace(config, run=run), place.path, make_console(quiet=True))
        whole = time.monotonic() - begin
        records = place.read_metrics().train
        speeds = [record.tokens_per_second for record in records[1:]]
        tokens = records[0].tokens
        evaluation = place.read_metrics().eval[-1].seconds
    step = tokens / median(speeds)
    rest = max(0.0, whole - step * len(records))
    every = config.run.evaluate_every
    if every is not None:
        return step + evaluation / every, rest
    return step, rest + (config.run.evaluations - made) * evaluation
