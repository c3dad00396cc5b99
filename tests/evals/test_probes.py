"""Probes asked of models whose answers are known, and their statistics against formulas."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pha.data import TokenStore, prepare
from pha.data.tokenizer import load_tokenizer
from pha.evals.compare import mean_interval
from pha.evals.perplexity import evaluate, score_rows
from pha.evals.probes import PROBES
from pha.evals.probes.reading import Panel, Point, Question, Reading, contrast, estimate, over_seeds
from pha.evals.protocols import Protocol
from pha.loading import LoadedModel
from pha.utils.errors import PHAError
from tests.modeling.common import scrambled, small_config

RIGHT, WRONG = 0.25, 8.0


class Seen:
    """What a copying model has read."""

    def __init__(self) -> None:
        self.ids = torch.empty(0)


class Copier(nn.Module):
    """Knows what followed the two tokens before when they last stood in this order, and no more."""

    longest = None

    def __init__(self, recalls: bool = True) -> None:
        super().__init__()
        self.device, self.recalls = torch.device("cpu"), recalls

    def new_cache(self) -> Seen:
        return Seen()

    def states(self, ids: Tensor, starts: Tensor | None = None, cache: Any = None) -> Tensor:
        past = ids[:, :0] if cache is None or not len(cache.ids) else cache.ids
        whole = torch.cat([past, ids], dim=1)
        if cache is not None:
            cache.ids = whole
        told = torch.full(whole.shape, -1)
        for row, answers in zip(whole.tolist(), told, strict=True):
            known: dict[tuple[int, int], int] = {}
            for place in range(2, len(row)):
                known[row[place - 2], row[place - 1]] = row[place]
                if self.recalls:
                    answers[place] = known.get((row[place - 1], row[place]), -1)
        return told[:, past.shape[1] :, None]

    def token_statistics(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hits = x[:, 0] == targets
        return torch.where(hits, RIGHT, WRONG), hits


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A store whose words are one token each; its test split has a quarter of them."""
    folder = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(0)
    letters = [chr(97 + i) for i in range(26)]
    names = ["".join(rng.choice(letters, 5)) for _ in range(300)]
    for split, known, count in (("train", 300, 9000), ("valid", 75, 200), ("test", 75, 3000)):
        drawn = rng.integers(0, known, count)
        lines = [" The " + " is ".join(names[i] for i in row) + "." for row in drawn.reshape(-1, 5)]
        (folder / f"{split}.txt").write_text("\n".join(lines))
    return prepare(str(folder), "bpe:1240", folder / "store")


def loaded(words: TokenStore, recalls: bool = True) -> LoadedModel:
    return LoadedModel(Path("copier"), cast(Any, Copier(recalls)), words.tokenizer(), None)


def values(reading: Reading, panel: int) -> dict[str, float]:
    return {p.label: contrast(p).mean for p in reading.panels[panel].points}


def test_a_planted_repeat_is_worth_its_nats_to_a_model_that_copies(words: TokenStore) -> None:
    question = Question(words, trained=16, length=100, piece=64)
    gains = values(PROBES["planted"](loaded(words), question, None), 0)
    assert list(gains) == ["0", "64"]
    for gain in gains.values():  # all but the first two of 32 tokens, and what chance repeats
        assert 0.65 * (WRONG - RIGHT) < gain < 30.1 / 32 * (WRONG - RIGHT)
    blind = values(PROBES["planted"](loaded(words, False), question, None), 0)
    assert set(blind.values()) == {0.0}


def test_needles_are_found_by_a_model_that_copies(words: TokenStore) -> None:
    question = Question(words, trained=40, length=200, piece=100)
    reading = PROBES["needles"](loaded(words), question, None)
    assert values(reading, 0) == {"160": WRONG - RIGHT}
    assert set(values(reading, 1).values()) == set(values(reading, 2).values()) == {1.0}
    cells = reading.panels[3].points
    assert len(cells) == 11
    assert {round(p.y or 0.0, 1) for p in cells} == {k / 10 for k in range(11)}
    blind = PROBES["needles"](loaded(words, False), question, None)
    assert set(values(blind, 0).values()) == {0.0}
    assert set(values(blind, 1).values()) == {0.0}  # no value is likelier than another


def test_classes_of_a_model_that_copies(words: TokenStore) -> None:
    reading = PROBES["classes"](loaded(words), Question(words, trained=400, max_tokens=2000), None)
    kinds = values(reading, 0)
    assert kinds["new"] == WRONG
    assert min(v for k, v in kinds.items() if k.startswith("5-gram")) < 1.0
    assert sum(p.tokens for p in reading.panels[0].points) == 1999
    # Of 5-grams; where the copy before was recalled too, it is not among the pairs.
    efficiency = {contrast(p).mean for p in reading.panels[4].points}
    assert max(efficiency) == pytest.approx(1 - RIGHT / WRONG)
    blind = PROBES["classes"](
        loaded(words, False), Question(words, trained=400, max_tokens=2000), None
    )
    assert {contrast(p).mean for p in blind.panels[4].points} == {0.0}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return LoadedModel(
        Path("pha"), scrambled(small_config(vocab_size=257)), load_tokenizer("bytes"), None
    )


def test_rows_in_pieces_are_the_whole(model: LoadedModel) -> None:
    rows = np.random.default_rng(3).integers(0, 257, (3, 101))
    wanted = np.array([0, 1, 30, 31, 32, 77, 99])
    whole, hits = score_rows(model.model, rows, wanted)
    every, _ = score_rows(model.model, rows, np.arange(100))
    assert np.allclose(whole, every[:, wanted], atol=1e-6)
    for piece in (1, 31, 32, 99, 100, 1000):
        nats, found = score_rows(model.model, rows, wanted, piece=piece)
        assert np.allclose(nats, whole, atol=2e-5)
        assert (found == hits).mean() > 0.95  # ties by rounding


