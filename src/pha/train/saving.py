"""What a run keeps is written while it trains on: each folder whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from pha.foreign import ForeignModel
from pha.loading import LanguageModel
from pha.runs import RunFolder
from pha.train.checkpoint import CARRIED, FORMAT, MOMENTS, Progress, digest, steps_needed
from pha.train.sharding import shallow_copy, whole
from pha.utils.files import atomic_folder, copy_folder, remove_folder, sha256_file, write_json


class Snapshot:
    """A model as it is now, copied to the host's memory.

    Every process takes one, as sharded weights are gathered for it; only one keeps the copy.

    Args:
        model: sharded or not.
        tokenizer: saved with it.
        keep: whether to keep the copy.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: PreTrainedTokenizerFast, keep: bool = True
    ) -> None:
        self.tokenizer, self.keep = tokenizer, keep
        inner = model.inner if isinstance(model, ForeignModel) else model
        # Settings may change from step to step.
        self.model = shallow_copy(inner)
        self.model.config = copy.deepcopy(inner.config)
        copies: dict[int, Tensor] = {}  # of tied weights there is one
        weights = inner.state_dict(keep_vars=True).items()
        for _, x in weights:
            if id(x) not in copies:
                copies[id(x)] = self.copy(x)
        self.weights = {name: copies[id(x)] for name, x in weights}

    def copy(self, tensor: Tensor) -> Tensor:
        """All of a tensor in the host's memory, or nothing where no copy is kept."""
        all_of_it = whole(tensor.detach())
        return all_of_it.to("cpu", copy=True) if self.keep else tensor.new_empty(0)

    def write(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` reads, atomically."""
        with atomic_folder(folder) as temporary:
            self.write_into(temporary)

    def write_into(self, folder: Path) -> None:
        """Write weights, configuration and tokenizer into a folder that is there."""
        # A bar for each of many small files would tear the progress line of the run apart.
        logging.disable_progress_bar()
        self.model.save_pretrained(folder, state_dict=dict(self.weights))  # which empties it
        self.tokenizer.save_pretrained(folder)


def moments_of(
    model: LanguageModel, optimizer: torch.optim.Optimizer, snapshot: Snapshot
) -> dict[str, Tensor]:
    """Copies of what the optimiser keeps, by `PARAMETER.NAME`."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}.{key}": snapshot.copy(x)
        for p, kept in optimizer.state.items()
        for key, x in kept.items()
    }


def save_checkpoint(
    run: RunFolder,
    snapshot: Snapshot,
    moments: dict[str, Tensor],
    progress: Progress,
    keep: int,
    carried: dict[str, Tensor] | None = None,
) -> None:
    """Write `checkpoints/step-N` and delete all but the newest `keep`.

    `carried` is what the rows of this step leave to the next ones, by name, if they do.
    """
    with atomic_folder(run.checkpoint(progress.step)) as folder:
        snapshot.write_into(folder)
        save_file(moments, folder / MOMENTS)
        if carried is not None:
            save_file(carried, folder / CARRIED)
        files = {f.name: sha256_file(f) for f in sorted(folder.iterdir()) if f.is_file()}
        content = {"format": FORMAT, "progress": asdict(progress), "sha256": files}
        write_json(folder / "trainer.json", content | {"digest": digest(content)})
    for step in run.checkpoint_steps()[:-keep]:
        remove_folder(run.checkpoint(step))


class Saver:
    """Writes one thing after the other in a thread of the main process; a context manager.

    Args:
        run: where.
        model: that trains, sharded or not.
        optimizer: its optimiser.
        tokenizer: saved with it.
        main: whether this is the main process. All processes have to call the same methods.
    """

    def __init__(
        self,
        run: RunFolder,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerFast,
        main: bool,
    ) -> None:
        self.run, self.model, self.optimizer = run, model, optimizer
        self.tokenizer, self.main = tokenizer, main
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self.jobs: list[Future[None]] = []
        self.failed = False
        self.snapshot: tuple[int, Snapshot] | None = None  # and the step that it was taken after

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown()
        if kind is None:
            self.wait()

    def save_model(self, step: int, several: bool, best: bool) -> None:
        """Keep the weights as `run.model`, or as one of `several` of which `best` is copied there.

        Raises:
            OSError: what was started before could not be written; so of the other methods.
        """
        snapshot, run = self._take(step), self.run
        folder = run.best_model(step) if several else run.model

        def job() -> None:
            snapshot.write(folder)
            if several and best:
                copy_folder(folder, run.model)

        self._start(job)

    def save_checkpoint(
        self, progress: Progress, keep: int, carried: dict[str, Tensor] | None
    ) -> None:
        """Keep all that the run needs to go on from here; see `save_checkpoint` above."""
        snapshot, run = self._take(progress.step), self.run
        moments = moments_of(self.model, self.optimizer, snapshot)
        if carried is not None:
            carried = {name: snapshot.copy(x) for name, x in carried.items()}
        reached = copy.deepcopy(progress)

        def job() -> None:
            save_checkpoint(run, snapshot, moments, reached, keep, carried)
            # Only now: until this checkpoint was whole, a resumed run might have needed them.
            for step in set(run.best_steps()) - steps_needed(run):
                remove_folder(run.best_model(step))

        self._start(job)

    def check(self) -> None:
        """Raise what has gone wrong, without waiting; let go of what is written."""
        if all(job.done() for job in self.jobs):
            self.wait()
            self.snapshot = None

    def wait(self) -> None:
        """Until all is written; raise what has gone wrong."""
        for job in self.jobs:
            job.result()
        self.jobs = []

    def _take(self, step: int) -> Snapshot:
        """The model after this step, copied once for all that is saved of it."""
        if self.snapshot is None or self.snapshot[0] != step:
            self.wait()  # there is room for one copy
            self.snapshot = step, Snapshot(self.model, self.tokenizer, self.main)
        return self.snapshot[1]

    def _start(self, job: Callable[[], None]) -> None:
        if self.main:
            self.jobs.append(self.thread.submit(self._run, job))

    def _run(self, job: Callable[[], None]) -> None:
        if self.failed:  # as what follows may rest on what was not written
            return
        try:
            job()
        except BaseException:
            self.failed = True
            raise
