"""Models of transformers under our commands: as transformers itself has them, or refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel

from pha.cli import main
from pha.data import TokenStore, prepare
from pha.data.encoding import byte_vocabulary
from pha.data.tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_hashes
from pha.evals.generation import Sampling, generate
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.evals.score import score
from pha.foreign import ForeignModel, make_foreign, shape_config, source_folder
from pha.loading import load_model
from pha.utils.errors import PHAError

FAMILIES = ("gpt2", "llama", "mamba", "mamba2", "jamba", "falcon-h1", "recurrent-gemma", "bamba")
V = 257


def random_model(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of a family whose next token is far from certain."""
    torch.manual_seed(0)
    model = make_foreign(shape_config(f"{name}-tiny", V, 64, changes)).inner
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, as transformers saves them, with a tokenizer of bytes."""
    root = tmp_path_factory.mktemp("foreign")
    for name in FAMILIES:
        random_model(name).save_pretrained(root / name)
        load_tokenizer("bytes").save_pretrained(root / name)
    return root


def hf(folder: Path) -> Path:
    return Path(f"hf:{folder}")


@pytest.mark.parametrize("name", ["gpt2", "mamba2", "recurrent-gemma"])
def test_perplexity_is_that_of_the_logits_of_transformers(
    folders: Path, store: TokenStore, name: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders / name).eval()
    tokens = torch.from_numpy(store.tokens("test")[:150].astype("int64"))
    total, scored = 0.0, 0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 33]
        logits = model(window[None, :-1]).logits[0]
        nats = F.cross_entropy(logits, window[1:], reduction="none")[max(0, scored - start) :]
        total, scored = total + nats.sum().item(), scored + len(nats)
        if start + 33 >= len(tokens):
            break
    found = evaluate(
        load_model(hf(folders / name)).model, store, "test", Protocol(32, 16), max_tokens=149
    )
    assert found.tokens == scored == 149
    assert found.loss == pytest.approx(total / scored, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_gradients_and_documents_apart(folders: Path, name: str) -> None:
    model = load_model(hf(folders / name)).model
    assert isinstance(model, ForeignModel)
    assert model.chunked == (name != "recurrent-gemma")  # whose logits are capped
    inner, ids = model.inner, torch.randint(V, (2, 24), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros(2, 23, dtype=torch.bool)
    starts[0, [5, 6]] = starts[1, 0] = True
    documents = [(0, 0, 5), (0, 5, 6), (0, 6, 23), (1, 0, 23)]
    model.zero_grad()
    model(ids[:, :-1], ids[:, 1:], starts, 46).loss.backward()
    ours = {n: p.grad.clone() for n, p in inner.named_parameters() if p.grad is not None}
    model.zero_grad()
    nats = [
        F.cross_entropy(inner(ids[row : row + 1, a:b]).logits[0], ids[row, a + 1 : b + 1]) * (b - a)
        for row, a, b in documents
    ]
    (torch.stack(nats).sum() / 46).backward()
    for found, parameter in inner.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[found], parameter.grad, rtol=1e-4, atol=1e-6)


class Scaled(GPT2LMHeadModel):
    """Divides its logits by something: a class whose head is not what it seems."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        output.logits = output.logits / 1.5
        return output


