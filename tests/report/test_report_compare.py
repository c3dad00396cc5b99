"""Headline, warnings and rankings: right winners, and none where a ranking would mislead."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pha.report.collect import collect
from pha.report.compare import comparisons, main_split, warnings
from pha.report.headline import headline
from tests.report.conftest import train_records


def set_data(**values: Any):
    return lambda result: result["data"].update(values)


def set_provenance(**values: Any):
    return lambda result: result["provenance"].update(values)


def best_cells(runs) -> dict[str, list[str]]:
    """Column heading and unit -> labels of the runs with the emphasised value."""
    table = comparisons(runs)[0]
    return {
        f"{column.heading} {column.unit}": [
            row.run.label for row, cells in table.rows if cells[index].best
        ]
        for index, column in enumerate(table.columns)
    }


@pytest.mark.parametrize("swap", [False, True])
def test_the_lower_perplexity_wins_wherever_it_stands(make_run, swap):
    paths = [make_run("good", floor=2.9, speed=8000.0), make_run("bad", floor=3.0, speed=10000.0)]
    text = headline(collect(paths[::-1] if swap else paths))
    # exp(-0.1) is 9.5% below; per byte exp(-0.1 / 3.1) is 3.2% below.
    assert text.startswith("good has the lower test perplexity: 20.29 per token, 9.5")
    assert "below bad (22.42)" in text
    assert "2.640 against 2.727 (3.2" in text
    assert "Both saw 4.92M training tokens." in text
    assert "bad trained faster: 10,000 tokens/s against 8,000 for good (+25.0%)" in text
    assert "one seed does not decide" in text


def test_unequal_tokens_are_said(make_run):
    runs = collect(
        [make_run("a"), make_run("b", change=lambda result: result.update(tokens_seen=1_000_000))]
    )
    assert "b 1.00M, so this is not a comparison at equal data" in headline(runs)
    assert best_cells(runs)["Time training"] == []


def test_three_runs_and_an_unfinished_one(make_run):
    paths = [make_run(name, floor=floor) for name, floor in (("a", 3.1), ("b", 2.9), ("c", 3.0))]
    text = headline(collect([*paths, make_run("d", finished=False, steps=100)]))
    assert text.startswith("Of 3 runs, b has the lowest test perplexity")
    assert "the next, c" in text
    assert "the highest, a" in text
    assert "d is unfinished and not part of this comparison." in text


def test_a_single_run_and_a_run_that_only_began(make_run):
    (finished,) = collect([make_run("a")])
    assert headline([finished]).startswith("a reaches a test perplexity of 20.29 per token")
    (begun,) = collect([make_run("b", finished=False, steps=120)])
    assert headline([begun]).startswith("b is unfinished: 1.47M tokens seen so far")
    assert "at step 120" in headline([begun])


def test_seeds_of_one_recipe_are_named_as_such(make_run):
    def change(result: dict[str, Any]) -> None:
        result.update(recipe="same", seed=ord(result["name"]))
        result["model"]["preset"] = "same"

    runs = collect([make_run("a", change=change), make_run("b", floor=2.91, change=change)])
    assert "one recipe with different seeds" in headline(runs)


def test_other_tokenizers_warn_and_are_ranked_per_byte_only(make_run):
    # The hash of a token store covers its ids, so it changes with the tokenizer.
    change = set_data(tokenizer="bytes", tokenizer_sha256="ff" * 32, sha256="00" * 32)
    runs = collect([make_run("a"), make_run("b", floor=3.0, change=change)])
    (warning,) = warnings(runs)
    assert warning.startswith("Token perplexities are not comparable")
    assert "different tokenizers" in warning
    assert "2.640 per byte" in headline(runs)
    assert "per token" not in headline(runs)
    best = best_cells(runs)
    assert best["Perplexity per token"] == []
    assert best["Accuracy next token, %"] == []
    assert best["Bits per byte"] == ["a"]


def test_other_tokenizers_on_another_text_are_not_ranked(make_run):
    def change(result: dict[str, Any]) -> None:
        result["data"].update(tokenizer_sha256="ff" * 32, sha256="00" * 32)
        result["evaluations"][0]["bytes"] += 1

    runs = collect([make_run("a"), make_run("b", floor=3.0, change=change)])
    assert len(warnings(runs)) == 2
    assert "do not say which is better" in headline(runs)
    assert best_cells(runs)["Bits per byte"] == []


def test_a_tokenizer_known_by_name_only_still_warns(make_run):
    change = set_data(tokenizer="gpt2", tokenizer_sha256=None)
    assert warnings(collect([make_run("a"), make_run("b", change=change)]))


def test_other_data_warn_and_are_not_ranked_at_all(make_run):
    runs = collect([make_run("a"), make_run("b", floor=3.0, change=set_data(sha256="00" * 32))])
    (warning,) = warnings(runs)
    assert warning.startswith("Token perplexities are not comparable")
    assert "different data" in warning
    assert "do not say which is better" in headline(runs)
    best = best_cells(runs)
    assert best["Bits per byte"] == []
    assert best["Speed tokens/s"] == []


@pytest.mark.parametrize("change", [lambda result: None, lambda r: r.update(data={})])
def test_equal_or_unknown_hashes_do_not_warn(make_run, change):
    unfinished = make_run("c", finished=False, steps=60)
    runs = collect([make_run("a"), make_run("b", floor=3.0, change=change), unfinished])
    assert warnings(runs) == []
    assert best_cells(runs)["Perplexity per token"] == ["a"]


def test_another_protocol_warns_and_is_not_ranked(make_run):
    def stride(result: dict[str, Any]) -> None:
        result["evaluations"][0]["protocol"]["stride"] = 64

    runs = collect([make_run("a"), make_run("b", floor=3.0, change=stride)])
    (warning,) = warnings(runs)
    assert "but by different evaluation protocols." in headline(runs)
    assert best_cells(runs)["Perplexity per token"] == []
    assert "protocol differs between runs (stride;" in warning


def test_speeds_of_other_hardware_are_not_compared(make_run):
    change = set_provenance(device="cuda", cpu=None)
    runs = collect([make_run("a"), make_run("b", speed=90000.0, change=change)])
    assert "speeds are not compared" in headline(runs)
    assert best_cells(runs)["Speed tokens/s"] == []


def test_each_column_has_its_own_best(make_run):
    def smaller(result: dict[str, Any]) -> None:
        result["peak_memory_bytes"] = 2**30

    runs = collect([make_run("a", speed=9000.0), make_run("b", floor=3.0, change=smaller)])
    best = best_cells(runs)
    assert best["Perplexity per token"] == ["a"]
    assert best["Accuracy next token, %"] == ["a"]
    assert best["Speed tokens/s"] == ["b"]
    assert best["Memory peak"] == ["b"]
    assert best["Parameters total"] == []


def test_figures_from_training_are_marked_and_not_ranked(make_run):
    runs = collect([make_run("a"), make_run("b", floor=3.0)])
    assert main_split(runs) == "test"
    validation = comparisons(runs)[1]
    assert validation.split == "validation"
    assert [row.remark for row, _ in validation.rows] == ["during training, step 400"] * 2
    assert not any(cell.best for _, cells in validation.rows for cell in cells)


def test_runs_without_final_evaluations_are_compared_with_a_remark(make_run):
    paths = [
        make_run(name, floor=floor, change=lambda result: result.update(evaluations=[]))
        for name, floor in (("a", 3.0), ("b", 2.9))
    ]
    text = headline(collect(paths))
    assert text.startswith("b has the lower validation perplexity")
    assert "measured during training" in text


def test_divergence_is_a_warning(make_run):
    path = make_run("a", finished=False, steps=10)
    [record] = train_records(3.0, 1.0, 1)
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record | {"step": 11, "loss": float("nan")}) + "\n")
    (warning,) = warnings(collect([path]))
    assert "from step 11 on" in warning
