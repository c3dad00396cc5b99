"""Generation: draws against an oracle, batches against single texts, what ends a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import GenerationConfig, PreTrainedTokenizerFast, StopStringCriteria

from pha.data.tokenizer import load_tokenizer
from pha.evals.generation import (
    Continuation,
    Sampling,
    Speed,
    draws,
    ended,
    generate,
)
from pha.loading import LoadedModel, load_model
from pha.utils.errors import PHAError

BYTES = load_tokenizer("bytes")
# Merges of a and b, so that a stop string begins and ends inside tokens.
MERGED = load_tokenizer("bpe:266", ["abab aabb abba bbaa babb aaba bbab " * 4])
PROMPTS = ["one two three four", "", "é", "a much longer prompt than all of the others here", "x"]


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Probabilities of the smallest set of tokens with `top_p`, renormalised."""
    scaled = logits.astype(np.float64) / temperature
    probability = np.exp(scaled - scaled.max())
    probability /= probability.sum()
    kept: list[int] = []
    for token in np.argsort(-probability):
        if kept and probability[kept].sum() >= top_p:
            break
        kept.append(int(token))
    result = np.zeros_like(probability)
    result[kept] = probability[kept] / probability[kept].sum()
    return result


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_draws_follow_the_nucleus(temperature: float, top_p: float) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(1))
    rows = 4000
    chain = draws([[7, row] for row in range(rows)], Sampling(1, temperature, top_p))
    drawn = chain(torch.zeros(rows, 1, dtype=torch.long), logits.repeat(rows, 1)).argmax(-1)
    counts = np.bincount(drawn.numpy(), minlength=9)
    expected = nucleus(logits.numpy(), temperature, top_p)
    assert (counts[expected == 0] == 0).all()
    assert counts.sum() == rows
    kept = expected > 0
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept], rows * expected[kept]).pvalue > 1e-3


def texts(loaded: LoadedModel, prompts: list[str], sampling: Sampling, **settings: Any) -> list:
    return list(generate(loaded, prompts, sampling, **settings))


