"""Misspelt words are answered with the nearest right one, by the command that was called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pha.commands.common import figures_table, print_table
from pha.completion import whole_parser
from pha.train.keys import recipe_keys
from pha.utils.progress import make_console
from tests.cli.conftest import Pha, Refused

TABLE = [
    ("trian", "pha: ", "did you mean train?"),
    ("genrate runs/x", "pha: ", "did you mean generate?"),
    ("--improt mine train", "pha: ", "did you mean --import?"),
    ("train pha-tiny.tex", "pha train: ", "did you mean pha-tiny.text"),
    ("train pha-tiny.text --dryrun", "pha train: ", "did you mean --dry-run?"),
    ("train pha-tiny.text --run.global_bacth 8", "pha train: ", "did you mean run.global_batch?"),
    ("train pha-tiny.text --run.trackers+ wandb", "pha train: ", "did you mean run.trackers?"),
    ("train pha-tiny.text --run.step=5", "pha train: ", "did you mean run.steps?"),
    ("train pha-tiny.text --model.droput 0.1", "pha train: ", "did you mean model.dropout?"),
    ("train pha-tiny.text --optim.learning-rate 1", "pha train: ", "mean optimizer.learning_rate?"),
    ("train pha-tiny.text --global_batch 8", "pha train: ", "did you mean run.global_batch?"),
    ("train pha-tiny.text --run.epochs.x 8", "pha train: ", "did you mean run.epochs?"),
    ("train pha-tiny.text --model.dropout abc", "pha train: ", "'abc'; it must be a number"),
    ("train pha-tiny.text --run.steps=2.5", "pha train: ", "a whole number or null"),
    ("train pha-tiny.text --run.compile ye", "pha train: ", "it must be true or false"),
    ("train pha-tiny.text --optimizer.kind adam", "pha train: ", "did you mean adamw?"),
    ("sweep pha-tiny.text --over run.epoch=1,2 --out x", "pha sweep: ", "mean run.epochs?"),
    ("study branchs", "pha study: ", "did you mean branches?"),
    ("study branches --onyl a", "pha study: ", "did you mean --only?"),
    ("generate x --max-tokens 3", "pha generate: ", "did you mean --max-new-tokens?"),
    ("score --jsno x", "pha score: ", "did you mean --json?"),
    ("params pha-124m", "pha params: ", "pha-125m"),
    ("bench trian", "pha bench: ", "did you mean train?"),
    ("completion bsh", "pha completion: ", "did you mean bash?"),
    ("recipes --keys warmpu", "pha recipes: ", "`pha recipes --keys` lists all"),
]


@pytest.mark.parametrize(("words", "who", "answer"), TABLE, ids=[row[0] for row in TABLE])
def test_a_misspelling_is_answered_with_the_right_word(
    words: str, who: str, answer: str, refused: Refused
) -> None:
    line = refused(*words.split())
    assert line.startswith(who + "error: ")
    assert answer in line


def test_a_recipe_of_ones_own_is_read_as_strictly(refused: Refused, tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("run: {stepz: 3}")
    assert "own: there is no key run.stepz; did you mean run.steps?" in refused("train", recipe)
    recipe.write_text("run: {steps: many}")
    assert "run.steps is 'many'; it must be a whole number or null" in refused("train", recipe)


def test_pha_alone_shows_three_commands(pha: Pha) -> None:
    assert [line.split()[1] for line in pha().splitlines()[1:]] == ["demo", "prepare", "train"]


def test_keys_have_a_table_with_their_meaning(pha: Pha) -> None:
    assert all(key.meaning for key in recipe_keys().values())
    printed = pha("recipes", "--keys", "warmup")
    assert "schedule.warmup_steps" in printed
    assert "linear rise from zero" in printed
    assert "run.global_batch" not in printed
    assert "\x1b" not in printed  # a pipe gets no colours
    rows = json.loads(pha("recipes", "--keys", "--json"))
    assert {row["key"] for row in rows} == recipe_keys().keys()
    [batch] = [row for row in rows if row["key"] == "run.global_batch"]
    assert (batch["default"], batch["type"]) == (24, "a whole number")


def test_a_table_that_does_not_fit_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    table = figures_table("sizes", "preset", *(f"column {i}" for i in range(9)))
    table.add_row("pha-tiny", *(f"{i}23,456,789" for i in range(9)))
    print_table(make_console(width=60), table)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 60
    assert all(f"column {i}: {i}23,456,789" in printed for i in range(9))


def test_completion_knows_verbs_options_and_keys(pha: Pha) -> None:
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "fish"):
        script = pha("completion", shell)
        assert "optimizer.learning_rate" in script
        assert "dry-run" in script
        assert "warmup-stable-decay" in script
    if sys.platform == "linux":
        typed = 'COMP_WORDS=(pha train --run.glo); COMP_CWORD=2; _shtab_pha; echo "${COMPREPLY[@]}"'
        words = ["bash", "-c", pha("completion", "bash") + typed]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout == "--run.global_batch\n"


def test_the_parser_for_completion_has_every_key_where_keys_are_taken() -> None:
    verbs = whole_parser().verbs
    keys = {f"--{name}" for name in recipe_keys()}
    for name, parser in verbs.items():
        found = keys & set(parser._option_string_actions)
        assert found == (keys if name in ("train", "sweep", "study", "params") else set()), name
