"""Settings and small fixtures that every suite shares."""

from __future__ import annotations

import os

# Several test processes share few cores: one thread each is fastest, and makes runs comparable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from pha.data import TokenStore, prepare

torch.set_num_threads(1)
# What `empty` returns is filled with NaN, so that nothing can read what it has not written.
torch.use_deterministic_algorithms(True, warn_only=True)
# The same examples each time, so that a red run can be run again; times vary too much between
# machines for a limit on each. `--hypothesis-profile=search` looks at others.
settings.register_profile("search", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")


# Suites about signals, pipes, links, torchrun, and names of any bytes.
POSIX = {
    *("utils/test_outputs.py", "utils/test_processes.py", "utils/test_signals.py"),
    *("train/test_cluster.py", "train/test_processes.py", "train/test_sharding.py"),
    *("data/test_sources.py", "cli/test_names.py", "test_launch.py"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` without one; PHA_GPU_TESTS=cpu rehearses it on a CPU.

    On Windows skip the suites of `POSIX`.
    """
    for item in items if os.name == "nt" else ():
        if item.path.relative_to(Path(__file__).parent).as_posix() in POSIX:
            item.add_marker(pytest.mark.skip(reason="is about what Windows lacks"))
    if torch.cuda.is_available() or os.environ.get("PHA_GPU_TESTS") == "cpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def own_graphs(request: pytest.FixtureRequest) -> None:
    """A test on a GPU is never the one that meets the limit of graphs for a piece of code."""
    if request.node.get_closest_marker("gpu"):
        torch._dynamo.reset()


@pytest.fixture
def device() -> torch.device:
    """Where tests marked `gpu` run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every token that the compiled instructions write."""
    from pha.decoder.program import Decoder

    taken: list[int] = []
    step = Decoder.step

    def counted(self: Any, *arguments: Any) -> Any:
        taken.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(Decoder, "step", counted)
    return taken


def synthetic_text(lines: int, seed: int) -> str:
    """Text with structure to learn: counting in words, from a small linear congruence."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    state, out = seed, []
    for _ in range(lines):
        state = (1103515245 * state + 12345) % 2**31
        first = state >> 16
        out.append(" ".join(words[(first + i) % 10] for i in range(3 + first % 5)) + ".")
    return "\n".join(out) + "\n"


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of train, valid and test files."""
    folder = tmp_path_factory.mktemp("text")
    for name, lines, seed in (("train", 600, 1), ("valid", 60, 2), ("test", 60, 3)):
        (folder / f"{name}.txt").write_text(synthetic_text(lines, seed), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def store(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A token store of that text in bytes."""
    return prepare(str(text_folder), "bytes", tmp_path_factory.mktemp("stores") / "synthetic")
