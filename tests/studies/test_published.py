"""Published figures: complete, marked where they do not compare, and told apart from ours."""

from __future__ import annotations

import pytest

from pha.model.presets import PAPER_PARAMETERS
from pha.studies.published import find_published, footnotes, published_tables
from pha.studies.tabulate import published_cell
from pha.utils.errors import PHAError


def test_every_table_is_there() -> None:
    sizes = {name: len(rows) for name, rows in published_tables().items()}
    assert sizes == {
        "table-2": 9,
        "table-3": 11,
        "from-scratch": 8,
        "table-4": 3,
        "table-5": 6,
        "table-6": 2,
        "table-7": 6,
        "table-8": 4,
        "table-9": 10,
    }


def test_rows_that_do_not_compare_say_why() -> None:
    rows = [row for table in published_tables().values() for row in table]
    assert {row.unit for row in rows} == {"bpe", "word", "wordpiece"}
    for row in rows:
        if row.unit != "bpe":
            assert not row.like_for_like
    by_id = {row.id: row for row in rows}
    assert "fine-tuned" in by_id["table-2/hedgehog"].reason
    assert "zero-shot" in by_id["table-2/gpt-2-small"].reason
    assert by_id["table-2/hyena-3"].like_for_like
    assert by_id["table-3/s4"].unit == "word"
    assert all(row.like_for_like for row in find_published(["from-scratch"]))


def test_the_authors_models_have_their_sizes() -> None:
    for row in find_published(["table-4"]):
        assert row.parameters == PAPER_PARAMETERS[row.id.removeprefix("table-4/")]


def test_shares_sum_to_one_and_average_as_printed() -> None:
    rows = [row.values for row in find_published(["table-9"])]
    for row in rows:
        assert sum(row.values()) == pytest.approx(100, abs=0.11)
    means = {name: sum(row[name] for row in rows) / 10 for name in rows[0]}
    assert means == pytest.approx({"gss": 46.9, "attention": 31.2, "aux_ffn": 21.9}, abs=0.06)


def test_gains_are_those_that_the_paper_prints() -> None:
    gains = {"table-8/2048": 5.5, "table-8/4096": 12.4, "table-8/8192": 23.9}
    for name, gain in gains.items():
        (row,) = find_published([name])
        base, hybrid = row.values["throughput"]
        assert 100 * (hybrid / base - 1) == pytest.approx(gain, abs=0.06)


def test_marks_belong_to_reasons() -> None:
    rows = find_published(["table-2", "table-2/hedgehog"])
    assert len(rows) == 9
    marks = footnotes(rows)
    assert len(set(marks.values())) == len(marks) == len({row.reason for row in rows} - {""})


def test_cells_stand_in_the_column_of_their_unit() -> None:
    word, bpe, piece = find_published(["table-3/alibi", "table-3/pha-180m", "table-2/bert-cas"])
    assert published_cell(word, "test") == "–"
    assert published_cell(word, "word") == "18.30"
    assert published_cell(bpe, "test") == "16.42 ± 0.09"
    # About 26 per word: 16.42 ** (286221 / 245569).
    assert published_cell(bpe, "word") == "≈ 26.1"
    assert published_cell(piece, "test") == "39.85 (WordPiece)"
    assert published_cell(piece, "word") == "–"


def test_an_unknown_row_is_refused_with_the_nearest() -> None:
    with pytest.raises(PHAError, match="did you mean table-2/hyena-3"):
        find_published(["table-2/hyena3"])
