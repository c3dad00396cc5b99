"""What only another system would show: Windows and macOS have other names, signals and files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pha
from pha.utils.text import file_name
from tests.conftest import synthetic_text

ROOT = Path(__file__).parents[2]

# Libraries may use what their builds for this system use. From us is taken what Windows lacks, and
# nothing flushes a folder or a file that is open for reading.
PROGRAM = """
import errno, fcntl, os, signal, sys
import accelerate, transformers.modeling_utils

for name in ("pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("fork", "symlink", "mkfifo", "uname", "killpg", "getuid", "geteuid"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM"):
    delattr(signal, name)

flush = os.fsync
def fsync(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    flush(descriptor)
os.fsync = fsync

from pha.cli import main

main(["prepare", "texts", "--tokenizer", "bytes", "--out", "store"])
main(["train", "pha-tiny.text", "--data", "store", "--out", "run", *sys.argv[1:]])
main(["export", "run", "shared"])
main(["generate", "shared", "--prompt", "one", "--max-new-tokens", "2", "--out", "written.jsonl"])
"""
TINY = (
    "--run.epochs null --run.steps 2 --run.global_batch 2 --run.evaluations 1 "
    "--run.evaluate_tokens 200 --run.sample_tokens 2 --run.precision fp32 --model.hidden_size 16 "
    "--model.num_hidden_layers 1 --model.state_size 16 --model.head_dim 4 "
    "--data.sequence_length 32"
)


def test_from_text_to_text_without_what_windows_lacks(tmp_path: Path) -> None:
    """In a folder whose path is longer than 260 characters and is not ASCII."""
    place = tmp_path.joinpath("Büro und so", *["x" * 80] * 3)
    (place / "texts").mkdir(parents=True)
    for seed, split in enumerate(("train", "valid", "test")):
        text = synthetic_text(100, seed).replace("\n", "\r\n")
        (place / "texts" / f"{split}.txt").write_bytes(text.encode())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *TINY.split()],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(Path(pha.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(str(place)) > 260
    assert (place / "run" / "result.json").is_file()
    assert (place / "shared" / "README.md").is_file()
    written = (place / "written.jsonl").read_bytes()
    assert json.loads(written)["prompt"] == "one"
    assert b"\r" not in written
    assert not [
        path for path in place.rglob(".*") if not path.name.endswith(".lock")
    ]  # nothing half done


def test_no_file_begins_with_a_module_that_windows_lacks() -> None:
    lacking = re.compile(r"^(import|from) (resource|fcntl|pwd|grp|termios)\b", re.MULTILINE)
    for path in (ROOT / "src").rglob("*.py"):
        assert not lacking.search(path.read_text(encoding="utf-8")), path


RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
}


def allowed(name: str) -> bool:
    """Whether a file may be called so on Windows."""
    odd = set('<>:"/\\|?*') & set(name) or any(ord(character) < 32 for character in name)
    return not odd and name[-1] not in ". " and name.partition(".")[0].lower() not in RESERVED


def test_files_of_the_project_have_names_that_every_system_can_have() -> None:
    folders = ("src", "tests", "docs", "scripts", "results", "launch", ".github")
    paths = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*")]
    paths = [path for path in paths if "__pycache__" not in path.parts]
    assert len(paths) > 300
    seen: dict[str, Path] = {}
    for path in paths:
        assert allowed(path.name), path
        assert len(str(path)) < 160, path  # of 260, with the folder of a checkout
        assert not (ROOT / path).is_symlink(), path
        other = seen.setdefault(str(path).casefold(), path)
        assert other == path, f"{other} and {path} are one file where case does not count"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pha-tiny.text", "pha-tiny.text"),
        ("hf:me/model", "hf-me-model"),
        ('a*b?"c<d>e|f\n', "a-b-c-d-e-f-"),
        ("ends. ", "ends-"),
        ("Nul.text", "_Nul.text"),
        ("null", "null"),
    ],
)
def test_names_of_outputs_are_allowed_everywhere(text: str, name: str) -> None:
    assert file_name(text) == name
    assert allowed(name)
