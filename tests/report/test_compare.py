"""Warnings, limits and rankings: right winners, and none where a ranking would mislead."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pha.report.collect import Run, collect
from pha.report.compare import Best, comparisons, limits, main_split, warnings
from tests.report.conftest import Change, MakeRun, train_records


def set_data(**values: Any) -> Change:
    return lambda result: result["data"].update(values)


def best_cells(runs: list[Run]) -> dict[str, list[str]]:
    """Measure -> labels of the runs with the emphasised value."""
    table = comparisons(runs)[0]
    return {
        measure.name: [row.run.label for row, cells in table.rows if isinstance(cells[index], Best)]
        for index, measure in enumerate(table.measures)
    }


@pytest.mark.parametrize("swap", [False, True])
def test_each_measure_has_its_own_best_wherever_it_stands(make_run: MakeRun, swap: bool) -> None:
    paths = [
        make_run("a", speed=9000.0),
        make_run("b", floor=3.0, change=lambda result: result.update(peak_memory_bytes=2**30)),
    ]
    best = best_cells(collect(paths[::-1] if swap else paths))
    assert best["perplexity per token"] == ["a"]
    assert best["accuracy"] == ["a"]
    assert best["training tokens/s"] == ["b"]
    assert best["peak memory"] == ["b"]
    assert best["parameters"] == []


def test_unequal_tokens_are_said(make_run: MakeRun) -> None:
    runs = collect([make_run("a"), make_run("b", change=lambda r: r.update(tokens_seen=1_000_000))])
    assert "1.00M to 4.92M training tokens, so this is not a comparison at equal" in limits(runs)
    assert best_cells(runs)["training time"] == []


def test_seeds_are_counted_by_recipe(make_run: MakeRun) -> None:
    def change(result: dict[str, Any]) -> None:
        result.update(recipe="same", seed=ord(result["name"]))
        result["model"]["preset"] = "same"

    a, b = collect([make_run(name, change=change) for name in "ab"])
    runs = [a, replace(b, config=a.config)]
    assert "All are one recipe" in limits(runs)
    assert limits(runs[:1]) == "One seed does not decide which model is better."
    # Of another rate they would be two recipes.
    rates = [a, replace(b, config={**a.config, "optimizer": {"learning_rate": 0.5}})]
    assert limits(rates) == "One seed does not decide which model is better."
    other = collect([make_run("c")])
    assert "One seed" in limits([*runs, *other])
    begun = collect([make_run("d", finished=False, steps=10)])
    assert limits([*runs, *begun]).endswith("Unfinished, and not ranked: d.")
    assert limits(begun) == "Unfinished, and not ranked: d."


def test_other_tokenizers_warn_and_are_ranked_per_byte_only(make_run: MakeRun) -> None:
    # The hash of a token store covers its ids, so it changes with the tokenizer.
    change = set_data(tokenizer="bytes", tokenizer_sha256="ff" * 32, sha256="00" * 32)
    runs = collect([make_run("a"), make_run("b", floor=3.0, change=change)])
    (warning,) = warnings(runs)
    assert warning.startswith("Token perplexities are not comparable")
    best = best_cells(runs)
    assert best["perplexity per token"] == []
    assert best["accuracy"] == []
    assert best["bits per byte"] == ["a"]


def test_other_tokenizers_on_another_text_are_not_ranked(make_run: MakeRun) -> None:
    def change(result: dict[str, Any]) -> None:
        result["data"].update(tokenizer_sha256="ff" * 32, sha256="00" * 32)
        result["evaluations"][0]["bytes"] += 1

    runs = collect([make_run("a"), make_run("b", floor=3.0, change=change)])
    assert len(warnings(runs)) == 2
    assert best_cells(runs)["bits per byte"] == []


def test_a_tokenizer_known_by_name_only_still_warns(make_run: MakeRun) -> None:
    change = set_data(tokenizer="gpt2", tokenizer_sha256=None)
    assert warnings(collect([make_run("a"), make_run("b", change=change)]))


def test_other_data_warn_and_are_not_ranked_at_all(make_run: MakeRun) -> None:
    runs = collect([make_run("a"), make_run("b", floor=3.0, change=set_data(sha256="00" * 32))])
    (warning,) = warnings(runs)
    assert warning.startswith("Perplexities are not comparable")
    best = best_cells(runs)
    assert best["bits per byte"] == []
    assert best["training tokens/s"] == []


@pytest.mark.parametrize("change", [lambda result: None, lambda r: r.update(data={})])
def test_equal_or_unknown_hashes_do_not_warn(make_run: MakeRun, change: Change) -> None:
    unfinished = make_run("c", finished=False, steps=60)
    runs = collect([make_run("a"), make_run("b", floor=3.0, change=change), unfinished])
    assert warnings(runs) == []
    assert best_cells(runs)["perplexity per token"] == ["a"]


def test_another_protocol_warns_and_is_not_ranked(make_run: MakeRun) -> None:
    def stride(result: dict[str, Any]) -> None:
        result["evaluations"][0]["protocol"]["stride"] = 64

    runs = collect([make_run("a"), make_run("b", floor=3.0, change=stride)])
    (warning,) = warnings(runs)
    assert "protocol differs between runs (stride;" in warning
    assert best_cells(runs)["perplexity per token"] == []


def test_speeds_of_other_hardware_are_not_compared(make_run: MakeRun) -> None:
    def change(result: dict[str, Any]) -> None:
        result["provenance"].update(device="cuda", cpu=None)

    runs = collect([make_run("a"), make_run("b", speed=90000.0, change=change)])
    assert best_cells(runs)["training tokens/s"] == []


@pytest.mark.parametrize("change", [lambda result: None, lambda r: r.update(evaluations=[])])
def test_figures_from_training_are_marked_and_not_ranked(make_run: MakeRun, change: Change) -> None:
    runs = collect([make_run("a", change=change), make_run("b", floor=3.0, change=change)])
    tables = comparisons(runs)
    assert tables[0].split == main_split(runs)
    validation = tables[-1]
    assert validation.split == "validation"
    assert [row.remark for row, _ in validation.rows] == ["during training, step 400"] * 2
    assert not any(
        isinstance(cell, Best)
        for _, cells in validation.rows
        for cell, measure in zip(cells, validation.measures, strict=True)
        if measure.basis in ("tokenizer", "data")
    )


def test_divergence_is_a_warning(make_run: MakeRun) -> None:
    path = make_run("a", finished=False, steps=10)
    [record] = train_records(3.0, 1.0, 1)
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record | {"step": 11, "loss": float("nan")}) + "\n")
    (warning,) = warnings(collect([path]))
    assert "from step 11 on" in warning
