"""Power laws over sizes: exponents, their intervals, and what a model gains over the first."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from pha.data import TokenStore
from pha.studies import laws
from pha.studies.definition import load_study, parse_study, scales
from pha.studies.drawing import draw
from pha.studies.outcome import Outcome, Row, Seed
from pha.studies.planning import plan_study
from pha.train.recipes import load_recipe
from pha.utils.errors import PHAError
from tests.studies.test_tasks import result

FLOPS = {"S": 1e12, "M": 1e13, "L": 4e13, "XL": 3e14}


def bits(model: str, size: str) -> float:
    """0.9 of A's for B in the smallest, and 0.01 less for ten times the FLOPs; A has a power."""
    base = 5 * FLOPS[size] ** -0.04
    return base if model == "A" else base * 0.9 * 10 ** (-0.01 * math.log10(FLOPS[size] / 1e12))


def outcome(
    tmp_path: Path, store: TokenStore, noise: float = 0.0, lost: tuple[str, ...] = ()
) -> Outcome:
    variants = {
        f"{model}/{size}": {
            **{"label": f"{model}, {size}", "base": model, "places": {"size": size}},
            **{"model": "pha", "set": {"model.hidden_size": 32 * (1 + n), "run.steps": 4 + k}},
        }
        for k, model in enumerate("AB")
        for n, size in enumerate(FLOPS)
    }
    given = {"title": "Laws", "question": "?", "kind": "laws", "axis": "size", "plots": ["laws"]}
    study = parse_study("s", given | {"variants": variants})
    plan = plan_study(study, scales()["tiny"], [0, 1], tmp_path, {"data.store": str(store.path)})
    draws = np.random.default_rng(0)
    rows = []
    for variant in study.variants:
        seeds = []
        for seed in plan.seeds:
            size = variant.places["size"]
            run = result({"test": 0.5}, None, None)
            of_token = replace(run.model, flops_per_token=FLOPS[size] / run.tokens_seen)
            found = bits(variant.base, size) * math.exp(noise * draws.normal())
            gone = variant.name in lost
            seeds.append(
                Seed(seed, tmp_path, None, {}, 3)
                if gone
                else Seed(seed, tmp_path, replace(run, model=of_token), {"bits": found}, None)
            )
        rows.append(Row(variant, seeds))
    return Outcome(plan, rows, [])


def test_a_law_that_holds_is_found_with_no_interval(tmp_path: Path, store: TokenStore) -> None:
    a, b = laws.laws_of(outcome(tmp_path, store))
    assert (a.label, b.label, a.gap) == ("A", "B", None)
    assert a.flops == pytest.approx(list(FLOPS.values()))
    assert a.line is not None
    assert b.gap is not None
    assert (a.line.slope, a.line.slope_interval) == pytest.approx((-0.04, 0.0), abs=1e-8)
    assert [a.line.power(x) for x in a.flops] == pytest.approx(a.bits)
    assert b.gap.slope == pytest.approx(-0.01)
    middle = np.mean(np.log(list(FLOPS.values())))
    assert b.gap.middle == pytest.approx(middle)
    assert b.gap.height == pytest.approx(math.log(0.9) - 0.01 * (middle - math.log(1e12)))


def test_intervals_are_those_of_least_squares() -> None:
    draws = np.random.default_rng(1)
    x = draws.normal(size=7) + 3
    y = 2 * x + draws.normal(size=7)
    found = laws.fit(list(x), list(y))
    assert found is not None
    t, (line, covariance) = stats.t.ppf(0.975, 5), np.polyfit(x - x.mean(), y, 1, cov=True)
    assert (found.slope, found.height) == pytest.approx(tuple(line))
    slope, height = t * np.sqrt(np.diag(covariance))
    assert (found.slope_interval, found.height_interval) == pytest.approx((slope, height))
    assert laws.fit([1, 2], [1, 2]) is None
    assert laws.fit([1, 1, 1], [1, 2, 3]) is None


def test_models_need_several_sizes() -> None:
    given = {"title": "Laws", "question": "?", "kind": "laws", "axis": "size"}
    with pytest.raises(PHAError, match="go along an axis"):
        parse_study("s", given | {"variants": {"a": {"model": "pha"}}})
    alone = {str(n): {"model": "pha", "places": {"size": str(n)}} for n in range(4)}
    with pytest.raises(PHAError, match="3 or more sizes to a model"):
        parse_study("s", given | {"variants": alone})


def test_table_sentences_and_picture(tmp_path: Path, store: TokenStore) -> None:
    of = outcome(tmp_path, store, noise=0.01, lost=("A/S",))
    table, sentences, record = laws.analyse(of)
    Console(width=120, quiet=True).print(table)
    assert [row[1] for row in table.sections[0].rows] == ["3", "4"]
    assert len(sentences) == 1
    assert sentences[0].startswith("The bits per byte of B differ from those of A by -1")
    assert record["B"]["gap"]["height"] == pytest.approx(math.log(0.9) - 0.039, abs=0.03)
    draw(of, tmp_path)
    assert (tmp_path / "laws.png").stat().st_size > 5000
    few = outcome(tmp_path, store, lost=("B/S", "B/M"))
    table, sentences, _ = laws.analyse(few)
    assert table.sections[0].rows[1][4:] == ["–", "–", "–"]
    assert not sentences
    draw(few, tmp_path)


def test_models_of_a_size_have_as_many_parameters_and_flops(
    tmp_path: Path, store: TokenStore
) -> None:
    from pha.costs import training_flops
    from pha.model.parameters import count_parameters

    study = load_study("plus-scaling")
    plan = plan_study(study, scales()["tiny"], [0], tmp_path, {"data.store": str(store.path)})
    sizes: dict[str, list[tuple[int, float, float]]] = {}
    for variant in study.variants:
        (job,) = plan.runs[variant.name]
        config = load_recipe(job.recipe, job.settings)
        model = replace(config.model, vocab_size=8192)
        parts = count_parameters(model)
        own, flops = sum(parts.values()) - parts["embedding"], config.run.flops
        assert flops is not None
        seen = flops / training_flops(model, 256) / own
        sizes.setdefault(variant.places["size"], []).append((own, flops, seen))
        assert own / 1e6 == pytest.approx(float(variant.places["size"].rstrip("M")), abs=0.07)
    assert len(sizes) == 5
    for models in sizes.values():
        counts = [each for each, _, _ in models]
        assert len(models) == 4
        assert len({flops for _, flops, _ in models}) == 1
        assert max(counts) < 1.01 * min(counts)
        assert models[0][2] == pytest.approx(1.47, abs=0.02)
