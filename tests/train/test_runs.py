"""Whole runs: what they write, and that stopping them anywhere changes nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import platform
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pha.cli import main
from pha.data import TokenStore, prepare
from pha.runs import RunFolder
from pha.train import trainer as trainer_module
from pha.utils.errors import PHAError, TrainingInterruptedError
from pha.utils.files import write_json
from pha.utils.formats import read_json
from tests.train.conftest import Train, arguments

TIMES = {"seconds", "tokens_per_second", "utilisation", "data_wait"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def timeless(run: RunFolder) -> list[dict[str, Any]]:
    records = [record for kind in vars(run.read_metrics()).values() for record in kind]
    return [{k: v for k, v in vars(record).items() if k not in TIMES} for record in records]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Behave as if a SIGINT had come during step number `steps`."""
    original = trainer_module.Trainer._step

    def step(self: Any, number: int, rate: float) -> Any:
        self.stop_requested = number + 1 == steps
        return original(self, number, rate)

    monkeypatch.setattr(trainer_module.Trainer, "_step", step)


def test_a_run_learns_and_writes_what_it_promises(train_small: Train, tmp_path: Path) -> None:
    result = train_small(run__steps=60, run__evaluate_every=20)
    run = RunFolder(tmp_path / "run")
    losses = [r.loss for r in run.read_metrics().train]
    assert len(losses) == 60
    shares = [r.data_wait or 0.0 for r in run.read_metrics().train]
    ends = [r.seconds for r in run.read_metrics().train]
    waits = [s * (b - a) for s, a, b in zip(shares, [0.0, *ends], ends, strict=False)]
    assert 0 < min(shares) < max(shares) < 1
    assert result.data_wait == pytest.approx(sum(waits) / result.seconds)
    assert losses[-1] < 0.75 * losses[0]
    assert [r.step for r in run.read_metrics().eval] == [20, 40, 60]
    assert [r.step for r in run.read_metrics().mixing] == [0, 20, 40, 60]
    assert run.checkpoint_steps() == [40, 60]
    assert result == run.read_result()
    assert result.tokens_seen == 60 * 4 * 32
    assert [e.split for e in result.evaluations] == ["test"]
    assert result.provenance["precision"] == "fp32"
    assert len(result.samples) == 2
    config = yaml.safe_load(run.config.read_text())
    assert config["run"]["micro_batch"] == 4
    assert config["model"]["vocab_size"] == 257
    best = min(run.read_metrics().eval, key=lambda r: r.perplexity)
    assert result.chosen_step == best.step
    assert result.best_validation_perplexity == best.perplexity
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert model.config.model_type == "pha"
    assert train_small(run__steps=60, run__evaluate_every=20) == result


