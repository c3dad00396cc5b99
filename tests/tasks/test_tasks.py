"""Tasks: every label is right by what the tokens say, and the distribution is as stated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pha.tasks import IGNORE, TASKS, make_task
from pha.tasks.sampler import TaskSampler
from pha.tasks.task import generator, words_tokenizer
from pha.tasks.testing import make_tests
from pha.utils.errors import PHAError

Answers = dict[int, tuple[str, int]]
"""Place -> the word that is right there, and where it was read."""


def read_pairs(words: list[str], queries: int) -> Answers:
    """Reads pairs up to the last `queries` of them, which ask for what was read last."""
    begin = next(i for i, word in enumerate(words) if word[0] == "k")
    known: dict[str, tuple[str, int]] = {}
    found: Answers = {}
    first = len(words) - 2 * queries
    for i in range(begin, len(words) - 1):
        if i >= first and words[i] in known and (i - first) % 2 == 0:
            found[i] = known[words[i]]
        elif words[i][0] == "k" and i < first:
            known[words[i]] = words[i + 1], i + 1
    return found


def read_zoology(words: list[str], queries: int) -> Answers:
    known = {words[i]: (words[i + 1], i + 1) for i in range(0, 2 * queries, 2)}
    return {i: known[words[i]] for i in range(2 * queries, len(words)) if words[i] in known}


def read_gist(words: list[str], _: int) -> Answers:
    return {i: (words[i + 1], i) for i in range(len(words) - 1)}


def read_bits(words: list[str], _: int) -> Answers:
    bit, found = ("", 0), {}
    assert words[0] == "write"
    assert words[-2] == "read"
    for i in range(0, len(words), 2):
        if words[i] == "write":
            bit = words[i + 1], i + 1
        elif words[i] == "read":
            found[i] = bit
            assert words[i + 1] == bit[0]
    return found


def read_parity(words: list[str], _: int) -> Answers:
    return {i: (("even", "odd")[words[: i + 1].count("1") % 2], i) for i in range(len(words))}


def read_trigger(words: list[str], _: int) -> Answers:
    place = words.index("trigger")
    assert words[-1] == "trigger"
    assert words.count("trigger") == 2
    return {len(words) - 1: (words[place + 1], place + 1)}


def read_marks(words: list[str], _: int) -> Answers:
    data = [(word, i) for i, word in enumerate(words) if word[0] == "w"]
    return dict(zip((i for i, word in enumerate(words) if word == "mark"), data, strict=True))


def read_book(words: list[str], queries: int) -> Answers:
    lines = [i for i, word in enumerate(words) if word.startswith("first")]
    book = {tuple(words[i : i + 2]): i for i in lines[:-queries]}
    assert len(book) == len(lines) - queries
    found = {}
    for i in lines[-queries:]:
        entry = book[tuple(words[i : i + 2])]
        for digit in range(words[i:].index(";") - 3):
            found[i + 2 + digit] = words[entry + 3 + digit], entry + 3 + digit
    return found


Oracle = Callable[[list[str], int], Answers]
CASES: list[tuple[str, dict[str, Any], int, Oracle, int]] = [
    ("mqar", {"pairs": [5], "keys": 9, "values": 4}, 45, read_pairs, 5),
    ("mqar", {"pairs": [5], "keys": 9, "updates": 3, "gap": [2, 7]}, 50, read_pairs, 5),
    ("mqar-zoology", {"sizes": [[40, 6]], "vocabulary": 64, "random_filler": False}, 80,
     read_zoology, 6),
    ("gist", {"size": 5, "redraw": 0.1}, 30, read_gist, 0),
    ("flip-flop", {"ignore": 0.5}, 40, read_bits, 0),
    ("parity", {}, 20, read_parity, 0),
    ("induction", {}, 12, read_trigger, 0),
    ("selective-copy", {"items": 5}, 24, read_marks, 0),
    ("phone-book", {"names": 4, "entries": 6, "queries": 3, "digits": 2}, 60, read_book, 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "length", "oracle", "queries"), CASES)
def test_labels_are_what_the_tokens_say(
    name: str, options: dict[str, Any], length: int, oracle: Oracle, queries: int
) -> None:
    task = make_task(name, options)
    task.check(length)
    words = task.words()
    assert len(set(words)) == len(words)
    drawn = task.draw(generator(1), 20, length)
    assert len(drawn.tokens) % 20 == 0
    assert drawn.tokens.shape == drawn.labels.shape
    for row in range(len(drawn.tokens)):
        answers = oracle([words[i] for i in drawn.tokens[row]], queries)
        asked = np.flatnonzero(drawn.labels[row] != IGNORE)
        if name == "gist":  # whose last answer comes after the end
            asked = asked[:-1]
        assert asked.tolist() == sorted(answers)
        for i in asked.tolist():
            word, place = answers[i]
            assert words[drawn.labels[row, i]] == word
            if drawn.distances is not None:
                assert drawn.distances[row, i] == i - place > 0


def test_zoology_asks_at_the_stated_odds() -> None:
    """The share of sequences with a query in each slot, against draws one by one."""
    drawn = make_task("mqar-zoology", {"sizes": [[16, 2]], "vocabulary": 32, "power": 0.3}).draw(
        generator(3), 8000, 16
    )
    share = (drawn.labels[:, 4::2] != IGNORE).mean(0)
    odds = np.arange(1, 7) ** (0.3 - 1)
    odds /= odds.sum()
    rest = odds / (1 - odds)
    expected = odds + odds * (rest.sum() - rest)
    assert np.abs(share - expected).max() < 0.02
    values = [row[row != IGNORE] for row in drawn.labels[:200]]
    assert all(len(set(row)) == 2 for row in values)


def test_values_of_mqar_may_repeat_and_gaps_reach_both_ends() -> None:
    task = make_task("mqar", {"pairs": [4], "values": 2, "gap": [1, 3]})
    drawn = task.draw(generator(0), 400, 32)
    assert drawn.distances is not None
    assert all(1 <= len(set(row[row != IGNORE])) <= 2 for row in drawn.labels)
    # The value of the last pair, where it is asked first, stands right before the gap.
    nearest = drawn.distances[:, 24]
    assert {2, 4} <= set(nearest)
    assert nearest.min() == 2


def naive_best(x: np.ndarray, task: Any) -> list[float]:
    """Bayes by the sum over all ways to cut the tokens before into segments."""

    def evidence(tokens: tuple[int, ...]) -> float:
        total, c = 0.0, task.concentration
        for cuts in range(1 << (len(tokens) - 1)):
            p, counts, seen = 1.0, [0] * task.size, 0
            for t, token in enumerate(tokens):
                if t and cuts >> (t - 1) & 1:
                    counts, seen = [0] * task.size, 0
                if t:
                    p *= task.redraw if cuts >> (t - 1) & 1 else 1 - task.redraw
                p *= (counts[token] + c) / (seen + task.size * c)
                counts[token] += 1
                seen += 1
            total += p
        return total

    whole = [evidence(tuple(x[: t + 1])) for t in range(len(x))]
    return [-math.log(b / a) for a, b in itertools.pairwise(whole)]


@pytest.mark.parametrize("redraw", [0.0, 0.2])
def test_best_predictor_is_that_of_bayes(redraw: float) -> None:
    task: Any = make_task("gist", {"size": 3, "redraw": redraw})
    drawn = task.draw(generator(5), 3, 8)
    best = task.best(drawn)
    for row in range(3):
        x = np.append(drawn.tokens[row], drawn.labels[row, -1])
        assert best[row] == pytest.approx(naive_best(x, task))


def test_best_predictor_beats_any_other_on_average() -> None:
    task: Any = make_task("gist", {"redraw": 1 / 32})
    drawn = task.draw(generator(6), 20, 256)
    stationary: Any = make_task("gist", {})
    assert task.best(drawn).mean() < stationary.best(drawn).mean() - 0.1
    assert stationary.best(stationary.draw(generator(6), 20, 256)).mean() < math.log(64) - 1


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_batch_is_a_function_of_seed_and_step(name: str) -> None:
    task, length = make_task(name, {}), TASKS[name].length
    sampler = TaskSampler(task, length, 4, seed=7)
    whole = sampler.batch(5)
    parts = [TaskSampler(task, length, 4, seed=7).batch(5, *piece) for piece in ((0, 1), (1, 4))]
    sampler.batch(6)
    for again in (sampler.batch(5), *parts):
        assert again.labels == whole.labels == int((whole.targets != IGNORE).sum())
    for field in ("inputs", "targets"):
        joined = torch.cat([getattr(part, field) for part in parts])
        assert torch.equal(joined, getattr(whole, field))
        assert torch.equal(getattr(sampler.batch(5), field), getattr(whole, field))
    other = [TaskSampler(task, length, 4, 8).batch(5), sampler.batch(6)]
    assert not any(torch.equal(each.inputs, whole.inputs) for each in other)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tests_are_the_same_for_all_and_no_training_batch(name: str) -> None:
    kind = TASKS[name]
    test = make_tests(name, {}, kind.tests, kind.length)[0]

    def rows(**limits: Any) -> list[np.ndarray]:
        return [row for block, counts in test.blocks(**limits) if counts for row in block.tokens]

    first = rows(for_validation=False, rows=40)
    shares = [rows(for_validation=False, rows=40, share=(i, 2)) for i in range(2)]
    as_bytes = [sorted(row.tobytes() for row in each) for each in (first, shares[0] + shares[1])]
    assert as_bytes[0] == as_bytes[1]
    assert not set(as_bytes[0]) & {row.tobytes() for row in rows(for_validation=True, rows=40)}


def test_the_tokenizer_gives_back_what_it_is_given() -> None:
    words = make_task("phone-book", {}).words()
    tokenizer = words_tokenizer(words)
    text = tokenizer.decode(range(len(words)))
    assert text == " ".join(words)
    assert tokenizer(text)["input_ids"] == list(range(len(words)))


@pytest.mark.parametrize(
    ("name", "options", "tests", "said"),
    [
        ("mqra", {}, {}, "no task 'mqra'; choose mqar"),
        ("mqar", {"pears": [4]}, {}, "no option 'pears'"),
        ("mqar", {"pairs": 4}, {}, "pairs is 4, not of type list"),
        (
            "mqar",
            {"keys": 99, "pairs": [65]},
            {},
            "65 pairs .* take 260 tokens, more than the length of 256",
        ),
        ("mqar", {"pairs": [4], "updates": 5}, {}, "updates is 5"),
        ("mqar", {"gap": [3]}, {}, "gap is"),
        ("mqar", {"gap": []}, {}, "gap is"),
        ("mqar", {"odds": [1.0]}, {}, "odds has 1 numbers for 4"),
        ("mqar", {}, {"far": {"pairs": [4], "rows": 0}}, "data.tests: far: rows is 0"),
        ("mqar", {}, {"far": {"peers": 4}}, "data.tests: far: task mqar has no option 'peers'"),
        ("mqar-zoology", {"sizes": [[64, 17]]}, {}, "17 pairs and their queries need 68"),
        ("flip-flop", {"ignore": 1.0}, {}, "ignore is 1.0"),
        ("phone-book", {"entries": 100}, {}, "100 entries and 4 queries take 832 tokens"),
        ("selective-copy", {"items": 200}, {}, "200 items"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(
    name: str, options: dict[str, Any], tests: dict[str, Any], said: str
) -> None:
    with pytest.raises(PHAError, match=said) as error:
        make_tests(name, options, tests, 256)
    assert "\n" not in str(error.value)
