"""Training and benchmarks on a machine that has torch, transformers, and little besides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pha
from pha.data import TokenStore
from pha.utils.formats import read_json
from tests.train.conftest import arguments

# What a machine set up by others may lack; the packages that transformers itself needs are there.
OPTIONAL = (
    *("datasets", "pyarrow", "zstandard", "pandas", "numba", "llvmlite", "scipy", "sklearn"),
    *("matplotlib", "jinja2", "tensorboard", "wandb", "docstring_parser", "typeshed_client"),
)

# Python runs this at its start: packages by these names are not there, installed or not.
HIDE = """
import os, sys
from importlib.machinery import PathFinder

HIDDEN = set(os.environ["HIDDEN"].split(","))

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context=None):
        found = PathFinder.find_distributions(context)
        return (d for d in found if d.metadata["Name"].replace("-", "_") not in HIDDEN)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def run_python(tmp_path: Path, hidden: tuple[str, ...], *words: str) -> subprocess.CompletedProcess:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    source = Path(pha.__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}",
        "HIDDEN": ",".join(hidden),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_what_training_and_benchmarks_import_is_there(tmp_path: Path) -> None:
    modules = "pha.bench.runner, pha.bench.worker, pha.bench.doctor, pha.train.run, pha.data"
    program = f"import sys, {modules}; print(*sys.modules)"
    done = run_python(tmp_path, (*OPTIONAL, "jsonargparse"), "-c", program)
    assert done.returncode == 0, done.stderr
    assert not {*OPTIONAL, "jsonargparse"} & set(done.stdout.split())


TRAIN = ("accelerate", "filelock", "jsonargparse", "psutil", "yaml", "rich")


def test_a_model_needs_no_extra(tmp_path: Path) -> None:
    program = """
import sys, pha, torch
model = pha.PHAForCausalLM(pha.PHAConfig.from_preset("pha-tiny", vocab_size=31))
model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3)
model.save_pretrained("model")
pha.PHAModel.from_pretrained("model")
"""
    # Those that transformers or torch need themselves are there.
    needless = {*OPTIONAL, *TRAIN} - {"filelock", "yaml", "psutil", "accelerate"}
    done = run_python(tmp_path, tuple(needless), "-c", program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "extra", "words"),
    [
        ("rich", "train", ["--help"]),
        pytest.param(
            *("jsonargparse", "train", ["train", "pha-tiny.stdlib"]), marks=pytest.mark.slow
        ),
        ("accelerate", "train", ["train", "pha-tiny.stdlib"]),
    ],
)
def test_a_missing_package_is_one_line_with_its_extra(
    missing: str, extra: str, words: list[str], tmp_path: Path
) -> None:
    done = run_python(tmp_path, (missing,), "-m", "pha", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{missing}, which is not installed" in done.stderr
    assert f"pha-lm[{extra}]" in done.stderr


@pytest.mark.slow
def test_training_and_benchmarks_run_without_them(store: TokenStore, tmp_path: Path) -> None:
    words = ["pha-tiny.text", "--out", str(tmp_path / "run"), *arguments(store, run__epochs="null")]
    done = run_python(tmp_path, OPTIONAL, "-m", "pha", "train", *words)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "result.json")["provenance"]["pha"] == pha.__version__
    words = ["--models", "pha-tiny,hf:gpt2-tiny", "--lengths", "16,32", "--batch", "1"]
    words += ["--runs", "1", "--seconds", "0.01", "--out", str(tmp_path / "bench")]
    done = run_python(tmp_path, OPTIONAL, "-m", "pha", "bench", "train", *words)
    assert done.returncode == 0, done.stderr
    assert "no pictures: matplotlib is not installed" in done.stdout
    rows = read_json(tmp_path / "bench" / "bench-train.json")["rows"]
    assert [row["error"] for row in rows] == [None] * 4