@pytest.mark.parametrize(("kind", "log_every"), [("adamw", 1), ("muon", 4)])
def test_interrupted_and_resumed_equals_uninterrupted(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, log_every: int
) -> None:
    # Looks of the watch after each stop would show what it depends on, dropout too.
    changes = {"optimizer__kind": kind, "run__log_every": log_every, "run__watch_every": 1}
    train_small = partial(train_small, **changes)
    train_small("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(TrainingInterruptedError, match="step 3 of 8"):
            train_small("cut")
    assert RunFolder(tmp_path / "cut").checkpoint_steps() == [3]
    # What a kill may leave behind: lines of steps that no checkpoint holds.
    with RunFolder(tmp_path / "cut").metrics.open("a") as file:
        file.write('{"kind": "train", "step": 4}\n')
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(TrainingInterruptedError):
            train_small("cut")
    train_small("cut")
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    assert_same_weights(whole.checkpoint(8), cut.checkpoint(8))
    assert_same_weights(whole.model, cut.model)
    assert timeless(whole) == timeless(cut)
    kept = [load_file(r.checkpoint(8) / "optimizer.safetensors") for r in (whole, cut)]
    assert kept[0].keys() == kept[1].keys()
    for place, value in kept[0].items():
        assert torch.equal(value, kept[1][place])


def start(store: TokenStore, out: Path, **changes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pha", "train", "pha-tiny.text", "--out", str(out)]
    command += arguments(store, run__epochs="null", **changes)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_checkpoint(run: RunFolder, process: subprocess.Popen[str]) -> None:
    deadline, before = time.monotonic() + 120, run.checkpoint_steps()
    while run.checkpoint_steps() == before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow  # test_kill_anywhere stops runs in these ways too
def test_a_run_killed_in_every_way_resumes_bit_for_bit(
    train_small: Train, store: TokenStore, tmp_path: Path
) -> None:
    changes = {"run__steps": 240, "run__checkpoint_every": 5, "run__evaluate_every": 120}
    train_small("whole", **changes)
    run = RunFolder(tmp_path / "killed")
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        process = start(store, run.path, **changes)
        wait_for_checkpoint(run, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if number != signal.SIGKILL:
            assert process.returncode == (130 if number == signal.SIGINT else 75)
            assert "continues from it" in errors
            assert "Traceback" not in errors
        assert not run.result.exists()
    train_small("killed", **changes)
    whole = RunFolder(tmp_path / "whole")
    assert_same_weights(whole.checkpoint(240), run.checkpoint(240))
    assert timeless(whole) == timeless(run)


def test_accumulation_does_not_change_the_steps(train_small: Train, tmp_path: Path) -> None:
    for name, micro in (("1x4", 4), ("4x1", 1), ("3+1", 3)):
        train_small(name, run__micro_batch=micro, model__dropout=0.0)
    reference = weights(tmp_path / "1x4" / "checkpoints" / "step-8")
    for name in ("4x1", "3+1"):
        other = weights(tmp_path / name / "checkpoints" / "step-8")
        # Sums over a batch are associated differently; AdamW divides by small second moments.
        for key, value in reference.items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(
    train_small: Train, store: TokenStore, tmp_path: Path
) -> None:
    train_small("one", run__micro_batch=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "pha", "train", "pha-tiny.text", "--out", str(tmp_path / "two"), "--json"]
    command += arguments(store, run__epochs="null", run__micro_batch=2)
    # Nothing but torchrun says that these belong together, with or without a GPU.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["provenance"]["processes"] == 2
    one, two = (RunFolder(tmp_path / name) for name in ("one", "two"))
    a, b = weights(one.checkpoint(8)), weights(two.checkpoint(8))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-4, atol=2e-5)
    for x, y in zip(one.read_metrics().eval, two.read_metrics().eval, strict=True):
        assert x.loss == pytest.approx(y.loss, rel=1e-5)


def test_processes_that_do_not_find_each_other_are_refused(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_small("before")  # after which Accelerate knows that this process is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PHAError, match="2 processes were started and 1 joined"):
        train_small("run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_until_it_is_free(train_small: Train, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with run.lock():
        before = sorted(run.path.rglob("*"))
        with pytest.raises(PHAError, match=f"in use by process {os.getpid()} on "):
            train_small()
        assert sorted(run.path.rglob("*")) == before
    train_small()
    assert run.result.is_file()


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_lock(train_small: Train, tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from pha.runs import RunFolder\n"
    code += "with RunFolder(Path(sys.argv[1])).lock(): print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(PHAError, match=f"in use by process {holder.pid} on "):
            train_small()
        holder.kill()
    train_small()


def test_not_a_number_stops_with_a_name_and_keeps_the_checkpoint(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer_module.Trainer._step

    def poisoned(self: Any, number: int, rate: float) -> Any:
        if number == 5:
            with torch.no_grad():
                self.plain_model.model.layers[1].branches["gss"].W_C.weight[0, 0] = float("nan")
        return original(self, number, rate)

    monkeypatch.setattr(trainer_module.Trainer, "_step", poisoned)
    with pytest.raises(PHAError) as error:
        train_small()
    assert "layers.1.branches.gss.W_C.weight" in str(error.value)
    assert "step-4 is intact" in str(error.value)
    kept = weights(RunFolder(tmp_path / "run").checkpoint(4))
    assert all(bool(value.isfinite().all()) for value in kept.values())


@pytest.mark.parametrize("bad_step", [4, 7])
def test_a_bad_step_updates_nothing(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_step: int
) -> None:
    original = trainer_module.Trainer._backward
    trainers: list[Any] = []
    before: dict[str, torch.Tensor] = {}

    def backward(self: Any, inputs: Any, labels: int) -> torch.Tensor:
        loss = original(self, inputs, labels)
        if self.progress.step == bad_step and not trainers:
            trainers.append(self)
            before.update({n: p.clone() for n, p in self.plain_model.named_parameters()})
            next(self.plain_model.parameters()).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(trainer_module.Trainer, "_backward", backward)
    with pytest.raises(PHAError, match=rf"^step {bad_step + 1}: .*step-4 is intact"):
        train_small(run__log_every=100)
    [trainer] = trainers
    for name, parameter in trainer.plain_model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert RunFolder(tmp_path / "run").checkpoint_steps() == [4]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_damaged_checkpoint_is_refused_in_one_line(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(TrainingInterruptedError):
            train_small()
    file = RunFolder(tmp_path / "run").checkpoint(4) / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(PHAError) as error:
        train_small()
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    train_small: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    train_small("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(TrainingInterruptedError):
            train_small("cut")
    run = RunFolder(tmp_path / "cut")
    assert run.checkpoint_steps() == [4, 6]
    file = run.checkpoint(6) / name
    content = bytearray(file.read_bytes())
    where = content.index(b'"tokens": ') + 10 if name == "trainer.json" else len(content) // 2
    content[where] ^= 1
    file.write_bytes(content)
    said = io.StringIO()
    train_small("cut", console=Console(file=said))
    assert f"warning: checkpoint {run.checkpoint(6)} is damaged: {name}" in said.getvalue()
    assert "continuing after step 4" in said.getvalue()
    assert (run.checkpoints / "step-6.damaged").is_dir()
    assert_same_weights(RunFolder(tmp_path / "whole").model, run.model)
    assert timeless(RunFolder(tmp_path / "whole")) == timeless(run)


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have files of this name be written in part, and then fail as on a full disk."""
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_said_in_a_line_and_the_checkpoint_before_stays(
    train_small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_small("whole")
    run = RunFolder(tmp_path / "cut")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(TrainingInterruptedError):
            train_small("cut")
    before = sorted(run.path.rglob("*"))
    with monkeypatch.context() as patch:
        full_disk(patch, "optimizer.safetensors")
        with pytest.raises(PHAError, match=r"cut cannot be written \(No space left on device\)"):
            train_small("cut")
    # The weights of the evaluation at step 4 were whole.
    assert sorted(p for p in run.path.rglob("*") if run.model not in p.parents) == [
        p for p in (*before, run.model) if run.model not in p.parents
    ]
    train_small("cut")
    assert_same_weights(RunFolder(tmp_path / "whole").model, run.model)


def test_memory_that_runs_out_says_what_to_change(
    train_small: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(*_: Any) -> torch.Tensor:
        return torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(trainer_module.Trainer, "_backward", backward)
    with pytest.raises(PHAError, match=r"not enough memory: set run\.gradient_checkpointing true"):
        train_small()


def test_files_of_others_are_not_replaced(train_small: Train, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / "notes.txt").touch()
    run.metrics.write_text("mine")
    with pytest.raises(PHAError, match=r"is no training run and holds metrics\.jsonl"):
        train_small()
    assert run.metrics.read_text() == "mine"
    run.metrics.unlink()
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "theirs").touch()
    run.model.symlink_to(disk)
    with pytest.raises(PHAError, match="holds model, which training would replace"):
        train_small()
    (disk / "theirs").unlink()
    left = tmp_path / f".{platform.node()}-{os.getppid()}.tmp.disk"  # by a kill, beside its target
    left.mkdir()
    train_small()
    assert not left.exists()
    assert run.model.is_symlink()
    assert (disk / "model.safetensors").is_file()
    assert (run.path / "notes.txt").is_file()


def test_files_have_the_modes_that_the_umask_gives(train_small: Train, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train_small(run__keep_best=2, run__average_best=2)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*")}
    assert modes == {0o640, 0o750}


def test_another_configuration_or_other_data_is_refused(
    train_small: Train,
    store: TokenStore,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_after(monkeypatch, 4)
    with pytest.raises(TrainingInterruptedError):
        train_small()
    with pytest.raises(PHAError, match=r"optimizer\.learning_rate"):
        train_small(optimizer__learning_rate=0.5)
    with pytest.raises(PHAError, match="not empty"):
        train_small(resume="never")
    copy = tmp_path / "text"
    copy.mkdir()
    for file in text_folder.iterdir():
        (copy / file.name).write_text(file.read_text() + "more.\n")
    other = prepare(str(copy), "bytes", tmp_path / "store")
    before = RunFolder(tmp_path / "run").config.read_text()
    with pytest.raises(PHAError, match="is not the data"):
        train_small(data__store=str(other.path))
    assert RunFolder(tmp_path / "run").config.read_text() == before
    monkeypatch.undo()
    train_small()
    with pytest.raises(PHAError, match="finished, on other data"):
        train_small(data__store=str(other.path))
    result = RunFolder(tmp_path / "run").result
    write_json(result, read_json(result) | {"data": {}})
    with pytest.raises(PHAError, match="finished, on other data"):
        train_small()


def test_init_from_starts_from_its_weights(
    train_small: Train,
    store: TokenStore,
    text_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = train_small("first", run__steps=40, run__evaluate_every=40)
    train_small("second", run__init_from=str(tmp_path / "first"), run__steps=1)
    start_loss = RunFolder(tmp_path / "second").read_metrics().train[0].loss
    assert start_loss < first.evaluations[0].loss + 0.3
    other = prepare(str(text_folder), "bpe:280", tmp_path / "bpe")
    with pytest.raises(PHAError, match="tokenizer"):
        train_small("third", run__init_from=str(tmp_path / "first"), data__store=str(other.path))
    words = ["--init-from", str(tmp_path / "first"), "--data", str(store.path)]
    with pytest.raises(SystemExit) as stop:
        main(["train", "pha-tiny.text", *words, "--model.hidden_size", "32"])
    assert stop.value.code == 2
    assert "model.hidden_size: the model is that of" in capsys.readouterr().err


def test_a_key_that_a_run_does_not_have_yet_had_its_default(
    train_small: Train, tmp_path: Path
) -> None:
    result = train_small()
    run = RunFolder(tmp_path / "run")
    config = yaml.safe_load(run.config.read_text())
    assert config["optimizer"].pop("kind") == "adamw"
    run.config.write_text(yaml.safe_dump(config))
    assert train_small() == result
    with pytest.raises(PHAError, match=r"optimizer\.kind 'adamw', not 'muon'"):
        train_small(optimizer__kind="muon")


@pytest.mark.parametrize("seed", [20260101, 1 << 53])
def test_a_seed_may_be_large(train_small: Train, seed: int) -> None:
    assert train_small(run__seed=seed, run__steps=1).seed == seed


def test_too_little_data_is_refused(train_small: Train) -> None:
    with pytest.raises(PHAError, match=r"lower run\.global_batch"):
        train_small(run__global_batch=100000)


def test_a_micro_batch_is_at_most_a_share(train_small: Train, tmp_path: Path) -> None:
    """So a run may go on where there are more devices, each with fewer sequences."""
    expected = train_small("whole")
    found = train_small("more", run__micro_batch=9)
    assert found.evaluations[0].loss == expected.evaluations[0].loss
    kept = RunFolder(tmp_path / "more").read_config()["run"]["micro_batch"]
    assert kept == 9


def test_a_folder_with_the_configuration_of_something_else(
    train_small: Train, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for text, said in (
        ("run: fast\n", "not of a run of ours: run is no mapping"),
        ("run: {imports: null}\n", "run.imports is no list of names"),
        ("run: {imports: [5]}\n", "run.imports is no list of names"),
    ):
        (tmp_path / "run" / "config.yaml").write_text(text)
        with pytest.raises(PHAError, match=said):
            train_small()


def test_post_norm_and_sequential_and_plateau_train_too(train_small: Train) -> None:
    result = train_small("post", model__residual="post", model__deepnorm_init="true")
    assert result.mixing
    result = train_small(
        "sequential",
        model__preset="sequential-tiny",
        model__hidden_size=32,
        schedule__kind="plateau",
    )
    assert result.mixing == []


def test_tensorboard_mirrors_the_metrics(train_small: Train, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_small(run__trackers="[tensorboard]")
    assert any("optimizer.learning_rate" in p.read_text() for p in tmp_path.rglob("hparams.yml"))
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out*")).parent))
    events.Reload()
    shown = [e.value for e in events.Scalars("train/loss")]
    written = [r.loss for r in RunFolder(tmp_path / "run").read_metrics().train]
    assert shown == pytest.approx(written, rel=1e-6)


def test_epochs_count_whole_passes(train_small: Train, store: TokenStore) -> None:
    windows = (len(store.tokens("train")) - 1) // 32
    result = train_small(run__epochs=0.1, run__steps="null", run__evaluate_every=1000)
    assert result.steps == round(0.1 * (windows // 4))


def test_gradient_checkpointing_changes_no_step(train_small: Train, tmp_path: Path) -> None:
    train_small("plain")
    train_small("checkpointed", run__gradient_checkpointing="true")
    plain, checkpointed = RunFolder(tmp_path / "plain"), RunFolder(tmp_path / "checkpointed")
    assert_same_weights(plain.checkpoint(8), checkpointed.checkpoint(8))


@pytest.mark.slow
def test_bf16_trains_close_to_fp32(train_small: Train) -> None:
    changes = {"run__steps": 12, "run__evaluate_every": 12, "model__dropout": 0.0}
    full = train_small("fp32", **changes)
    half = train_small("bf16", run__precision="bf16", **changes)
    assert half.provenance["precision"] == "bf16"
    losses = [r.evaluations[0].loss for r in (full, half)]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


@pytest.fixture
def traced_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without generating code."""
    original = torch.nn.Module.compile

    def compile_traced(self: torch.nn.Module, **options: Any) -> None:
        original(self, **{"backend": "aot_eager"} | options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", compile_traced)


def test_a_compiled_run_takes_the_same_steps(
    train_small: Train, tmp_path: Path, traced_compile: None
) -> None:
    changes = {"model__dropout": 0.0, "data__packed_documents": "true"}
    train_small("plain", **changes)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    train_small("compiled", run__compile="true", **changes)
    # One of the plan, and one for training and one for evaluation serve all that follows: layers,
    # batches and documents.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled + 3
    plain, other = (RunFolder(tmp_path / name) for name in ("plain", "compiled"))
    a, b = weights(plain.checkpoint(8)), weights(other.checkpoint(8))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_a_compiled_run_names_what_is_not_a_number(
    train_small: Train, monkeypatch: pytest.MonkeyPatch, traced_compile: None
) -> None:
    original = trainer_module.Trainer._step

    def poisoned(self: Any, number: int, rate: float) -> Any:
        if number == 5:
            with torch.no_grad():
                self.plain_model.model.norm.weight[0] = float("inf")
        return original(self, number, rate)

    monkeypatch.setattr(trainer_module.Trainer, "_step", poisoned)
    with pytest.raises(PHAError, match=r"the weight model\.norm\.weight is not finite"):
        train_small(run__compile="true")


def test_compiling_without_a_compiler_is_refused(
    train_small: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(PHAError, match=r"needs a C\+\+ compiler.*leave run\.compile out"):
        train_small(run__compile="true")


@pytest.mark.slow
def test_a_run_compiled_to_code_learns(train_small: Train, tmp_path: Path) -> None:
    train_small(run__steps=40, run__evaluate_every=40, run__compile="true")
    losses = [r.loss for r in RunFolder(tmp_path / "run").read_metrics().train]
    assert losses[-1] < 0.8 * losses[0]
