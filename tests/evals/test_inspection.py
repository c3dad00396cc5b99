"""What `pha inspect` finds, against sums by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pha.data import TokenStore
from pha.data.tokenizer import load_tokenizer
from pha.evals.inspection import Inspection, inspect_model, inspect_weights
from pha.evals.probes import PROBES, Question
from pha.loading import LoadedModel
from pha.model.silence import branches_of, cut, silenced
from pha.report.probes import probe_tables
from pha.utils.errors import PHAError
from pha.utils.text import DASH
from tests.cli.conftest import Pha, Refused
from tests.cli.conftest import pha as pha
from tests.cli.conftest import refused as refused
from tests.modeling.common import scrambled, small_config

T, WINDOWS = 16, 24


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Mean vectors of a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pha.evals.probes.branches.MEAN_TOKENS", 1000)
        yield


@pytest.fixture(scope="module")
def found(writer: LoadedModel, store: TokenStore) -> Inspection:
    with torch.random.fork_rng():
        start = scrambled(small_config(vocab_size=257), seed=7).eval()
    return inspect_model(writer, store, "test", length=T, tokens=T * WINDOWS + 3, start=start)


def losses(loaded: LoadedModel, store: TokenStore) -> torch.Tensor:
    """(windows, T) of the first windows of the test split."""
    ids = torch.from_numpy(store.tokens("test")[: T * WINDOWS + 1].astype("int64"))
    with torch.inference_mode():
        logits = loaded.model(ids[:-1].view(-1, T)).logits
    targets = ids[1:].view(-1, T)
    return -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def test_probes_and_inspections_agree(
    found: Inspection, writer: LoadedModel, store: TokenStore
) -> None:
    question = Question(store, "test", T, max_tokens=T * WINDOWS + 3)
    state, attention = PROBES["horizon"](writer, question, None).panels
    for panel, name in ((state, "gss"), (attention, "attention")):
        probed = [sum(p.sums) / sum(p.weights) for p in panel.points]
        inspected = [each.nats.mean for each in found.horizons if each.branch == name]
        assert probed == pytest.approx(inspected, abs=1e-9)
        assert [p.x for p in panel.points] == [1, 4]
    [panel] = PROBES["need"](writer, question, None).panels
    needed = {p.label: sum(p.sums) / sum(p.weights) for p in panel.points}
    for each in found.need:
        where = "all layers" if each.layer is None else f"layer {each.layer}"
        nats = needed.pop(f"{each.branch}, {where}")
        assert nats == pytest.approx(each.nats["mean"].mean, abs=1e-9)
    assert not needed


def test_models_of_other_branches_stand_side_by_side(
    writer: LoadedModel, store: TokenStore
) -> None:
    config = small_config(vocab_size=257, branches=["gss", "extended_gss", "attention"])
    two = LoadedModel(Path("two"), scrambled(config).requires_grad_(False), writer.tokenizer, None)
    question = Question(store, "test", T, max_tokens=T * WINDOWS)
    [table] = probe_tables(
        {name: [PROBES["need"](each, question, None)] for name, each in (("a", writer), ("b", two))}
    )
    rows = {row[0]: row[2:] for row in table.sections[0].rows}
    assert {row[1] for row in table.sections[0].rows} == {f"{T * WINDOWS}"}
    assert rows["aux_ffn, layer 0"][1] == rows["extended_gss, layer 0"][0] == DASH
    assert DASH not in rows["gss, layer 0"]
    state, attention = PROBES["horizon"](two, question, None).panels
    assert [p.label for p in state.points] == [p.label for p in attention.points] == ["1", "4"]


def test_need_is_the_rise_of_the_loss(
    found: Inspection, writer: LoadedModel, store: TokenStore
) -> None:
    whole = losses(writer, store)
    assert found.loss == pytest.approx(float(whole.mean()), abs=1e-5)
    assert found.protocol["tokens_scored"] == T * WINDOWS
    by_place = {(each.layer, each.branch): each.nats for each in found.need}
    assert set(by_place) == {
        (layer, name) for layer in (None, 0, 1) for name in ("gss", "attention", "aux_ffn")
    }
    for layers, key in (([1], (1, "gss")), ([0, 1], (None, "gss"))):
        for mode in ("zero", "renormalised"):
            with silenced(writer.pha.model, [(layer, "gss") for layer in layers], mode):
                rise = losses(writer, store) - whole
            nats = by_place[key][mode]
            assert nats.mean == pytest.approx(float(rise.mean()), abs=1e-5)
            error = float(rise.mean(1).std()) / math.sqrt(WINDOWS)
            assert nats.half_width == pytest.approx(2.069 * error, rel=1e-3)  # t, 23 degrees
    assert "resample" in by_place[None, "gss"]
    assert len(found.control) == 5
    assert found.agreement is not None
    assert -1 <= found.agreement[0] <= 1


def test_horizons_close_in_on_the_whole(found: Inspection) -> None:
    assert [(each.branch, each.window) for each in found.horizons] == [
        (name, window) for name in ("gss", "attention") for window in (1, 4)
    ]
    assert all(abs(each.nats.mean) > 1e-3 for each in found.horizons if each.window == 1)


def test_hand_off_sums(found: Inspection, writer: LoadedModel, store: TokenStore) -> None:
    every, seen, new = found.hand_off
    assert every.count == T * WINDOWS // 2 == seen.count + new.count
    for total, a, b in (
        (every.whole, seen.whole, new.whole),
        (every.dropped["gss"], seen.dropped["gss"], new.dropped["gss"]),
    ):
        assert total * every.count == pytest.approx(a * seen.count + b * new.count)
    assert every.whole == pytest.approx(float(losses(writer, store)[:, T // 2 :].mean()), abs=1e-5)
    with cut(writer.pha.model, ["attention"], T // 2):
        dropped = float(losses(writer, store)[:, T // 2 :].mean())
    assert every.dropped["attention"] == pytest.approx(dropped, abs=1e-5)
    for each in found.hand_off:
        rho, worth = each.rho["gss"], each.deleted - each.whole
        if worth > 0:
            assert rho == pytest.approx(1 - (each.dropped["gss"] - each.whole) / worth)
        else:
            assert rho is None


def test_half_lives_are_those_of_the_formula(found: Inspection, writer: LoadedModel) -> None:
    branch: Any = branches_of(writer.pha.model)[1, "gss"]
    rate = branch.log_dt.double().exp().repeat_interleave(16) * branch.log_A.double().exp()
    half_lives = math.log(2) / rate
    weights = branch.W_C.weight.double().norm(dim=0)
    report = next(r for r in found.branches if (r.layer, r.branch) == (1, "gss"))
    assert report.memory is not None
    assert report.before is not None
    assert report.memory.longest == pytest.approx(float(half_lives.max()), rel=1e-4)
    for share, value in zip((0.1, 0.5, 0.9), report.memory.quantiles, strict=True):
        below = float(weights[half_lives < value * 0.999].sum() / weights.sum())
        upto = float(weights[half_lives < value * 1.001].sum() / weights.sum())
        assert below <= share <= upto
    above = float(weights[half_lives > 32].sum() / weights.sum())
    assert report.memory.above["32"] == pytest.approx(above, abs=1e-6)
    assert report.before.quantiles != report.memory.quantiles


def test_attention_shows_temperatures_and_entropy(found: Inspection, writer: LoadedModel) -> None:
    report = next(r for r in found.branches if (r.layer, r.branch) == (0, "attention"))
    branch: Any = branches_of(writer.pha.model)[0, "attention"]
    assert report.temperatures == pytest.approx(branch.logit_scale.exp().tolist())
    assert report.entropy is not None
    assert 0 < report.entropy < math.log(T)
    assert report.memory is None
    assert report.share is not None


def test_other_blocks_and_mixers(store: TokenStore) -> None:
    options = {"mamba2": {"state_size": 8, "head_size": 8}}
    config = small_config(
        vocab_size=257, block="sequential", branches=["mamba2"], branch_options=options
    )
    model = scrambled(config).requires_grad_(False)
    loaded = LoadedModel(Path("mamba2"), model, load_tokenizer("bytes"), None)
    found = inspect_model(loaded, store, "test", length=8, tokens=32)
    assert found.agreement is None
    assert {mode for each in found.need for mode in each.nats} == {"mean", "zero", "resample"}
    assert not found.control
    assert found.hand_off[0].rho["mamba2"] in (None, pytest.approx(0, abs=1e-4))
    assert found.branches[0].memory is not None
    assert inspect_weights(model)[0].weight is None
    with pytest.raises(PHAError, match=r"32 of .* make 1 windows of 20, and 2 are needed"):
        inspect_model(loaded, store, "test", length=20, tokens=32)


def test_the_verb_prints_and_draws(
    writer: LoadedModel, store: TokenStore, tmp_path: Path, pha: Pha, refused: Refused
) -> None:
    model = tmp_path / "model"
    writer.model.save_pretrained(model)
    writer.tokenizer.save_pretrained(model)
    words = ("inspect", model, "--data", store.path, "--sequence-length", 8, "--tokens", 200)
    printed = pha(*words, "--out", tmp_path / "out")
    for title in ("half-life", "need: rise of the loss", "horizon", "hand-off", "Kendall"):
        assert title in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {f"inspection-{what}" for what in ("half-lives", "horizon", "need")}
    assert names == {"inspection.json", *(f"{p}.{end}" for p in pictures for end in ("svg", "png"))}
    kept = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert len(kept["branches"]) == 6
    alone = json.loads(pha("inspect", model, "--json"))
    assert alone["loss"] is None
    assert len(alone["branches"]) == 6

    evaluation = ("eval", model, "--data", store.path, "--sequence-length", 32, "--json")
    plain, narrow = (json.loads(pha(*evaluation, *w)) for w in ([], ["--attention", "window=2"]))
    assert narrow["attention"] == {"window": 2}
    assert narrow["loss"] != plain["loss"]
    for text, words_ in (
        ("window=1025", "beyond the 1024 that attention saw in training"),
        ("window=1", "attention_window is 1"),
        ("positions=sideways", "choose rotary or alibi or none"),
        ("tau=3", "--attention tau=3: write window=N"),
    ):
        assert words_ in refused(*evaluation, "--attention", text)
