"""Studies of tasks: seeds are counted and ordered, and never averaged."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pha.model.parameters import count_parameters
from pha.results import Evaluation, ModelSize, Parameters, Part, RunResult
from pha.studies import tasks
from pha.studies.definition import load_study, parse_study, scales
from pha.studies.drawing import draw
from pha.studies.measures import measure_all
from pha.studies.outcome import Outcome, Row, Seed
from pha.studies.planning import plan_study
from pha.studies.study import record
from pha.train.recipes import load_recipe

VARIANTS = {
    "a": {"label": "A", "model": "task-pha"},
    "b": {"label": "B", "model": "task-gss"},
}


def evaluation(label: str, accuracy: float, best: float | None = None) -> Evaluation:
    near, far = (Part(10, 2.0 - a, a, best) for a in (accuracy, accuracy / 2))
    scores = {"loss": 1.5, "perplexity": math.exp(1.5), "accuracy": accuracy}
    words = dict.fromkeys(("word_perplexity", "byte_perplexity", "bits_per_byte"), math.nan)
    return Evaluation(
        **(scores | words),
        split=label,
        tokens=20,
        words=math.nan,
        bytes=math.nan,
        seconds=1.0,
        protocol={},
        best=best,
        parts={"1": near, "16": far},
    )


def result(accuracies: dict[str, float], step: int | None, best: float | None) -> RunResult:
    return RunResult(
        name="run",
        recipe=None,
        seed=0,
        steps=100,
        tokens_seen=1000,
        seconds=1.0,
        tokens_per_second=1.0,
        utilisation=0.5,
        matmul_flops=1e9,
        peak_memory_bytes=1,
        chosen_step=1,
        model=ModelSize(None, Parameters(1000, 1, 999, {}), 4096, 1.0),
        evaluations=[evaluation(label, each, best) for label, each in accuracies.items()],
        best_validation_perplexity=1.0,
        solved_step=step,
        mixing=[],
        samples=[],
        data={"source": "task mqar", "sha256": "0"},
        provenance={},
    )


def outcome(tmp_path: Path, best: float | None = None) -> Outcome:
    study = parse_study(
        "s",
        {
            **{"title": "Recall", "question": "?", "kind": "tasks", "protocol": "mqar"},
            **{"variants": VARIANTS, "plots": ["tests", "state", "distances"]},
        },
    )
    plan = plan_study(study, scales()["tiny"], [0, 1, 2, 3], tmp_path, {})
    accuracy = {"a": (0.95, 1.0, 0.02, 0.91), "b": (0.5, 0.1, 0.3, 0.2)}
    steps = {"a": (40, 20, None, None), "b": (None,) * 4}
    rows = []
    for variant in study.variants:
        seeds = []
        for seed, job in enumerate(plan.runs[variant.name]):
            solved = accuracy[variant.name][seed]
            one = result({"32": solved, "4": solved / 2}, steps[variant.name][seed], best)
            seeds.append(Seed(seed, job.out, one, measure_all(one), None))
        rows.append(Row(variant, seeds))
    return Outcome(plan, rows, [])


def test_seeds_are_counted_with_a_binomial_interval(tmp_path: Path) -> None:
    table, sentences, found = tasks.analyse(outcome(tmp_path))
    assert (found["a"]["solved"], found["b"]["solved"]) == (3, 0)
    assert found["b"]["interval"] == pytest.approx([0.0, 1 - 0.025 ** (1 / 4)])
    # The fourth was solved after the last evaluation during training: by the end, at 100.
    assert found["a"]["steps"] == [40, 20, 100]
    assert found["a"]["tests"] == pytest.approx({"32": 93.0, "4": 46.5})
    assert sentences == [
        "A solves it with 3 of 4 seeds, after 40 (20 to 100) steps.",
        "B does not solve it with 4 seeds.",
    ]
    console = Console(width=120, record=True, quiet=True)
    console.print(table)
    assert "3 of 4 (19% to 99%)" in table.to_markdown()
    assert "word" not in record(outcome(tmp_path))["variants"][0]["measures"]


def test_where_the_best_is_known_scores_are_above_it(tmp_path: Path) -> None:
    given = outcome(tmp_path, best=1.25)
    table, sentences, found = tasks.analyse(given)
    assert found["a"]["tests"]["32"] == pytest.approx(0.25)
    assert sentences[0].startswith("A is 0.250 nats above the best predictor on test 32")
    assert " of 4 (" not in table.to_markdown()  # nothing that is solved or not
    assert "0.250" in table.to_markdown()
    assert tasks.score_label(given) == "nats above the best predictor"
    first, *others = given.rows
    lost = replace(first.seeds[0], result=None, measures={}, diverged_at=3)
    row = replace(first, seeds=[lost, *first.seeds[1:]])
    _, [said, _], _ = tasks.analyse(replace(given, rows=[row, *others]))
    assert said.endswith("the median of 3 seeds.")


def test_plots_are_drawn_of_tests_state_and_distances(tmp_path: Path) -> None:
    files = draw(outcome(tmp_path), tmp_path)
    names = ["tests", "state", "distances"]
    assert [file.name for file in files] == [f"{n}.{e}" for n in names for e in ("svg", "png")]
    svg = (tmp_path / "tests.svg").read_text()
    assert ">B<" in svg
    assert (tmp_path / "distances.svg").read_text().count("test ") >= 2


def test_models_of_tasks_have_the_same_parameters() -> None:
    sizes = {}
    for variant in load_study("recall").variants:
        model = scales()["tiny"].model(variant.model)
        settings = scales()["tiny"].set | model.set
        config = load_recipe(f"{model.preset}.mqar", settings).model
        sizes[variant.name] = sum(count_parameters(replace(config, vocab_size=128)).values())
    deep = sizes.pop("attention-deep")
    first = sizes["pha"]
    assert all(abs(size / first - 1) < 0.01 for size in sizes.values())
    assert deep / first == pytest.approx(1.02, abs=0.002)