class Biased(GPT2LMHeadModel):
    """Has a bias of zero outside of its head, which training would change."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.offset = torch.nn.Parameter(torch.zeros(config.vocab_size))


def test_a_head_is_chunked_only_where_that_changes_nothing() -> None:
    config = shape_config("gpt2-tiny", V, 64, {})
    assert ForeignModel(GPT2LMHeadModel(config)).look().chunked
    for model in (Scaled(config), Biased(config)):
        assert not ForeignModel(model).look().chunked
    small = make_foreign(shape_config("recurrent-gemma-tiny", V, 64, {}))
    with torch.no_grad():
        small.inner.lm_head.weight.mul_(1e-3)  # as if far below the cap
    assert not small.look().chunked
    hooked = ForeignModel(GPT2LMHeadModel(config)).look()
    hooked.head.register_forward_hook(lambda _, __, logits: 2 * logits)
    ids = torch.randint(V, (1, 8))
    assert torch.equal(hooked.states(ids), hooked.inner(ids).logits)


def test_a_model_that_looks_ahead_is_refused() -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(PHAError, match="sees tokens that come later"):
        ForeignModel(AutoModelForCausalLM.from_config(config)).look()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_document_in_pieces_is_the_whole_or_refused(folders: Path, name: str) -> None:
    loaded = load_model(hf(folders / name))
    text = "one two three four five six seven eight"
    whole = score(loaded, "x", iter([text]), piece=100)
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"])
    logits = loaded.model.inner(ids[None, :-1]).logits[0]
    assert whole.loss == pytest.approx(F.cross_entropy(logits.float(), ids[1:]).item(), abs=1e-5)
    if name in ("mamba", "jamba", "recurrent-gemma", "bamba"):
        with pytest.raises(PHAError, match="does not go on from its cache"):
            score(loaded, "x", iter([text]), piece=7)
        return
    pieces = score(loaded, "x", iter([text]), piece=7)
    assert pieces.loss == pytest.approx(whole.loss, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_takes_the_likeliest_tokens(folders: Path, name: str) -> None:
    settings = folders / name / "generation_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps({"repetition_penalty": 9.0, "do_sample": True}))
    loaded = load_model(hf(folders / name))
    settings.write_text(before)
    side_by_side = name != "recurrent-gemma"
    if not side_by_side:
        with pytest.raises(PHAError, match="--batch-size 1"):
            list(generate(loaded, ["one two", "x"], Sampling(8, temperature=0)))
    size = 2 if side_by_side else 1
    made = list(generate(loaded, ["one two", "x"], Sampling(8, temperature=0), batch_size=size))
    assert len(made) == 2
    for each in made:
        ids = loaded.tokenizer(each.prompt, return_tensors="pt")["input_ids"]
        for _ in range(each.new_tokens):
            ids = torch.cat(
                [ids, loaded.model.inner(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1
            )
        text = loaded.tokenizer.decode(ids[0, each.prompt_tokens :], skip_special_tokens=True)
        assert each.text == text


def test_learned_positions_bound_what_is_read(folders: Path, store: TokenStore) -> None:
    loaded = load_model(hf(folders / "gpt2"))
    assert load_model(hf(folders / "llama")).model.longest is None
    evaluate(loaded.model, store, "test", Protocol(64, 64), max_tokens=100)
    with pytest.raises(PHAError, match="64 learned positions"):
        evaluate(loaded.model, store, "test", Protocol(65, 65), max_tokens=100)
    with pytest.raises(PHAError, match="64 learned positions"):
        list(generate(loaded, ["a" * 60], Sampling(5)))
    with pytest.raises(PHAError, match="64 learned positions"):
        score(loaded, "x", iter(["a" * 70]), piece=50)


def published_gpt2(folder: Path, prefix: str) -> GPT2LMHeadModel:
    """GPT-2 as it was published: its names, buffers and vocabulary; the model that it holds."""
    config = AutoConfig.for_model(
        "gpt2", vocab_size=V, n_positions=64, n_embd=64, n_layer=2, n_head=4
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    state = {
        name.replace("transformer.", prefix, 1): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    for layer in range(2):
        mask = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        state[f"{prefix}h.{layer}.attn.bias"] = mask
        state[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    content = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": V}
    sizes = {"n_positions": 64, "n_ctx": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    (folder / "config.json").write_text(json.dumps(content | sizes))
    vocabulary = byte_vocabulary() | {END_OF_TEXT: 256}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return model


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_as_it_was_published(tmp_path: Path, text_folder: Path, prefix: str) -> None:
    model = published_gpt2(tmp_path / "gpt2", prefix)
    store = prepare(str(text_folder), str(tmp_path / "gpt2"), tmp_path / "store")
    loaded = load_model(hf(tmp_path / "gpt2"))
    ids = torch.randint(V, (1, 30))
    torch.testing.assert_close(
        loaded.model.inner(ids).logits,
        model(ids).logits,
        rtol=0,
        atol=1e-6,
    )
    store.require_tokenizer(loaded.tokenizer)
    # GPT-2's own tokenizer.json says the same in other words.
    saved = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    saved["added_tokens"][0]["normalized"] = True
    saved["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    (tmp_path / "gpt2/tokenizer.json").write_text(json.dumps(saved))
    again = load_model(hf(tmp_path / "gpt2"))
    assert len(tokenizer_hashes(again.tokenizer)) == 2
    store.require_tokenizer(again.tokenizer)
    with pytest.raises(PHAError, match="another"):
        store.require_tokenizer(load_tokenizer("bpe:258", ["a a a b a a"]))


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.X"}}, "code of its own"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.X"}}, "code of its own"),
        ({"model_type": "no-such"}, "lacks"),
        ({"model_type": None}, "lacks"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"n_layer": 10**9}, "another model"),
        ({"n_embd": 1 << 20}, "another model"),
        ({"n_layer": "x"}, "damaged"),
        ({"n_layer": 1}, "two models"),
        ({"n_inner": 32}, "two models"),
        ({"vocab_size": 100}, "two models"),
    ],
    ids=str,
)
def test_folders_that_are_not_what_they_seem(
    folders: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(folders / "gpt2", tmp_path / "gpt2"))
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    edit(folder, **changes)
    with pytest.raises(PHAError, match=said) as caught:
        load_model(hf(folder))
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_weights_are_safetensors_in_the_folder(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "gpt2", tmp_path / "gpt2"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(PHAError, match="no safetensors"):
        load_model(hf(folder))
    save_file(weights | {"extra": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PHAError, match="differ in extra"):
        load_model(hf(folder))
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../x.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PHAError, match="no file in it"):
        load_model(hf(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PHAError, match="holds no tokenizer"):
        load_model(hf(folder))


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fail(name: str, **_: Any) -> str:
        asked.append(name)
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(PHAError, match="does not answer") as caught:
        source_folder("some/model")
    assert asked == ["some/model"]
    assert "\n" not in str(caught.value)
    with pytest.raises(PHAError, match="no name of the Hub"):
        source_folder("no such/folder/here")


def test_commands(
    folders: Path, store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2, data = f"hf:{folders / 'gpt2'}", ["--data", str(store.path)]
    short = ["--sequence-length", "32", "--json"]
    main(["eval", gpt2, *data, *short, "--packed-documents"])
    one = json.loads(capsys.readouterr().out)
    main(["compare", gpt2, f"hf:{folders / 'llama'}", *data, *short, "--block", "50"])
    both = json.loads(capsys.readouterr().out)
    assert both["evaluations"][0]["loss"] == pytest.approx(one["loss"], abs=0.1)
    assert both["evaluations"][1]["loss"] != both["evaluations"][0]["loss"]
    text = tmp_path / "a.txt"
    text.write_text("one two three")
    main(["score", gpt2, str(text), "--json"])
    assert json.loads(capsys.readouterr().out)["documents"][0]["tokens"] == 12
    main(["generate", gpt2, "--prompt", "one", "--max-new-tokens", "4", "--json"])
    assert json.loads(capsys.readouterr().out)["new_tokens"] <= 4
    for words in (
        ["mixing", gpt2],
        ["export", gpt2, str(tmp_path / "out")],
        ["score", gpt2, str(text), "--attention", "window=4"],
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert "reads PHA models" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(folders / "gpt2"), *data])
    assert f"write hf:{folders / 'gpt2'}" in capsys.readouterr().err
    assert math.isfinite(one["perplexity"])
