"""A branch of one's own, from its file to a study, an exported card and a check."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pha.data import TokenStore
from pha.model import BRANCHES
from pha.runs import RunFolder
from pha.studies.jobs import Job
from pha.utils.modules import asked_for
from tests.cli.conftest import Pha, Refused
from tests.train.conftest import SMALL, arguments

OWN = """\
from torch import nn
from pha.model import Branch, register_branch
@register_branch("mine")
class Mine(Branch):
    def __init__(self, config, layer_idx, width=16):
        super().__init__(config, layer_idx)
        self.up = nn.Linear(config.hidden_size, width, bias=False)
        self.down = nn.Linear(width, config.hidden_size, bias=False)
    def forward(self, z, context):
        return self.down(self.up(z).relu())
@register_branch("peeks")
class Peeks(Branch):
    def forward(self, z, context):
        return z - z.flip(1)
"""
BRANCHES_OF = "[gss,mine]"


def forget() -> None:
    """As in a process that has imported nothing."""
    sys.modules.pop("own_module", None)
    for name in ("mine", "peeks"):
        BRANCHES.pop(name, None)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of `own_module.py`."""
    (tmp_path / "own_module.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    forget()
    yield tmp_path
    forget()


def test_its_module_goes_with_the_run(
    pha: Pha, refused: Refused, store: TokenStore, own: Path
) -> None:
    words = ["train", "pha-tiny.text", "--out", "run"]
    words += arguments(store, run__epochs="null", model__branches=BRANCHES_OF)
    pha("--import", "own_module", *words)
    assert RunFolder(own / "run").read_config()["run"]["imports"] == ["own_module"]
    forget()
    assert "pha --import own_module" in refused("mixing", "run")
    pha(*words, "--json")  # the run's own configuration names the module
    assert "mine" in BRANCHES
    pha("--import", "own_module", "export", "run", "shared")
    assert "| modules beside pha | own\\_module |" in (own / "shared/README.md").read_text()
    assert "broken.py" in refused("--import", "broken", "train", "pha-tiny.text")
    assert "--import .own_module" in refused("--import", ".own_module", "params")
    assert "No module named 'nowhere'" in refused(
        "train", "pha-tiny.text", "--run.imports=[nowhere]"
    )


def test_children_import_it(own: Path) -> None:
    with asked_for(["own_module"]):
        words = Job("pha-tiny.text", own / "run").words()
    assert words[3:5] == ["--import=own_module", "train"]
    assert "--import=own_module" not in Job("pha-tiny.text", own / "run").words()


@pytest.mark.slow
def test_a_sweep_and_a_benchmark_over_it(pha: Pha, store: TokenStore, own: Path) -> None:
    words = ["--import", "own_module", "sweep", "pha-tiny.text", "--out", "out", "--json"]
    settings = [f"--{key}={value}" for key, value in SMALL.items()]
    over = "model.branches=[gss,attention],[gss,mine]"
    record = json.loads(
        pha(
            *words,
            *settings,
            "--run.epochs=null",
            "--data",
            store.path,
            "--over",
            over,
            "--seeds=2",
        )
    )
    assert [row["diverged"] for row in record["variants"]] == [0, 0]
    [difference] = record["differences"]
    assert difference["b"].endswith("[gss,attention]")
    assert {"table.md", "table.tex", "table.csv"} <= {path.name for path in Path("out").iterdir()}
    model = "pha-tiny+branches=[gss,mine]"
    words = ["--import", "own_module", "bench", "prefill", "--models", model, "--lengths", "16"]
    rows = json.loads(pha(*words, "--runs", "1", "--seconds", "0.1", "--json"))["rows"]
    assert [row.get("error") for row in rows] == [None]


def test_its_size_is_matched_to_a_preset(pha: Pha, refused: Refused, own: Path) -> None:
    words = ["--import", "own_module", "params", "pha-tiny", "--model.branches=[mine,attention]"]
    words += ["--match", "pha-tiny", "--vocab-size", "8192", "--json"]
    for key in ("model.branch_options.mine.width", "model.primary_ffn_expansion"):
        found = json.loads(pha(*words, "--by", key))
        assert abs(found["difference"]) < 1e-3
        assert found["parameters"] == found["wanted"] * (1 + found["difference"])
    size = f"--model.primary_ffn_expansion={found['value']}"
    [row] = json.loads(pha(*words[:5], size, *words[7:]))["presets"]
    assert row["total"] == found["parameters"]
    words.remove("--json")
    assert "changes no parameters" in refused(*words, "--by", "model.rope_theta")
    assert "a number of the model" in refused(*words, "--by", "run.steps")


def test_what_it_keeps_is_said_in_lines(
    pha: Pha, own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pha.bench.branch.SPEED", {"width": 48, "length": 32, "runs": 1})
    with pytest.raises(SystemExit) as stop:
        pha("check-branch", "own_module", "--json")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    found = json.loads(printed.out)
    assert all(each["passed"] for each in found["mine"]), found["mine"]
    assert [each["what"] for each in found["mine"]][-1] == "speed"
    assert not next(each for each in found["peeks"] if each["what"] == "looks ahead")["passed"]
    assert "peeks: looks ahead" in printed.err
    assert "mine" not in printed.err
