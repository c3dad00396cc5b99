"""The page as a whole: numbers equal the inputs, nothing is executed or loaded."""

from __future__ import annotations

import json
import os
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pha.report.collect import collect, fact_groups
from pha.report.page import write_report
from pha.utils.errors import PHAError
from tests.report.conftest import MakeRun, scores

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> & \x00\x1b[31m {{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags with attributes, rows of tables as texts, and whether tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self._cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self._cell = False

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


@pytest.fixture
def two(make_run: MakeRun) -> list[Path]:
    """Two finished runs with nothing to plot, which makes a page quick."""
    return [make_run(name, branches=("attention",), metrics=False) for name in ("pha", "twin")]


def written(runs: list[Path], out: Path, title: str | None = None) -> str:
    return write_report(runs, out, title).read_text(encoding="utf-8")


def test_numbers_equal_the_inputs(two_runs: list[Path], two_page: str) -> None:
    page = Page(two_page)
    (row,) = [row for row in page.rows if row[0].endswith("pha") and len(row) == 12]
    test = json.loads((two_runs[0] / "result.json").read_text())["evaluations"][0]
    assert [cell.removesuffix(" (best)") for cell in row[1:]] == [
        "3,104,256",
        "4,915,200",
        f"{test['perplexity']:.2f}",
        f"{test['word_perplexity']:.1f}",
        f"{test['byte_perplexity']:.4f}",
        f"{test['bits_per_byte']:.4f}",
        f"{100 * test['accuracy']:.2f}%",
        "9,120",
        "31%",
        "1.73 GB",
        "8 min 59 s",
    ]
    facts = {row[0].removesuffix(" Δ differs"): row[1:] for row in page.rows if len(row) == 3}
    assert facts["parameters, total"] == ["3,104,256"] * 2
    assert facts["tokens scored"] == ["286,220"] * 2
    assert facts["sha256"] == ["3f0a" * 16] * 2
    assert facts["seed"] == ["1234"] * 2
    assert facts["git dirty"] == ["no"] * 2
    assert facts["counts, train, tokens"] == ["9,120,331"] * 2
    assert facts["model, layers"] == ["4", "10"]
    assert "optimizer, learning rate" not in facts


def test_the_page_is_well_formed_and_self_contained(two_page: str) -> None:
    html = two_page
    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"@import|url\((?!#)", html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(html) < 1_500_000
    for tag, attributes in page.tags:
        if tag == "th":
            assert attributes.get("scope") in ("col", "row", "rowgroup")


def test_texts_are_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    def inject(result: dict[str, Any]) -> None:
        result["name"] = HOSTILE
        result["samples"][0].update(prompt=HOSTILE, text=HOSTILE)
        result["provenance"]["command"] = HOSTILE
        result["data"][HOSTILE] = HOSTILE
        result["mixing"][0]["weights"][HOSTILE] = 0.1
        result["evaluations"][0]["split"] = HOSTILE

    run = make_run("a", metrics=False, change=inject)
    (run / "config.yaml").write_text('text: "<script>\\ud800"\n', encoding="utf-8")
    html = written([run], tmp_path / "report.html", title=HOSTILE)
    page = Page(html)
    assert page.open == []
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "\x00" not in html
    assert "\x1b" not in html
    sample = unescape(html.partition('<figure class="sample">')[2])
    assert "<b></pre><script>alert(1)</script>" in sample
    assert "\u2400\u241b[31m {{ 7 * 7 }}" in sample


def test_mixing_is_shown_where_there_is_something_to_mix(two_page: str) -> None:
    assert two_page.count("Heat map: softplus weights of pha in 4 layers") == 1
    assert two_page.count("Heat map: effective shares of pha in 4 layers") == 1
    assert "Heat map: softplus weights of twin" not in two_page
    assert two_page.count("has a single branch, so there is nothing to mix") == 1
    assert two_page.count("over training: mean over layers") == 2


def test_branches_may_have_any_name(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", branches=("gss", "attention", "retrieval"), metrics=False)
    html = written([run], tmp_path / "report.html")
    assert ">retrieval<" in html
    assert "over training" not in html


def test_an_unfinished_run_is_shown(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("begun", branches=("attention",), finished=False, steps=130)
    html = written([run], tmp_path / "report.html")
    assert '<span class="state">unfinished</span>' in html
    assert "during training, step 120" in html
    assert "Loss against tokens seen. begun: from" in html


def test_values_that_a_run_lacks_are_dashes(make_run: MakeRun, tmp_path: Path) -> None:
    def lose(result: dict[str, Any]) -> None:
        result["evaluations"][0].update(dict.fromkeys(scores(1.0), float("nan")))

    run = make_run("bare", metrics=False, change=lose)
    page = Page(written([run], tmp_path / "report.html"))
    (row,) = [row for row in page.rows if "bare" in row[0] and len(row) == 12]
    assert row[3:8] == ["–"] * 5


def test_only_a_config_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    assert "unfinished" in written([tmp_path], tmp_path / "report.html")


def test_the_warning_is_on_the_page_exactly_when_hashes_differ(
    two: list[Path], make_run: MakeRun, tmp_path: Path
) -> None:
    def change(result: dict[str, Any]) -> None:
        result["data"]["tokenizer_sha256"] = "00" * 32

    other = make_run("other", branches=("attention",), metrics=False, change=change)
    assert "not comparable" not in written(two, tmp_path / "report.html")
    html = written([*two, other], tmp_path / "report.html")
    assert re.search(r'class="warning"[^>]*>.*Token perplexities are not comparable', html)


def test_the_same_runs_give_the_same_bytes(
    two_runs: list[Path], two_page: str, tmp_path: Path
) -> None:
    assert written(two_runs, tmp_path / "again.html") == two_page


def test_the_title_is_given_or_made_of_the_names(two: list[Path], tmp_path: Path) -> None:
    assert "<h1>pha and twin</h1>" in written(two, tmp_path / "a.html")
    assert "<h1>Ours &amp; theirs</h1>" in written(two, tmp_path / "a.html", "Ours & theirs")


def test_the_write_is_atomic(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.html"
    out.write_text("old", encoding="utf-8")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(PHAError, match=r"cannot be written \(No space left on device\)"):
        write_report(two, out)
    assert out.read_text(encoding="utf-8") == "old"


def test_out_must_be_a_file(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PHAError, match="is a folder"):
        write_report(two, tmp_path)


def test_the_weights_that_were_chosen_among_are_shown(make_run: MakeRun) -> None:
    def average(result: dict) -> None:
        evaluation = result["evaluations"][0]
        result["chosen"] = "average"
        result["candidates"] = [
            {
                "name": name,
                "steps": steps,
                "validation_perplexity": perplexity,
                "evaluation": evaluation | {"perplexity": perplexity + 0.25},
            }
            for name, steps, perplexity in (
                ("best checkpoint", [300], 31.5),
                ("average", [300, 200, 400], 30.125),
            )
        ]

    path = make_run("a", change=average)
    facts = {fact.name: fact.values for fact in fact_groups(collect([path]))["Weights"]}
    assert facts["chosen"] == ["average"]
    assert facts["average, steps"] == ["300, 200, 400"]
    assert facts["average, validation perplexity"] == ["30.125"]
    assert facts["best checkpoint, test perplexity"] == ["31.750"]
    assert "Weights" not in fact_groups(collect([make_run("b")]))


def test_warnings_and_where_spikes_began_are_shown(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", branches=("attention",))
    layer = {"rms": 1.5, "largest": 9.0, "gradient": 1e-4, "branches": {}}
    records: list[dict[str, Any]] = [
        {"kind": "watch", "step": step, "layers": [layer] * 4, "leaving": 2.0, "mixing": []}
        for step in (1, 50, 100)
    ]
    spike = {"kind": "warning", "step": 61, "what": "loss spike", "layer": 2, "began": 57}
    records.append(spike | {"message": "the loss is 9 after 3; it began in <layer> 2"})
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"tokens": 0} | record) + "\n" for record in records)
    other = make_run("b", branches=("attention",), metrics=False)
    html = written([run, other], tmp_path / "report.html")
    assert Page(html).open == []
    begun = "the loss is 9 after 3; it began in &lt;layer&gt; 2"
    assert f"<li>Step 61, <strong>loss spike</strong>: {begun}</li>" in html
    assert "Dashed: steps at which spikes began, 57." in html
    assert html.count("This run was not watched.") == 1
