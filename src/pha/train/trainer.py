"""The training loop, one for every model: on Accelerate, exact to resume, careful with numbers."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerFast

from pha.loading import LanguageModel
from pha.modeling import PHAForCausalLM
from pha.results import EvalRecord, MixingRecord, Scores, TrainRecord, WarningRecord
from pha.runs import RunFolder
from pha.train.batches import BatchFeed, dropout_seed
from pha.train.carry import Carried
from pha.train.checkpoint import (
    CARRIED,
    DamagedError,
    Progress,
    load_checkpoint,
    set_aside,
)
from pha.train.config import TrainConfig
from pha.train.data import TrainingData
from pha.train.diagnose import first_bad_gradient, first_bad_value
from pha.train.hang import no_hang
from pha.train.optim import Schedule, make_optimizer, set_rate
from pha.train.plan import Plan
from pha.train.saving import Saver
from pha.train.sharding import mixing_of, shard, whole
from pha.train.split import SequenceSplit
from pha.train.trackers import MetricsWriter
from pha.train.watch import Watch
from pha.train.windows import windowed
from pha.utils.compiling import compile_blocks, compile_errors
from pha.utils.errors import PHAError, TrainingInterruptedError
from pha.utils.files import write_json
from pha.utils.hardware import autocast, peak_memory, synchronise
from pha.utils.progress import ProgressLine
from pha.utils.signals import exit_code, on_stop_signals
from pha.utils.text import count, duration


class Trainer:
    """One run, from its first or last step to its end.

    In `config` precision and micro-batch are no longer automatic. The model is initialised, in
    float32, on any device; its tokenizer is saved with it.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        run: RunFolder,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerFast,
        data: TrainingData,
        accelerator: Accelerator,
        console: Console,
    ) -> None:
        self.config, self.plan, self.run = config, plan, run
        self.tokenizer, self.data = tokenizer, data
        self.accelerator, self.console = accelerator, console
        # Of matrix products; the weights stay float32. No method, for with one the watch and this
        # would hold each other, and the memory of both after the run.
        self.autocast = partial(autocast, accelerator.device.type, config.run.precision)
        if config.run.compile:
            compile_blocks(model)
        if config.run.shards > 1:
            shard(model, config.run.shards, accelerator.device)
            self.model = model
        else:
            self.model = accelerator.prepare(model)
        self.optimizer = make_optimizer(model, config.optimizer)
        ranks = config.run.context_parallel
        self.split: SequenceSplit | None = None
        if ranks > 1:
            assert isinstance(model, PHAForCausalLM)
            model.model.require_pieces()
            self.split = SequenceSplit(ranks, config.data.sequence_length)
        share = config.run.global_batch * ranks // accelerator.num_processes
        first = accelerator.process_index // ranks * share
        self.feed = BatchFeed(
            data.sampler(config),
            [
                (start, min(start + plan.micro_batch, first + share))
                for start in range(first, first + share, plan.micro_batch)
            ],
            accelerator.device,
            gather=not config.run.compile and ranks == 1,
        )
        self.carried: Carried | None = None
        if config.data.carry != "none":
            self.carried = Carried(config, self.feed.pieces, accelerator.device)
        self.schedule = Schedule(config.schedule, config.optimizer.learning_rate, plan.steps)
        self.progress = Progress()
        self.watch: Watch | None = None
        plain = self.plain_model
        # Sharded weights are whole only where every process asks for them.
        watched = config.run.watch_every and (config.run.shards > 1 or self._main)
        if watched and isinstance(plain, PHAForCausalLM):
            tokens = config.run.global_batch * config.data.sequence_length
            self.watch = Watch(plain, config.run.watch_every, tokens, self.autocast)
        self.saver = Saver(run, plain, self.optimizer, tokenizer, self._main)
        self.stop_requested = 0  # by the signal of this number

    @property
    def plain_model(self) -> LanguageModel:
        """The model without what Accelerate may have wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def _main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def resume(self) -> bool:
        """Continue from the newest checkpoint that is whole, if there is any.

        A damaged one is named and set aside.

        Raises:
            PHAError: all are damaged, or it belongs to another model.
        """
        damaged: dict[Path, DamagedError] = {}
        for step in reversed(self.run.checkpoint_steps()):
            folder = self.run.checkpoint(step)
            try:
                self.progress = load_checkpoint(folder, self.plain_model, self.optimizer)
            except DamagedError as error:
                damaged[folder] = error
                continue
            self.accelerator.wait_for_everyone()  # all have looked
            for bad, what in damaged.items():
                self.console.print(
                    f"warning: {what}; it is set aside", soft_wrap=True, markup=False
                )
                if self._main:
                    set_aside(bad)
            if self.carried is not None:
                self.carried.load_state(load_file(folder / CARRIED))
            self.schedule.load_state(self.progress.schedule)
            if self.watch is not None:
                self.watch.load_state(self.progress.watch)
            return True
        if damaged:
            raise PHAError(
                f"{next(iter(damaged.values()))}, and no other is whole: put back a copy, or "
                f"delete {self.run.checkpoints} to begin anew"
            )
        return False

    def train(self) -> Progress:
        """Take the steps that are left; checkpoint, evaluate and log on the way.

        Raises:
            TrainingInterruptedError: after a stop signal, with a checkpoint written.
            PHAError: the loss or a gradient is not finite; the last checkpoint stays as it was.
        """
        run, plan, progress = self.config.run, self.plan, self.progress
        evaluate_every = run.evaluate_every or max(1, math.ceil(plan.steps / run.evaluations))
        checkpoint_every = run.checkpoint_every or evaluate_every
        if self._main:
            self.run.diverged.unlink(missing_ok=True)
        metrics = MetricsWriter(self.run.metrics, progress.metrics_bytes, self.accelerator)
        matmul = plan.matmul_flops * self.accelerator.num_processes
        tokens_per_step = run.global_batch * self.config.data.sequence_length
        # Of the steps since the last record, and what took how long since then or the resumption.
        losses = [torch.tensor(x, device=self.accelerator.device) for x in progress.losses]
        logged_step, logged_at = progress.step, progress.seconds
        data_logged_at = progress.data_seconds
        self.feed.waited = progress.data_seconds
        self.model.train()
        with (
            self.saver,
            metrics,
            self.feed,
            on_stop_signals(self._request_stop),
            no_hang(run.timeout, lambda: progress.step),
            ProgressLine(self.console) as display,
        ):
            self._show(display, "")
            if progress.step == 0:
                self._write_mixing(metrics)
            while progress.step < plan.steps:
                self.saver.check()
                begin = time.perf_counter()
                rate = self.schedule.rate(progress.step)
                with windowed(self.plain_model.config, run.windows, run.seed, progress.step):
                    loss, norm = self._step(progress.step, rate)
                losses.append(loss)
                progress.step += 1
                progress.tokens += tokens_per_step
                last = progress.step == plan.steps
                self._report(metrics, display)
                log = progress.step % run.log_every == 0 or last
                evaluation = progress.step % evaluate_every == 0 or last
                stop = self._agree_to_stop(log)
                checkpoint = progress.step % checkpoint_every == 0 or last or stop
                if log or evaluation or checkpoint:
                    synchronise(self.accelerator.device)
                progress.seconds += time.perf_counter() - begin
                progress.data_seconds = self.feed.waited
                if log:
                    mean = float(torch.stack(losses).mean())
                    seconds = progress.seconds - logged_at
                    speed = (progress.step - logged_step) * tokens_per_step / seconds
                    use = speed * plan.flops_per_token / matmul
                    record = TrainRecord(
                        step=progress.step,
                        tokens=progress.tokens,
                        loss=mean,
                        learning_rate=rate,
                        grad_norm=float(norm),
                        tokens_per_second=speed,
                        utilisation=use,
                        data_wait=(progress.data_seconds - data_logged_at) / seconds,
                        seconds=progress.seconds,
                    )
                    metrics.write(record)
                    left = (plan.steps - progress.step) * tokens_per_step / speed
                    perplexity = f"{math.exp(mean):.1f}" if mean < 20 else "-"
                    status = (
                        f"  loss {mean:.3f}  ppl {perplexity}  {count(speed)} tok/s  "
                        f"{use:.0%} of matmul  {duration(left)} left"
                        f"{self.watch.status if self.watch is not None else ''}"
                    )
                    self._show(display, status)
                    losses, logged_step, logged_at = [], progress.step, progress.seconds
                    data_logged_at = progress.data_seconds
                if evaluation:
                    self._evaluate(metrics, display)
                    stop = stop or self._agree_to_stop(log)
                if checkpoint or stop:
                    progress.losses = [float(x) for x in losses]
                    self._checkpoint(metrics)
                if stop:
                    self._finish_saving()
                    raise TrainingInterruptedError(
                        f"stopped after step {progress.step} of {plan.steps}; a checkpoint is "
                        "written, the same command continues from it",
                        exit_code(self.stop_requested),
                    )
            self._finish_saving()
        return progress

    def _report(self, metrics: MetricsWriter, display: ProgressLine) -> None:
        """Record what the watch saw in the step, and show what has begun to be wrong."""
        if self.watch is None:
            return
        for record in self.watch.records:
            metrics.write(record)
            if isinstance(record, WarningRecord):
                display.line(
                    f"{self.run.name}: step {record.step}: {record.what}: {record.message}"
                )

    def _show(self, display: ProgressLine, status: str) -> None:
        done, total = self.progress.step, self.plan.steps
        last = done == total
        display.show(self.run.name, f"step {done}/{total}{status}", done / total, is_last=last)

    def _step(self, step: int, rate: float) -> tuple[Tensor, Tensor]:
        """One optimiser step: the mean loss over the global batch and the gradient's norm.

        Raises:
            PHAError: one of them is not finite; nothing is updated.
        """
        accelerator, run = self.accelerator, self.config.run
        total = torch.zeros((), device=accelerator.device)
        last = len(self.feed.pieces) - 1
        for piece, (first, _) in enumerate(self.feed.pieces):
            inputs = self.feed.get(step, piece)
            labels = inputs.pop("labels")
            part = 0
            if self.split is not None:
                inputs = self.split.cut(inputs)
                part = self.split.pieces.rank
            # Dropout is a pure function of the seed and of which sequences these are, in whichever
            # process: no generator has a state.
            seed = dropout_seed(run.seed, step * run.global_batch + first, part)
            if piece == 0 and self.watch is not None:
                torch.manual_seed(seed)  # as it would go on from where the last step left it
                self.watch.before(step + 1, inputs)
            given = inputs
            if self.carried is not None:
                given = self.carried.enter(step, piece, inputs)
            if self.split is not None:
                given = inputs | {"past_key_values": self.split.past()}
            torch.manual_seed(seed)
            with self._adding_up(piece == last):
                total += self._backward(given, labels)
            if self.carried is not None:
                self.carried.leave(piece, given)
        loss = accelerator.reduce(total, "mean")
        if self.watch is not None:
            self.watch.gradients()
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        clip = self.config.optimizer.gradient_clip or math.inf
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        # On a GPU this waits for the step; it is the only wait in it.
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            self._diverged(step, float(loss), given)
        if self.watch is not None:
            self.watch.after(step + 1, float(loss), inputs)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _adding_up(self, last: bool) -> AbstractContextManager[Any]:
        """Of the micro-batches of a step, processes add gradients up in the last alone.

        Sharded ones have to be added up within a group after each, as they are whole on no process.
        """
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_all_reduce(last)
        elif not last:
            return self.accelerator.no_sync(self.model)
        return nullcontext()

    def _backward(self, inputs: dict[str, Any], labels: int) -> Tensor:
        """Add the gradients of a micro-batch; its part of the mean loss over the global batch."""
        # Gradients are averaged over processes; the loss is a mean over all labels.
        items = labels / self.accelerator.num_processes
        with self.autocast(), compile_errors("run.compile"):
            loss: Tensor = self.model(**inputs, num_items_in_batch=items).loss
        self.accelerator.backward(loss)
        return loss.detach()

    def _diverged(self, step: int, loss: float, inputs: dict[str, Any]) -> None:
        model = self.plain_model
        # Not compiled, in which form no module shows its output.
        with self.autocast(), torch.compiler.set_stance("force_eager"):
            where = first_bad_value(model, **inputs) or first_bad_gradient(model) or "the loss"
        self.saver.wait()
        steps = self.run.checkpoint_steps()
        kept = f"{self.run.checkpoint(steps[-1])} is intact" if steps else "no checkpoint yet"
        where += " is not finite" + (self.watch.explain(step + 1) if self.watch is not None else "")
        if self._main:
            write_json(self.run.diverged, {"step": step + 1, "loss": str(loss), "where": where})
        raise PHAError(
            f"step {step + 1}: the loss is {loss:.4g} and {where}; nothing was "
            f"updated, {kept}. Lower optimizer.learning_rate or lengthen schedule.warmup_steps"
        )

    def _evaluate(self, metrics: MetricsWriter, display: ProgressLine) -> None:
        progress, accelerator = self.progress, self.accelerator
        result = self.data.validate(
            self.plain_model,
            self.config.run.precision,
            max_tokens=self.config.run.evaluate_tokens,
            share=(accelerator.process_index, accelerator.num_processes),
            reduce=lambda sums: accelerator.reduce(sums.to(accelerator.device), "sum").cpu(),
        )
        scores = {each.name: getattr(result, each.name) for each in fields(Scores)}
        metrics.write(
            EvalRecord(step=progress.step, tokens=progress.tokens, seconds=result.seconds, **scores)
        )
        self._write_mixing(metrics)
        display.note(
            f"{self.run.name}: step {progress.step}: validation perplexity "
            f"{result.perplexity:.2f}, accuracy {result.accuracy:.1%}",
            is_last=progress.step == self.plan.steps,
        )
        if not math.isfinite(result.loss):
            raise PHAError(f"step {progress.step}: the validation loss is {result.loss}")
        self.schedule.observe(result.perplexity)
        rank = progress.rank(result.perplexity, self.config.run.keep_best)
        if rank is None:
            return
        several = self.config.run.keep_best > 1
        self.saver.save_model(progress.step, several, best=rank == 0)

    def _finish_saving(self) -> None:
        """Wait, in all processes, until everything is written."""
        self.saver.wait()
        self.accelerator.wait_for_everyone()

    def _write_mixing(self, metrics: MetricsWriter) -> None:
        model, at = self.plain_model, self.progress
        if isinstance(model, PHAForCausalLM):  # no other has any
            metrics.write(MixingRecord(step=at.step, tokens=at.tokens, layers=mixing_of(model)))

    def _checkpoint(self, metrics: MetricsWriter) -> None:
        progress = self.progress
        progress.peak_memory = max(progress.peak_memory, peak_memory(self.accelerator.device))
        progress.schedule = self.schedule.state()
        progress.watch = self.watch.state() if self.watch is not None else {}
        progress.metrics_bytes = metrics.flush()
        carried = None
        if self.carried is not None:  # of the rows of all processes
            carried = self.accelerator.gather(self.carried.state())
        self.saver.save_checkpoint(progress, self.config.run.keep_checkpoints, carried)

    def _request_stop(self, number: int) -> None:
        self.stop_requested = number

    def _agree_to_stop(self, log: bool) -> bool:
        """Whether any process was asked to stop; all of them then stop after the same step.

        On several GPUs they ask each other only where they wait anyway, at a step that is logged.
        """
        if self.accelerator.num_processes == 1:
            return bool(self.stop_requested)
        if self.accelerator.device.type == "cuda" and not log:
            return False
        asked = torch.tensor(float(bool(self.stop_requested)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)