def test_temperature_0_is_greedy(writer: LoadedModel) -> None:
    [result] = texts(writer, ["one two"], Sampling(20, temperature=0))
    ids = torch.tensor([writer.tokenizer("one two")["input_ids"]])
    for _ in range(20):
        ids = torch.cat([ids, writer.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert result.text == writer.tokenizer.decode(ids[0, 7:], skip_special_tokens=True)
    assert len(set(ids[0, 7:].tolist())) > 2


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 3},
        {"repetition_penalty": 50.0},
        {"repetition_penalty": 0},
        {"min_new_tokens": "many"},
        {"bad_words_ids": [["x"]]},
        {"penalty_alpha": 1},
    ],
)
def test_settings_beside_a_model_change_no_text(writer: LoadedModel, own: dict[str, Any]) -> None:
    asked = Sampling(12, temperature=0)
    expected = texts(writer, ["one two"], asked)
    kept = writer.model.generation_config
    writer.model.generation_config = changed = GenerationConfig.from_dict(kept.to_dict() | own)
    try:
        assert texts(writer, ["one two"], asked) == expected
        assert writer.model.generation_config is changed
    finally:
        writer.model.generation_config = kept


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_does_not_depend_on_its_batch(writer: LoadedModel, temperature: float) -> None:
    sampling = Sampling(24, temperature, top_p=0.9, seed=3)
    alone = [texts(writer, [prompt], sampling)[0].text for prompt in PROMPTS]
    for size in (1, 2, 5):
        together = texts(writer, PROMPTS, sampling, batch_size=size)
        assert [c.text for c in together] == alone
        assert [c.index for c in together] == list(range(5))
    backwards = texts(writer, PROMPTS[::-1], sampling, batch_size=3)
    assert [c.text for c in backwards] == alone[::-1]
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_prompts_can_be_read_in_pieces(writer: LoadedModel, piece: int) -> None:
    widths = []
    forward = writer.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    whole = texts(writer, PROMPTS, Sampling(12, temperature=0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer.model, "forward", watched)
        assert texts(writer, PROMPTS, Sampling(12, temperature=0.0), piece=piece) == whole
    assert max(widths) == min(piece, max(len(prompt) for prompt in PROMPTS))


def test_samples_differ_by_seed_and_number_and_by_nothing_else(writer: LoadedModel) -> None:
    first = texts(writer, PROMPTS, Sampling(16, 1.0), num_samples=3, batch_size=4)
    assert [(c.index, c.sample) for c in first] == [(i, s) for i in range(5) for s in range(3)]
    assert texts(writer, PROMPTS, Sampling(16, 1.0), num_samples=3, batch_size=15) == first
    fewer = texts(writer, PROMPTS, Sampling(16, 1.0), num_samples=2)
    assert fewer == [c for c in first if c.sample < 2]
    other = texts(writer, PROMPTS, Sampling(16, 1.0, seed=1), num_samples=3)
    assert len({c.text for c in first} | {c.text for c in other}) == 30


def test_the_global_random_state_is_left_alone(writer: LoadedModel) -> None:
    before = torch.get_rng_state()
    texts(writer, ["one"], Sampling(12, seed=5))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_string_ends_a_text_before_itself(writer: LoadedModel) -> None:
    [whole] = texts(writer, ["one two"], Sampling(40, 1.0))
    place = len(whole.text) // 2
    stop = whole.text[place : place + 2]
    [stopped] = texts(writer, ["one two"], Sampling(40, 1.0, stop=("never there", stop)))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (whole.finish, stopped.finish) == ("length", "stop")
    assert stopped.new_tokens < whole.new_tokens == 40
    # One that begins in the prompt is none.
    across = Sampling(40, 1.0, stop=("two" + whole.text[:2],))
    assert texts(writer, ["one two", "é"], across)[0] == whole


def test_an_end_of_text_token_ends_a_text(writer: LoadedModel) -> None:
    results, longer = (
        texts(writer, ["one"], Sampling(count, 2.0), num_samples=64, batch_size=64)
        for count in (64, 65)
    )
    ended = [c for c in results if c.finish == "end-of-text"]
    # About one in 257 tokens, so some of 64 texts of 64 and not all.
    assert 0 < len(ended) < 64
    for continuation in ended:
        assert longer[continuation.sample] == continuation
        assert continuation.new_tokens <= 64
        assert "endoftext" not in continuation.text
    assert {c.new_tokens for c in longer if c not in ended} <= {65}


@pytest.mark.parametrize("stop", [(), ("never there",)])
def test_what_is_written_is_the_text(writer: LoadedModel, stop: tuple[str, ...]) -> None:
    parts: list[str] = []
    [result] = texts(writer, ["one"], Sampling(48, 1.0, stop=stop), write=parts.append)
    assert "".join(parts) == result.text


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first (the longest of those)."""
    for end in range(1, len(text) + 1):
        sizes = [len(s) for s in stop if text[:end].endswith(s)]
        if sizes:
            return text[: end - max(sizes)], True
    return text, False


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])
@given(
    text=st.text("ab é", min_size=1, max_size=30),
    stop=st.lists(st.text("ab é", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_its_stop_string(
    tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str]
) -> None:
    row = tokenizer(text)["input_ids"]
    found, count, finish = ended(tokenizer, row, stop)
    assert (found, finish == "stop") == cut(text, stop)
    # No token more than it takes, and these are the ones at which transformers stops.
    assert any(s in tokenizer.decode(row[:count]) for s in stop) == (finish == "stop")
    if stop:
        criterion = StopStringCriteria(tokenizer, stop)
        ends = [n for n in range(1, len(row) + 1) if criterion(torch.tensor([row[:n]]), None)]
        assert count == (ends[0] if ends else len(row))
        assert bool(ends) == (finish == "stop")


def test_speed_counts_tokens_and_steps(writer: LoadedModel, steps: list[int]) -> None:
    speed = Speed()
    results = texts(writer, ["abcd", "ab", "abcdef"], Sampling(9, 1.0), batch_size=2, speed=speed)
    assert all(isinstance(c, Continuation) and c.new_tokens == 9 for c in results)
    assert (speed.prompt_tokens, speed.decode_tokens, speed.decode_steps) == (12, 24, 16)
    assert len(steps) == speed.decode_steps  # all by the compiled instructions
    assert speed.prefill_seconds > 0
    assert speed.decode_seconds > 0


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda w: Sampling(max_new_tokens=0), "new tokens is 0"),
        (lambda w: Sampling(temperature=-1), "temperature is -1"),
        (lambda w: Sampling(temperature=float("nan")), "temperature is nan"),
        (lambda w: Sampling(top_p=0), "top-p is 0"),
        (lambda w: Sampling(top_p=1.1), "top-p is 1.1"),
        (lambda w: Sampling(seed=-1), "seed is -1"),
        (lambda w: Sampling(stop=("",)), "stop string is empty"),
        (lambda w: generate(w, ["x"], Sampling(), num_samples=0), "samples is 0"),
        (lambda w: generate(w, ["x"], Sampling(), batch_size=0), "at a time is 0"),
        (lambda w: generate(w, ["x"], Sampling(), piece=-1), "is -1 tokens"),
        (lambda w: generate(w, ["x"], Sampling(temperature=0), num_samples=2), "temperature 0"),
    ],
)
def test_bad_settings_are_refused_at_once(
    writer: LoadedModel, make: Callable[[LoadedModel], Any], expected: str
) -> None:
    with pytest.raises(PHAError, match=expected):
        make(writer)


def test_weights_load_in_either_type_whatever_they_are_saved_in(
    writer: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    writer.model.save_pretrained(folder)
    writer.tokenizer.save_pretrained(folder)
    half = load_model(folder, dtype=torch.bfloat16).pha
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in half.named_parameters()}
    assert kinds["log_A"] == kinds["theta"] == torch.float32
    assert half.model.embed_tokens.weight.dtype == torch.bfloat16
    half.save_pretrained(folder)
    again = load_model(folder).model
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    [result] = texts(LoadedModel(folder, half, writer.tokenizer, None), ["one"], Sampling(8))
    assert result.new_tokens == 8