def test_loss_by_position_by_hand(model: LoadedModel, store: TokenStore) -> None:
    reading = PROBES["position"](model, Question(store, trained=8, length=40, piece=16), None)
    count = (store.counts("test").tokens - 1) // 40
    long, short = (np.empty(count * 40, dtype=np.float32) for _ in range(2))
    for nats, size in ((long, 40), (short, 8)):
        protocol = Protocol(size, size)
        evaluate(model.model, store, "test", protocol, max_tokens=count * 40, losses=nats)
    by_place = long.reshape(count, 40).astype(np.float64)
    edges = {"1": (0, 1), "2": (1, 2), "3–4": (2, 4), "5–8": (4, 8), "9–16": (8, 16)}
    edges |= {"17–32": (16, 32), "33–40": (32, 40)}
    found = values(reading, 0)
    assert list(found) == list(edges)
    for label, (first, last) in edges.items():
        assert found[label] == pytest.approx(by_place[:, first:last].mean(), abs=1e-5)
    gained = values(reading, 1)
    assert list(gained) == ["9–16", "17–32", "33–40"]
    cut = (long.astype(np.float64) - short).reshape(count, 40)
    assert gained["17–32"] == pytest.approx(cut[:, 16:32].mean(), abs=1e-5)
    assert reading.panels[0].reference == "5–8"


def test_more_context_for_the_same_targets_by_hand(model: LoadedModel, store: TokenStore) -> None:
    reading = PROBES["context"](model, Question(store, trained=32, length=70, piece=20), None)
    points = reading.panels[0].points
    assert [p.label for p in points] == ["8", "16", "32", "64"]
    tokens = store.tokens("test").astype(np.int64)
    spans = len(points[0].sums)
    assert spans > 20
    first = np.linspace(64, len(tokens) - 8, spans).astype(int)
    for point, before in zip(points, (8, 16, 32, 64), strict=True):
        for number in (0, 7, spans - 1):
            start = first[number]
            row = torch.from_numpy(tokens[None, start - before : start + 8])
            with torch.no_grad():
                logits = model.pha(row).logits[0, before - 1 : -1].double()
            loss = nn.functional.cross_entropy(logits, row[0, before:], reduction="sum")
            assert point.sums[number] == pytest.approx(float(loss), rel=1e-4)


def point(rng: np.random.Generator, shift: float = 0.0, label: str = "p") -> Point:
    weights = rng.integers(0, 20, 40).astype(float)
    sums = rng.standard_normal(40) * weights**0.5 + shift * weights
    return Point(label, int(weights.sum()), sums.tolist(), weights.tolist())


def test_a_point_has_the_interval_of_a_comparison() -> None:
    one = point(np.random.default_rng(4), 0.3)
    sums, weights = np.array(one.sums), np.array(one.weights)
    expected = mean_interval(sums[weights > 0], weights[weights > 0])
    found = contrast(one)
    assert (found.mean, found.half_width) == pytest.approx((expected.mean, expected.half_width))
    other = dataclasses.replace(one, sums=(sums + 0.1 * weights).tolist())
    assert contrast(one, other).mean == pytest.approx(-0.1)
    assert contrast(one, other).half_width == pytest.approx(0, abs=1e-12)
    few = dataclasses.replace(
        one, weights=[*weights[:10], *[0.0] * 30], sums=[1.0] * 10 + [0.0] * 30
    )
    assert contrast(few).half_width is None


def test_intervals_of_ratios_hold_the_truth() -> None:
    rng, held, trials = np.random.default_rng(5), 0, 400
    for _ in range(trials):
        found = contrast(point(rng, 0.7), point(rng, 0.5))
        held += found.low <= 0.2 <= found.high
    assert 0.92 <= held / trials <= 0.98


def test_seeds_are_compared_one_by_one() -> None:
    rng = np.random.default_rng(6)
    made = [
        [Reading("x", {}, [Panel("t", "m", [point(rng, s)])]) for s in shifts]
        for shifts in ((0.5, 1.5, 2.5), (0.1, 1.1, 2.1))
    ]
    apart = [
        contrast(a.panels[0].points[0], b.panels[0].points[0]).mean
        for a, b in zip(*made, strict=True)
    ]
    found = estimate(made[0], 0, "p", than=made[1])
    assert found is not None
    assert found.mean == pytest.approx(np.mean(apart))
    width = 4.302652729911275 * np.std(apart, ddof=1) / math.sqrt(3)
    assert found.half_width == pytest.approx(width)
    assert estimate(made[0], 0, "q") is None
    assert over_seeds([contrast(point(rng))]).blocks > 20


def test_what_cannot_be_asked(words: TokenStore, store: TokenStore, model: LoadedModel) -> None:
    copier = loaded(words)
    for name, question, expected in (
        ("position", Question(words, length=10**6), "the length is 1,000,000.*room for 2 to"),
        ("position", Question(words, max_tokens=2), "too few tokens"),
        ("context", Question(words, max_tokens=300), "leave no room for targets"),
        ("planted", Question(words, max_tokens=60), "too few tokens"),
        ("classes", Question(words, max_tokens=4), "too few tokens"),
        ("needles", Question(words, trained=40, length=60), "needles need a context of"),
    ):
        with pytest.raises(PHAError, match=expected):
            PROBES[name](copier, question, None)
    with pytest.raises(PHAError, match=r"needles need 64 frequent words of one token.*has 0"):
        PROBES["needles"](model, Question(store, trained=512, length=1024), None)
