from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pha.model.presets import PRESETS
from pha.train.recipes import as_words, describe, load_recipe, merge, parse_overrides, protocols
from pha.utils.errors import PHAError


@pytest.mark.parametrize("protocol", protocols())
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_goes_with_every_protocol(preset: str, protocol: str) -> None:
    source = [] if protocol == "stdlib" else ["--data.store", "somewhere"]
    config = load_recipe(f"{preset}.{protocol}", source)
    assert config.recipe == f"{preset}.{protocol}"
    assert config.model.preset == preset
    for key, value in PRESETS[preset].items():
        assert getattr(config.model, key) == value


def test_every_protocol_says_what_it_is() -> None:
    assert all(len(describe(text)) > 40 for text in protocols().values())


def test_overrides_win_and_keep_their_types() -> None:
    config = load_recipe(
        "pha-tiny.stdlib",
        ["--run.steps=7", "--model.dropout", "0.25", "--model.branches", "[gss, aux_ffn]"],
    )
    assert (config.run.steps, config.model.dropout) == (7, 0.25)
    assert config.model.branches == ["gss", "aux_ffn"]
    assert config.optimizer.learning_rate == load_recipe("pha-tiny.stdlib").optimizer.learning_rate


@pytest.mark.parametrize("protocol", ["text", "finetune", "mqar"])
def test_pha_plus_takes_muon_at_twice_the_rate_of_pha(protocol: str) -> None:
    task = [] if protocol == "mqar" else ["--data.store", "x"]
    plain = load_recipe(f"pha-tiny.{protocol}", task).optimizer
    plus = load_recipe(f"pha-plus-tiny.{protocol}", task).optimizer
    assert plus == replace(plain, kind="muon", learning_rate=2 * plain.learning_rate)
    chosen = load_recipe(f"pha-plus-tiny.{protocol}", [*task, "--optimizer.kind", "adamw"])
    assert chosen.optimizer == replace(plus, kind="adamw")


def test_preset_can_be_overridden() -> None:
    config = load_recipe("pha-tiny.stdlib", ["--model.preset", "attention-only-tiny"])
    assert config.model.branches == ["attention"]


def test_naming_steps_or_a_store_drops_the_recipe_s_epochs_or_source() -> None:
    config = load_recipe("pha-tiny.wikitext103", ["--run.steps", "5", "--data.store=x"])
    assert (config.run.steps, config.run.epochs) == (5, None)
    assert (config.data.store, config.data.source) == ("x", None)
    config = load_recipe("pha-tiny.stdlib", ["--run.epochs", "2"])
    assert (config.run.steps, config.run.epochs) == (None, 2)


def test_settings_do_what_their_words_do() -> None:
    asked = parse_overrides(["--run.steps", "4", "--model.branches=[gss, aux_ffn]"])
    assert asked == {"run.steps": 4, "model.branches": ["gss", "aux_ffn"]}
    assert load_recipe("pha-tiny.stdlib", asked) == load_recipe("pha-tiny.stdlib", as_words(asked))
    assert merge({"run.epochs": 1, "run.seed": 1}, asked) == asked | {"run.seed": 1}
    for wrong in (["run.steps=4"], ["--run.steps"], ["--steps=4"]):
        with pytest.raises(PHAError, match="steps"):
            parse_overrides(wrong)


def test_a_path_works_and_a_resolved_config_is_a_recipe(tmp_path: Path) -> None:
    first = load_recipe("pha-tiny.stdlib", ["--run.steps", "9"])
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(first.to_dict()), encoding="utf-8")
    assert load_recipe(str(path)).to_dict() == first.to_dict()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run.stepz", "5"], "run.stepz"),
        (["--run.steps", "many"], "run.steps"),
        (["--run.steps", "0"], "run.steps is 0"),
        (
            ["--run.steps", "5", "--run.epochs", "1"],
            "give one of run.steps, run.ep",
        ),
        (["--run.average_best", "2"], "run.average_best is 2"),
        (["--schedule.decay_fraction", "1.5"], "schedule.decay_fraction is 1.5"),
        (["--run.precision", "fp8"], "run.precision"),
        (["--model.head_dim", "39"], "head_dim is 39"),
        (["--model.num_key_value_heads", "3"], "multiple of num_key_value_heads"),
        (["--model.dropout", "1.5"], "dropout is 1.5"),
        (["--optimizer.learning_rate", "-1"], "optimizer.learning_rate"),
        (["--optimizer.kind", "lion"], "optimizer.kind"),
        (["--optimizer.muon_learning_rate", "0.02"], "optimizer.kind is adamw"),
        (["--optimizer.kind=muon", "--optimizer.muon_learning_rate=0"], "muon_learning_rate is 0"),
        (["--optimizer.muon_momentum", "1.5"], "optimizer.muon_momentum is 1.5"),
        (["--optimizer.beta1", "1"], "optimizer.beta1 is 1.0; it must be in [0, 1)"),
        (["--run.imports=[5]"], "run.imports"),
        (["--schedule.kind", "linear"], "schedule.kind"),
        (["--data.store", "x", "--data.source", "stdlib"], "one of them"),
        (["--model.preset", "pha-tine"], "pha-tiny"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_refused_in_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(PHAError) as error:
        load_recipe("pha-tiny.stdlib", arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("run: {steps: 3, stepz: 4}", "stepz"),
        ("runs: {steps: 3}", "runs"),
        ("run: {steps: three}", "run.steps"),
        ("run: {imports: mine}", "run.imports is 'mine'; give a list of names"),
        ("- 1", "mapping"),
        ("run: {steps: [", "not YAML"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PHAError) as error:
        load_recipe(str(path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_recipe_suggests() -> None:
    with pytest.raises(PHAError, match=r"pha-tiny\.stdlib"):
        load_recipe("pha-tiny.stdlb")
    with pytest.raises(PHAError, match="does not exist"):
        load_recipe("nowhere.yaml")
