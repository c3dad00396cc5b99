"""A run as a job of Slurm, with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pha.cli import main
from pha.data import TokenStore
from pha.runs import RunFolder
from pha.train.cluster import ClusterJob
from tests.train.conftest import arguments

COMMANDS = {
    "sbatch": 'cat > "$SLURM_FAKE/script.sh"; echo "7;cluster"',
    # Runs what follows its options, as the one task of the one node.
    "srun": 'while [[ $1 == --* ]]; do shift; done; echo $$ > "$SLURM_FAKE/step"; exec "$@"',
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$@" >> "$SLURM_FAKE/asked"',
    # All processes of the step: torchrun and those that it started.
    "scancel": 'top=$(cat "$SLURM_FAKE/step"); kill "${1/--signal=/-}" $(pgrep -P $top) $top',
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what the stand-ins write, which come first in the path."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_FAKE", str(folder))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-1")
    return folder


def words(store: TokenStore, out: Path, *options: str) -> list[str]:
    changes = {"run__epochs": "null", "run__steps": 150, "run__checkpoint_every": 1000}
    changes |= {"run__evaluate_every": 1000}
    return ["train", "pha-tiny.text", "--out", str(out), *arguments(store, **changes), *options]


def test_the_script_is_shell_and_shown(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "it's a run"
    main(words(store, out, "--cluster", "gpu", "--nodes", "2", "--hours", "0.5", "--dry-run"))
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for option in ("partition=gpu", "nodes=2", "gpus-per-node=8", "time=30", "requeue"):
        assert f"#SBATCH --{option}\n" in script
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_not_taken_for_a_newer_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "it's a run")
    for name in ("step-9", "step-10", "step-11.damaged"):
        (run.checkpoints / name).mkdir(parents=True)
    script = ClusterJob(["pha-tiny.text"], run.path, "gpu", 1, 1, 1.0).script()
    [newest] = [line for line in script.splitlines() if line.startswith("newest()")]
    command = ["bash", "-c", f"{newest}\nnewest"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "step-10\n"


def test_what_is_for_the_cluster_alone_is_refused_without_it(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--gpus", "4"], ["--nodes", "2"], ["--hours", "3"]):
        with pytest.raises(SystemExit) as stop:
            main(words(store, tmp_path / "run", *options))
        assert stop.value.code == 2
        assert "--nodes, --gpus and --hours are for --cluster" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "0"], "--nodes"),
        (["--device-tflops", "9", "--device-gb", "9"], "--device-gb"),
        (["--hours", "0.01"], "--hours"),
        (["--resume", "never"], "--resume"),
        (["--model.hidden_size", "-1"], "hidden_size"),
        ([], "no sbatch here"),
    ],
)
def test_what_cannot_be_handed_over_is_refused(
    store: TokenStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as left:
        main(words(store, tmp_path / "run", "--cluster", "gpu", *options))
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_refusal_of_slurm_is_passed_on(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], slurm: Path
) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition >&2\nexit 1\n")
    with pytest.raises(SystemExit):
        main(words(store, tmp_path / "run", "--cluster", "gpu"))
    assert "--cluster: sbatch: error: invalid partition" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_out_of_time_saves_and_goes_back_to_the_queue(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], slurm: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    main(words(store, run.path, "--cluster", "gpu", "--gpus", "2", "--json"))
    said = json.loads(capsys.readouterr().out)
    assert said == {"job": "7", "log": str(tmp_path / "run.log")}

    def attempt(stop: bool) -> int:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        environment.pop("ACCELERATE_USE_CPU", None)
        with (tmp_path / "run.log").open("a") as log:
            job = subprocess.Popen(
                ["bash", slurm / "script.sh"], env=environment, stdout=log, stderr=log
            )
        while stop and not (run.metrics.exists() and run.read_metrics().train):
            assert job.poll() is None, (tmp_path / "run.log").read_text()[-3000:]
            time.sleep(0.1)
        if stop:
            job.send_signal(signal.SIGUSR1)
        return job.wait(timeout=180)

    assert attempt(stop=True) != 0
    assert (slurm / "asked").read_text() == "requeue 7\n"
    (saved,) = run.checkpoint_steps()
    assert 0 < saved < 150
    assert attempt(stop=False) == 0
    assert (slurm / "asked").read_text() == "requeue 7\n"
    assert run.result.exists()
    assert f"continuing after step {saved}" in (tmp_path / "run.log").read_text()
    # A mistake leaves no newer checkpoint, so it ends the job.
    (slurm / "script.sh").write_text(
        (slurm / "script.sh").read_text().replace("--run.steps 150", "--run.steps 151")
    )
    assert attempt(stop=False) != 0
    assert (slurm / "asked").read_text() == "requeue 7\n"
