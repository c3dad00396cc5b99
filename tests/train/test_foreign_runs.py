"""Runs of models of transformers: like ours, from random weights and from others'."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pha.cli import main
from pha.data import TokenStore
from pha.data.tokenizer import load_tokenizer
from pha.foreign import ForeignModel, make_foreign, shape_config
from pha.loading import load_model
from pha.peers import PEERS
from pha.report.page import write_report
from pha.results import RunResult
from pha.runs import RunFolder
from pha.train.checkpoint import load_checkpoint
from pha.train.models import make_model
from pha.train.optim import make_optimizer
from pha.train.recipes import load_recipe
from pha.train.run import run_training
from pha.train.saving import Snapshot
from pha.train.session import open_session
from pha.utils.errors import PHAError, TrainingInterruptedError

SHORT = {
    "data.sequence_length": 32,
    "schedule.warmup_steps": 2,
    "run.steps": 6,
    "run.global_batch": 4,
    "run.precision": "fp32",
    "run.evaluate_every": 3,
    "run.evaluate_tokens": 200,
    "run.log_every": 1,
    "run.sample_tokens": 4,
}


def settings(store: TokenStore, **changes: Any) -> dict[str, Any]:
    given = {key.replace("__", "."): value for key, value in changes.items()}
    return SHORT | {"data.store": str(store.path)} | given


def train(recipe: str, store: TokenStore, out: Path, **changes: Any) -> RunResult:
    config = load_recipe(recipe, settings(store, **changes))
    result = run_training(config, out, Console(file=io.StringIO()))
    assert result is not None
    return result


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


def test_a_stopped_run_goes_on_to_the_same_bits(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "transformers__set": {"n_embd": 32, "resid_pdrop": 0.1},
        "data__packed_documents": True,
        "run__micro_batch": 2,
        "run__keep_best": 2,
        "run__average_best": 2,
    }
    whole = train("hf:gpt2-tiny.text", store, tmp_path / "whole", **changes)
    assert whole.model.preset == "hf:gpt2-tiny"
    assert whole.mixing == []
    components = whole.model.parameters.components
    assert components["embedding"] == 257 * 32
    assert whole.model.parameters.total == sum(components.values())

    step = ForeignModel.forward
    taken: list[int] = []

    def stop(self: ForeignModel, *arguments: Any, **named: Any) -> Any:
        taken.append(1)
        if len(taken) == 8:  # in the fourth step
            raise TrainingInterruptedError("killed", 75)
        return step(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(ForeignModel, "forward", stop)
        with pytest.raises(TrainingInterruptedError):
            train("hf:gpt2-tiny.text", store, tmp_path / "killed", **changes)
    assert RunFolder(tmp_path / "killed").checkpoint_steps() == [3]
    resumed = train("hf:gpt2-tiny.text", store, tmp_path / "killed", **changes)
    assert resumed.evaluations[0].loss == whole.evaluations[0].loss
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/model")
    assert (model.config.model_type, model.config.n_embd) == ("gpt2", 32)
    assert AutoTokenizer.from_pretrained(tmp_path / "whole/model")("a")["input_ids"] == [97]
    assert load_model(tmp_path / "whole").run is not None
    metrics = RunFolder(tmp_path / "whole").read_metrics()
    assert (metrics.mixing, metrics.watch) == ([], [])
    assert metrics.train[-1].loss < metrics.train[0].loss
    page = write_report([tmp_path / "whole"], tmp_path / "report.html")
    assert "hf:gpt2-tiny" in page.read_text(encoding="utf-8")
    with pytest.raises(PHAError, match=r"transformers\.set"):
        train("hf:gpt2-tiny.text", store, tmp_path / "whole", **changes | {"transformers__set": {}})


def test_flops_leave_out_what_is_only_looked_up(store: TokenStore, tmp_path: Path) -> None:
    config = load_recipe("hf:gpt2-tiny.text", settings(store, data__sequence_length=64))
    plan = open_session(config, tmp_path / "x", Console(file=io.StringIO())).plan
    positions = 64 * 64  # that are learned, and only looked up
    assert plan.flops == 6 * (plan.parameters - positions) * plan.tokens


@pytest.mark.parametrize("name", [name for name in PEERS if name.endswith("-tiny")])
def test_every_peer_learns_and_is_saved(store: TokenStore, tmp_path: Path, name: str) -> None:
    config = load_recipe(f"hf:{name}.text", settings(store, run__gradient_checkpointing=True))
    config.model.vocab_size = store.vocab_size
    model = make_model(config).train()
    optimizer = make_optimizer(model, config.optimizer)
    ids = torch.from_numpy(store.tokens("train")[:64].astype("int64")).view(2, 32)
    losses = []
    for _ in range(3):
        loss = model(ids[:, :-1], ids[:, 1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    Snapshot(model, store.tokenizer()).write(tmp_path / "model")
    again = make_model(config)
    again.load_state_dict(load_file(tmp_path / "model/model.safetensors"), strict=False)
    loaded = load_model(Path(f"hf:{tmp_path / 'model'}")).model
    for other in (again.eval(), loaded):
        assert torch.equal(other.states(ids), model.eval().states(ids))
    undecayed = {
        id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]
    }
    named = dict(model.named_parameters())
    assert all(id(p) in undecayed for n, p in named.items() if n.endswith(("A_log", "norm.weight")))


def test_fine_tuning_starts_from_the_weights_of_a_folder(store: TokenStore, tmp_path: Path) -> None:
    torch.manual_seed(3)
    folder = tmp_path / "pretrained"
    make_foreign(shape_config("llama-tiny", 257, 64, {})).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    tuned = train(
        "pha-tiny.text", store, tmp_path / "run", run__init_from=f"hf:{folder}", run__steps=2
    )
    assert tuned.model.preset == f"hf:{folder}"
    before, after = load_file(folder / "model.safetensors"), weights(tmp_path / "run")
    gaps = [(before[n] - after[n]).abs().max().item() for n in before]
    assert 0 < max(gaps) < 0.01  # two small steps
    again = train(
        "pha-tiny.text", store, tmp_path / "run", run__init_from=f"hf:{folder}", run__steps=2
    )
    assert again == tuned
    other = tmp_path / "other"
    make_foreign(shape_config("llama-tiny", 300, 64, {})).save_pretrained(other)
    load_tokenizer("bpe:259", ["ab ab cd cd " * 9]).save_pretrained(other)
    with pytest.raises(PHAError, match="another"):
        train("pha-tiny.text", store, tmp_path / "x", run__init_from=f"hf:{other}")


def test_the_shape_of_a_folder_is_trained_from_random_weights(
    store: TokenStore, tmp_path: Path
) -> None:
    folder = tmp_path / "shape.v2"
    make_foreign(shape_config("gpt2-tiny", 300, 64, {"n_layer": 1})).save_pretrained(folder)
    config = load_recipe(f"hf:{folder}.text", settings(store))
    config.model.vocab_size = 257
    shape = make_model(config).config
    assert (shape.n_layer, shape.vocab_size, shape.n_positions) == (1, 257, 32)


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("hf:gtp2-tiny.text", {}, "did you mean hf:gpt2-tiny"),
        ("hf:gpt2-tiny.text", {"transformers.set": {"n_emb": 32}}, "did you mean n_embd"),
        ("hf:gpt2-tiny.text", {"transformers.set": {"vocab_size": 32}}, "no field vocab_size"),
        ("hf:gpt2-tiny.text", {"transformers.set": {"n_head": 5}}, "cannot make this gpt2"),
        ("hf:gpt2-tiny.text", {"transformers.set": {"n_embd": "wide"}}, "refuses the shape"),
        ("hf:gpt2-tiny.text", {"model.dropout": 0.1}, "model.dropout is a field of ours"),
        ("pha-tiny.text", {"transformers.set": {"n_embd": 32}}, "name it"),
        (
            "hf:gpt2-tiny.text",
            {"run.compile": True, "data.packed_documents": True},
            "rows of one length",
        ),
        ("hf:gpt2-tiny.txt", {}, "did you mean hf:gpt2-tiny.text"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused(
    store: TokenStore, tmp_path: Path, recipe: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(PHAError, match=said) as caught:
        train(recipe, store, tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused(store: TokenStore, tmp_path: Path) -> None:
    train("hf:gpt2-tiny.text", store, tmp_path / "run", run__steps=1)
    config = load_recipe("hf:llama-tiny.text", settings(store))
    config.model.vocab_size = 257
    model = make_model(config)
    with pytest.raises(PHAError, match="another model"):
        load_checkpoint(
            tmp_path / "run/checkpoints/step-1", model, make_optimizer(model, config.optimizer)
        )


def test_a_study_names_models_of_transformers(
    store: TokenStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "peers.yaml"
    study.write_text(
        "title: Peers\nquestion: Which?\nbaseline: ours\nvariants:\n"
        "  ours: {model: pha}\n"
        "  gpt2: {model: 'hf:gpt2-tiny', set: {transformers.set: {n_embd: 96}}}\n"
        "  mamba2: {model: 'hf:mamba2-tiny'}\n"
        "scales: {tiny: {run.precision: fp32}}\n"
    )
    words = ["study", str(study), "--data", str(store.path), "--out", str(tmp_path / "out")]
    main([*words, "--dry-run", "--seeds", "1", "--json"])
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["recipe"].split(".")[0] for run in runs] == [
        "pha-tiny",
        "hf:gpt2-tiny",
        "hf:mamba2-tiny",
    ]
    places = [Path(run["run"]).parts[-2] for run in runs]
    assert places[1].startswith("hf-gpt2-tiny-")
    assert runs[1]["parameters"] > 96 * 257
    study.write_text(study.read_text().replace("model: pha", "model: phb"))
    with pytest.raises(SystemExit):
        main([*words, "--dry-run"])
    assert "did you mean" in capsys.readouterr().err
