"""Generation: draws against an oracle, batches against single texts, what ends a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pha.evals.generation import Continuation, Sampling, Speed, draw, generate, sample
from pha.loading import LoadedModel, load_model
from pha.utils.errors import PHAError

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
@pytest.mark.parametrize("vocabulary", [1, 7, 1500])  # 1500: more than the first candidates
def test_draws_follow_the_nucleus(vocabulary: int, temperature: float, top_p: float) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    points = 4000
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    drawn = draw(logits.expand(points, -1), uniform, temperature, top_p)
    shares = np.bincount(drawn.numpy(), minlength=vocabulary) / points
    expected = nucleus(logits.numpy(), temperature, top_p)
    # An interval of the unit line holds its length's share of a regular grid, give or take a point.
    assert np.abs(shares - expected).max() <= 1.01 / points
    assert (shares[expected == 0] == 0).all()


def test_the_smallest_and_the_largest_number_draw_the_ends() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, -2.0]]).expand(2, -1)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform, 1.0, 1.0).tolist() == [1, 3]
    assert draw(logits, uniform, 1.0, 0.9).tolist() == [1, 2]


def texts(loaded: LoadedModel, prompts: list[str], sampling: Sampling, **settings: Any) -> list:
    return list(generate(loaded, prompts, sampling, **settings))


def test_temperature_0_is_greedy(writer: LoadedModel) -> None:
    [result] = texts(writer, ["one two"], Sampling(20, temperature=0))
    ids = torch.tensor([writer.tokenizer("one two")["input_ids"]])
    for _ in range(20):
        ids = torch.cat([ids, writer.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert result.text == writer.tokenizer.decode(ids[0, 7:], skip_special_tokens=True)
    assert len(set(ids[0, 7:].tolist())) > 2


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


def test_logits_behind_a_batch_are_those_of_single_prompts(writer: LoadedModel) -> None:
    ids = [writer.tokenizer(text)["input_ids"] for text in ("one", "seven or eight")]
    width = max(map(len, ids))
    padded = torch.tensor([[256] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    logits = writer.model(padded, attention_mask=mask).logits[:, -1]
    for row, single in zip(logits, ids, strict=True):
        expected = writer.model(torch.tensor([single])).logits[0, -1]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)


def test_samples_differ_by_seed_and_number_and_by_nothing_else(writer: LoadedModel) -> None:
    first = texts(writer, PROMPTS, Sampling(16, 1.0), num_samples=3, batch_size=4)
    assert [(c.index, c.sample) for c in first] == [(i, s) for i in range(5) for s in range(3)]
    assert texts(writer, PROMPTS, Sampling(16, 1.0), num_samples=3, batch_size=15) == first
    fewer = texts(writer, PROMPTS, Sampling(16, 1.0), num_samples=2)
    assert fewer == [c for c in first if c.sample < 2]
    other = texts(writer, PROMPTS, Sampling(16, 1.0, seed=1), num_samples=3)
    assert len({c.text for c in first} | {c.text for c in other}) == 30


def test_sample_is_one_text_of_generate(writer: LoadedModel) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    result = sample(writer, "one", max_new_tokens=12, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert result == sample(writer, "one", max_new_tokens=12, seed=5)
    [expected] = texts(writer, ["one"], Sampling(12, seed=5))
    assert result == {
        "prompt": "one",
        "text": expected.text,
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": 5,
    }


def test_a_stop_string_ends_a_text_before_itself(writer: LoadedModel) -> None:
    [whole] = texts(writer, ["one two"], Sampling(40, 1.0))
    place = len(whole.text) // 2
    stop = whole.text[place : place + 2]
    [stopped] = texts(writer, ["one two"], Sampling(40, 1.0, stop=("never there", stop)))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (whole.finish, stopped.finish) == ("length", "stop")
    assert stopped.new_tokens < whole.new_tokens == 40


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


def test_what_is_written_is_the_text(writer: LoadedModel) -> None:
    parts: list[str] = []
    [result] = texts(writer, ["one"], Sampling(48, 1.0), write=parts.append)
    assert "".join(parts) == result.text
    assert len([part for part in parts if part]) > 10


def test_speed_counts_tokens_steps_and_bytes(writer: LoadedModel) -> None:
    speed = Speed()
    results = texts(
        writer, ["abcd", "ab", "abcdef"], Sampling(9, 1.0), batch_size=2, speed=speed, num_samples=1
    )
    assert all(isinstance(c, Continuation) and c.new_tokens == 9 for c in results)
    assert (speed.prompt_tokens, speed.decode_tokens, speed.decode_steps) == (12, 24, 16)
    facts = speed.to_dict()
    weights = {p.data_ptr(): p.numel() * 4 for p in writer.model.state_dict().values()}
    assert speed.weight_bytes == sum(weights.values())
    read = 16 * speed.weight_bytes / speed.decode_seconds
    assert facts["decode_weight_bytes_per_second"] == pytest.approx(read)
    assert facts["decode_tokens_per_second"] == pytest.approx(24 / speed.decode_seconds)
    assert facts["prefill_tokens_per_second"] == pytest.approx(12 / speed.prefill_seconds)
    assert Speed().to_dict()["decode_tokens_per_second"] == 0


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
    half = load_model(folder, dtype=torch.bfloat16).model
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in half.named_parameters()}
    assert kinds["log_A"] == kinds["theta"] == torch.float32
    assert half.model.embed_tokens.weight.dtype == torch.bfloat16
    half.save_pretrained(folder)
    again = load_model(folder).model
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    [result] = texts(LoadedModel(folder, half, writer.tokenizer, None), ["one"], Sampling(8))
    assert result.new_tokens == 8
