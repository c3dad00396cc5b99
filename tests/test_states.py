"""States in files: the same bit for bit, and refused where they do not belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pha.caching import PHACache
from pha.data.tokenizer import load_tokenizer
from pha.evals.generation import Sampling, Speed, generate
from pha.loading import LoadedModel
from pha.modeling import PHAForCausalLM
from pha.states import State, load_state, read_text, save_state
from pha.utils.errors import PHAError
from tests.conftest import synthetic_text
from tests.modeling.common import padded_batch, scrambled, small_config

PREFIX = synthetic_text(8, 3)
KINDS: dict[str, dict[str, Any]] = {
    "pha": {},
    "window": {"attention_window": 7},
    "windows of layers": {
        "layer_pattern": [["gss", {"attention": {"window": w}}] for w in (5, 9)],
    },
    "gss": {"branches": ["gss"]},
    "attention": {"branches": ["attention"]},
    "delta": {"branches": ["gated_deltanet", "attention"]},
}


def load(**fields: Any) -> LoadedModel:
    model = scrambled(small_config(vocab_size=257, **fields)).requires_grad_(False)
    return LoadedModel(Path("model"), model, load_tokenizer("bytes"), None)


def tensors_of(cache: PHACache) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            for x in value.values() if isinstance(value, dict) else [value]:
                if isinstance(x, torch.Tensor):
                    found.append(x.clone())
    return found


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("pha", torch.bfloat16)]
)
def test_a_loaded_state_is_the_one_saved(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = load(**KINDS[kind])
    model, path = loaded.pha.to(dtype), tmp_path / "state"
    state = read_text(loaded, [PREFIX[:50], PREFIX[50:]], piece=16)
    save_state(path, state, model, loaded.tokenizer)
    again = load_state(path, model, loaded.tokenizer)
    assert again.texts == state.texts
    assert again.texts[0].tokens == len(PREFIX)
    ids = torch.randint(257, (1, 30), generator=torch.Generator().manual_seed(0))
    for piece in ids.split([1, 1, 20, 8], 1):
        logits, expected = (
            model(piece, past_key_values=each.cache).logits for each in (again, state)
        )
        assert torch.equal(logits, expected)
    assert again.cache.get_seq_length() == len(PREFIX) + 30
    # Going on from a file is going on.
    further = read_text(loaded, ["and more"], load_state(path, model))
    assert [text.tokens for text in further.texts] == [len(PREFIX), 8]


@pytest.mark.parametrize("kind", ["pha", "window", "delta"])
def test_one_past_serves_many_prompts(kind: str) -> None:
    loaded, sampling = load(**KINDS[kind]), Sampling(6, temperature=0)
    prompts = ["one", "six", "é and"]
    whole = [generate(loaded, [PREFIX + prompt], sampling) for prompt in prompts]
    past, speed = read_text(loaded, [PREFIX], piece=32).cache, Speed()
    before = tensors_of(past)
    found = list(generate(loaded, prompts, sampling, past=past, piece=2, speed=speed))
    assert [c.text for c in found] == [c.text for [c] in map(list, whole)]
    assert [(c.prompt, c.index) for c in found] == list(zip(prompts, range(3), strict=True))
    assert speed.prompt_tokens == sum(len(prompt.encode()) for prompt in prompts)
    assert all(map(torch.equal, tensors_of(past), before))


def test_compiled_decoding_leaves_the_past_alone(steps: list[int]) -> None:
    loaded = load()
    past = read_text(loaded, [PREFIX]).cache
    loaded.model(torch.tensor([[65]]), past_key_values=past)  # which has room for more by now
    before = tensors_of(past)
    prompts = ["one", "six", "two"]
    found = list(generate(loaded, prompts, Sampling(8, temperature=0), past=past))
    assert steps
    assert all(map(torch.equal, tensors_of(past), before))
    alone = [
        generate(loaded, [prompt], Sampling(8, temperature=0), past=past) for prompt in prompts
    ]
    assert [c.text for c in found] == [c.text for [c] in map(list, alone)]


def test_padding_stays_hidden(tmp_path: Path) -> None:
    model = load().pha
    ids, mask = padded_batch((9, 4), 9)
    cache = model.new_cache()
    assert isinstance(cache, PHACache)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(PHAError, match="holds padding"):
        save_state(tmp_path / "state", State(cache), model)
    with pytest.raises(PHAError, match="attention_mask is"):
        save_state(tmp_path / "state", State(cache, attention_mask=mask[:, 1:]), model)
    save_state(tmp_path / "state", State(cache, attention_mask=mask), model)
    again = load_state(tmp_path / "state", model)
    assert again.attention_mask is not None
    assert torch.equal(again.attention_mask, mask.bool())
    with pytest.raises(PHAError, match="holds padding"):
        model(ids[:, :1], past_key_values=again.cache)
    whole = torch.nn.functional.pad(mask, (0, 1), value=1)
    logits, expected = (
        model(ids[:, :1], attention_mask=whole, past_key_values=each).logits
        for each in (again.cache, cache)
    )
    assert torch.equal(logits, expected)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    loaded = load()
    save_state(tmp_path / "state", read_text(loaded, ["a text"]), loaded.pha, loaded.tokenizer)
    return tmp_path / "state"


def other_weights() -> PHAForCausalLM:
    model = load().pha
    model.get_parameter("model.norm.weight")[3] += 1e-3
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: load().pha.bfloat16(), r"in float32, .* are bfloat16: load them in that type"),
        (other_weights, "of another model"),
        (lambda: load(hidden_size=48).pha, "of another model"),
        (lambda: load(attention_window=5).pha, "in another configuration"),
    ],
)
def test_states_of_others_are_refused(
    saved: Path, model: Callable[[], PHAForCausalLM], message: str
) -> None:
    with pytest.raises(PHAError, match=message) as error:
        load_state(saved, model())
    assert "\n" not in str(error.value)


def test_another_tokenizer_is_refused(saved: Path) -> None:
    tokenizer = load_tokenizer("bpe:260", ["abab aabb " * 4])
    with pytest.raises(PHAError, match="another tokenizer"):
        load_state(saved, load().pha, tokenizer)
    load_state(saved, load().pha)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["pha_state"])
    tensors = load_file(path)
    change(record, tensors)
    save_file(tensors, path, {"pha_state": json.dumps(record)})


DAMAGES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "newer": (lambda record, _: record.update(format=99), "newer pha, format 99"),
    "tokens": (lambda record, _: record.update(tokens=5), "is damaged"),
    "kind": (lambda record, _: record.update(tokens="5"), "not of type int"),
    "field": (lambda record, _: record.pop("digest"), "is damaged"),
    "value": (lambda _, tensors: tensors["0.keys"].add_(1), "is damaged"),
    "missing": (lambda _, tensors: tensors.pop("1.values"), "is damaged"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_changed_files_are_refused(saved: Path, what: str) -> None:
    change, message = DAMAGES[what]
    rewrite(saved, change)
    with pytest.raises(PHAError, match=message):
        load_state(saved, load().pha)


def test_damaged_files_are_refused(saved: Path) -> None:
    data = saved.read_bytes()
    flipped = bytearray(data)
    flipped[-5] ^= 1
    for content in (data[:-1], data[:20], b"", b"no state at all", bytes(flipped)):
        saved.write_bytes(content)
        with pytest.raises(PHAError, match="is damaged or no state"):
            load_state(saved, load().pha)
    saved.unlink()
    with pytest.raises(PHAError, match="there is no file"):
        load_state(saved, load().pha)


def test_tensors_of_other_shapes_are_refused_whatever_is_said_of_them(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pha.states._digest", lambda record, tensors: "same")
    loaded = load()
    save_state(saved, read_text(loaded, ["a text"]), loaded.pha)
    whole = saved.read_bytes()
    for name, change in {
        "0.keys": lambda x: x[:, :, 1:],
        "1.values": lambda x: x.bfloat16(),
        "0.state.0": lambda x: x[:, 1:],
        "1.state.0": lambda x: x.expand(2, -1),
    }.items():
        saved.write_bytes(whole)
        rewrite(
            saved,
            lambda _, t, n=name, c=change: t.update({n: c(t[n]).contiguous()}),  # type: ignore[misc]
        )
        with pytest.raises(PHAError, match="is damaged"):
            load_state(saved, loaded.pha)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    loaded = load()
    with pytest.raises(PHAError, match="has read nothing"):
        save_state(tmp_path / "state", State(PHACache(config=loaded.pha.config)), loaded.pha)
    with pytest.raises(PHAError, match="has no tokens"):
        read_text(loaded, [""])
    state, book = read_text(loaded, ["a text"]), tmp_path / "book.txt"
    book.write_text("a book")
    with pytest.raises(PHAError, match="is no state and would be lost"):
        save_state(book, state, loaded.pha)
    assert book.read_text() == "a book"
    save_state(tmp_path / "state", state, loaded.pha)
    assert (tmp_path / "state").stat().st_mode == book.stat().st_mode
    save_state(tmp_path / "state", replace(state, texts=[]), loaded.pha)  # of a state, a new one
    assert load_state(tmp_path / "state", loaded.pha).texts == []
