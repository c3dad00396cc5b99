"""The command line as a user meets it: every verb, and every mistake in one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file

from pha import __version__
from pha.cli import VERBS, find_verb, main, make_parser, read_docstring
from pha.data import TokenStore
from pha.model import BRANCHES
from pha.model.presets import PRESETS
from pha.runs import RunFolder
from pha.utils.errors import StoppedError, TrainingInterruptedError
from tests.cli.conftest import Pha, Refused
from tests.train.conftest import arguments


@pytest.fixture(scope="module")
def trained(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small finished run, and what was printed on the way."""
    out = tmp_path_factory.mktemp("cli") / "small"
    words = ["train", "pha-tiny.text", "--out", str(out), *arguments(store, run__epochs="null")]
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()) as progress,
    ):
        main(words)
    assert "FLOP" in progress.getvalue()
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def run(trained: tuple[Path, str]) -> Path:
    """A small finished run."""
    return trained[0]


@pytest.mark.parametrize("start", [("-c", "import pha_command; pha_command.main()"), ("-m", "pha")])
def test_help_names_every_verb_and_needs_no_torch(start: tuple[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *start, "--help"],
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pha.cli" in imported
    assert not {"torch", "transformers"} & imported
    for name in VERBS:
        assert f"\n  {name} " in done.stdout


def test_version(pha: Pha) -> None:
    assert pha("--version") == f"pha {__version__}\n"


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb = find_verb(name)
    about, helps = read_docstring(verb)
    assert about.partition("\n")[0].endswith(".")
    assert set(helps) <= set(inspect.signature(verb).parameters)
    assert all(action.help for action in make_parser(name, verb)._actions)
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: pha {name} [-h]")
    assert about in printed
    for text in helps.values():
        assert text in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 100


def example(
    place: Path,
    more: Sequence[Annotated[str, "MORE"]] = (),
    *rest: str,
    needed: Fraction,
    mode: Literal["a", "b"] | None = None,
    sizes: tuple[int, ...] = (1, 2),
    again: Sequence[float] = (),
    on: bool = False,
    maybe: bool | None = None,
) -> None:
    """Take one of each."""


EXAMPLE = {
    "place": Path("x"),
    "more": [],
    "needed": Fraction(1, 20),
    "mode": None,
    "sizes": (1, 2),
    "again": [],
    "on": False,
    "maybe": None,
}


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("x --needed 0.05", {}),
        ("x y z --needed 1/20", {"more": ["y", "z"]}),
        ("x --needed=0.05 --mode b --sizes 3,4,5", {"mode": "b", "sizes": (3, 4, 5)}),
        ("x --needed 0.05 --again 1 --again 2e3", {"again": [1.0, 2000.0]}),
        ("--on x --needed 0.05 --no-maybe", {"on": True, "maybe": False}),
        ("x --needed 0.05 --maybe", {"maybe": True}),
    ],
)
def test_a_signature_is_a_command_line(words: str, changes: dict[str, Any]) -> None:
    parsed = make_parser("example", example).parse_args(words.split())
    assert vars(parsed) == EXAMPLE | changes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("x", "the following arguments are required: --needed"),
        ("--needed 1", "the following arguments are required: PLACE"),
        ("x --needed 1/0", "argument --needed: '1/0' is not a number such as 0.05"),
        ("x --needed 1 --mode c", "invalid choice: 'c'"),
        ("x --needed 1 --sizes 3,x", "'3,x' is not a list of whole numbers"),
        ("x --needed 1 --again x", "'x' is not a number"),
        ("x --need 1", "required: --needed"),
    ],
)
def test_what_a_signature_does_not_take(
    words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make_parser("example", example).parse_args(words.split())
    said = capsys.readouterr().err
    assert expected in said
    assert said.endswith(" (see example --help)\n")
    assert said.count("\n") == 1


def test_an_interruption_and_a_closed_pipe_have_their_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code in (
        (KeyboardInterrupt, 130),
        (StoppedError, 75),
        (TrainingInterruptedError("stopped"), 75),
        (TrainingInterruptedError("stopped", 130), 130),
        (BrokenPipeError, 141),
    ):
        monkeypatch.setattr("pha.bench.doctor.examine", Mock(side_effect=error))
        with pytest.raises(SystemExit) as stop:
            main(["doctor"])
        assert stop.value.code == code
    assert capsys.readouterr().err == "pha doctor: interrupted\n" * 2 + "pha doctor: stopped\n" * 2


def test_a_signal_that_a_library_makes_another_error_of_still_stops_in_good_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def swallow(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except StoppedError:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr("pha.bench.doctor.examine", swallow)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 75
    assert capsys.readouterr().err == "pha doctor: stopped; run the same command again\n"


@pytest.mark.slow
def test_a_process_of_its_own_knows_every_preset() -> None:
    command = [sys.executable, "-m", "pha", "params", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {each["preset"] for each in json.loads(done.stdout)["presets"]} == PRESETS.keys()


@pytest.mark.slow
def test_params_json_agrees_with_the_paper(pha: Pha) -> None:
    rows = {r["preset"]: r for r in json.loads(pha("params", "--json"))["presets"]}
    for name in ("pha-90m", "pha-125m", "pha-180m", "sequential-186m"):
        assert abs(rows[name]["difference"]) < 0.003
        assert rows[name]["total"] == sum(rows[name]["components"].values())
    assert "pha-125m" in pha("params")
    assert "pha-tiny" in pha("params", "pha-tiny.mqar")  # of a task, which takes no store
    assert "pha-90m" not in pha("params", "pha-125m")


def test_recipes(pha: Pha, tmp_path: Path) -> None:
    assert "stdlib" in pha("recipes")
    assert "learning_rate" in pha("recipes", "pha-tiny.stdlib")
    assert "sequence_length: 1024" in pha("recipes", "pha-125m.wikitext103")
    (tmp_path / "own.yaml").write_text("run: {steps: 3}")
    for recipe, store in (
        (tmp_path / "own.yaml", "STORE"),
        ("pha-tiny.text", "STORE"),
        ("pha-tiny.stdlib", None),
        ("pha-tiny.mqar", None),
    ):
        assert json.loads(pha("recipes", recipe, "--json"))["data"]["store"] == store
    keys = " ".join(pha("recipes", "--keys").split())
    assert "optimizer.state_space_learning_rate" in keys
    assert "cap on the rate of A and dt" in keys


def test_train_prints_plan_and_table(trained: tuple[Path, str]) -> None:
    run, printed = trained
    for part in ("parameters", "on the test split", "perplexity per byte"):
        assert part in printed
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 8
    assert f"{result['evaluations'][-1]['bits_per_byte']:.4f}" in printed
    assert printed.endswith(f"run folder: {run}\n")
    assert RunFolder(run).checkpoint_steps()


def test_dry_run_spends_nothing(pha: Pha, store: TokenStore, tmp_path: Path) -> None:
    out = tmp_path / "dry"
    words = ["train", "pha-tiny.text", "--out", out, "--dry-run"]
    words += arguments(store, run__epochs="null")
    assert "warning    the warm-up takes 2 of 8 steps" in pha(*words)
    words.append("--schedule.warmup_steps=1")
    printed = pha(*words)
    assert "warning" not in printed
    for word in ("parameters", "FLOP", "memory", "time"):
        assert word in printed
    assert not out.exists()
    plan = json.loads(pha(*words, "--json"))["plan"]
    assert plan["tokens"] == 8 * 4 * 32
    assert plan["flops"] == plan["flops_per_token"] * plan["tokens"]
    assert 6 * plan["parameters"] < plan["flops_per_token"] < 7 * plan["parameters"]


def test_eval_of_run_checkpoint_and_model_agree(pha: Pha, run: Path, store: TokenStore) -> None:
    expected = json.loads((run / "result.json").read_text())["evaluations"][0]
    words = ["--data", store.path, "--json", "--sequence-length", 32]
    for path in (run, run / "model", run / "checkpoints" / "step-8"):
        result = json.loads(pha("eval", path, *words[:3]))
        assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
        assert result["protocol"]["sequence_length"] == 32
    strided = json.loads(pha("eval", run, *words, "--stride", 8))
    assert strided["tokens"] == expected["tokens"]
    assert strided["protocol"]["windows"] == "sliding"
    assert "perplexity per word" in pha("eval", run, "--data", store.path)


def test_generate_is_repeatable(pha: Pha, run: Path) -> None:
    words = ["generate", run, "--prompt", "one two", "--max-new-tokens", 8]
    first = pha(*words)
    assert first.startswith("one two")
    assert pha(*words) == first
    assert pha(*words, "--seed", 1) != first
    assert json.loads(pha(*words, "--json", "--temperature", 0))["prompt"] == "one two"


def test_mixing_shows_layers_and_time(pha: Pha, run: Path) -> None:
    assert "attention" in pha("mixing", run)
    content = json.loads(pha("mixing", run, "--json"))
    assert len(content["final"]) == 2
    assert [r["step"] for r in content["over_time"]] == [0, 4, 8]
    for layer in content["final"]:
        assert sum(layer["weights"].values()) == pytest.approx(1, abs=1e-6)


def test_report_writes_one_page(pha: Pha, run: Path) -> None:
    path = Path(pha("report", run).strip())
    assert path == run / "report.html"
    assert "<svg" in path.read_text()


def test_an_export_is_verified_by_its_card(
    pha: Pha, refused: Refused, run: Path, store: TokenStore, tmp_path: Path
) -> None:
    out = tmp_path / "shared"
    pha("export", run, out)
    found = json.loads(pha("verify", out, "--data", store.path, "--json"))
    assert found["same"]
    assert {each["name"] for each in found["checks"]} >= {"perplexity", "accuracy"}
    assert "yes" in pha("verify", out, "--data", store.path)
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace(store.sha256, "0" * 64))
    assert "is not the data" in refused("verify", out, "--data", store.path)
    (out / "README.md").write_text(card)
    weights = load_file(out / "model.safetensors")
    weights["model.embed_tokens.weight"][5, 5] += 1
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        pha("verify", out, "--data", store.path)
    assert stop.value.code == 2
    assert "has no card" in refused("verify", run / "model", "--data", store.path)


def test_doctor_says_what_it_finds(
    pha: Pha, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = {"op": "loss", "device": "cpu", "backend": "torch", "used": True}
    found: dict[str, Any] = {
        "environment": {"torch": "2.11"},
        "backends": [check | {"ok": True, "error": 1e-9, "reason": None}],
        "healthy": True,
    }
    monkeypatch.setattr("pha.bench.doctor.examine", lambda *_: found)
    assert "torch (used): ok, largest relative error 1.0e-09" in pha("doctor")
    assert json.loads(pha("doctor", "--json")) == found
    found["backends"].append(check | {"ok": False, "error": 0.5, "reason": None})
    found["healthy"] = False
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "WRONG, largest relative error 5.0e-01" in said.out
    assert said.err.count("\n") == 1


def test_a_branch_of_ones_own_trains_from_the_command_line(
    pha: Pha, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_branch.py").write_text(
        "from pha.model import Branch, register_branch\n"
        "@register_branch('identity')\n"
        "class Identity(Branch):\n"
        "    def forward(self, z, sequence):\n"
        "        return z\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    words = ["--import", "own_branch", "train", "pha-tiny.text", "--out", "own"]
    try:
        pha(*words, *arguments(store, run__epochs="null", model__branches="[gss,identity]"))
    finally:
        BRANCHES.pop("identity", None)
    weights = RunFolder(tmp_path / "own").read_result().mixing[0].weights
    assert set(weights) == {"gss", "identity"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "no verb 'trian'; did you mean train?"),
        (["--loud"], "--loud"),
        (["train"], "RECIPE"),
        (["train", "nope.stdlib"], "pha recipes"),
        (["train", "pha-tiny.stdlib", "--run.stepz", "3"], "run.stepz"),
        (["train", "pha-tiny.text", "--data", "no-such-store"], "no-such-store"),
        (["train", "pha-tiny.text"], "--data STORE"),
        (["eval", "no-such-run", "--data", "x"], "no-such-run does not exist"),
        (["eval"], "RUN_OR_MODEL"),
        (["generate", ".", "--prompt", "x"], "neither a run folder nor a saved model"),
        (["mixing", "no-such-run"], "does not exist"),
        (["report", "no-such-run"], "no-such-run"),
        (["prepare", "stdlib", "--tokenizer", "bytes"], "--out"),
        (["params", "pha-124m"], "pha-125m"),
        (["doctor", "--loud"], "--loud"),
        (["--import", "no_such_module", "doctor"], "no_such_module"),
    ],
)
def test_mistakes_end_in_one_line(
    refused: Refused,
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refused(*words)


def test_damaged_things_end_in_one_line(
    refused: Refused, run: Path, store: TokenStore, text_folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in refused("eval", broken, "--data", store.path)
    (broken / "config.json").write_text("{")
    assert "config.json cannot be read" in refused("eval", broken, "--data", store.path)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "empty" in refused("prepare", empty, "--tokenizer", "bytes", "--out", tmp_path / "s")


def test_store_of_another_tokenizer_is_refused(
    pha: Pha,
    refused: Refused,
    run: Path,
    text_folder: Path,
    tmp_path: Path,
) -> None:
    pha("prepare", text_folder, "--tokenizer", "bpe:280", "--out", tmp_path / "bpe")
    assert "tokenizer" in refused("eval", run, "--data", tmp_path / "bpe")
