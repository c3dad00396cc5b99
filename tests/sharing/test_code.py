"""The code that travels with a model: used where `pha` is not installed, and only there."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pha.data.tokenizer import load_tokenizer
from pha.loading import load_model
from pha.model import BRANCHES
from pha.model.presets import PRESETS
from pha.modeling import PHAConfig, PHAForCausalLM
from pha.sharing import export_model
from pha.sharing.code import FILE, model_code
from tests.modeling.common import scrambled, small_config

WITHOUT = Path(__file__).with_name("without_pha.py")


def exported(config: PHAConfig, folder: Path) -> Path:
    """An export, with what the package makes of it beside it."""
    scrambled(config).save_pretrained(folder / "saved")
    load_tokenizer("bytes").save_pretrained(folder / "saved")
    out = folder / "shared"
    export_model(folder / "saved", out)
    model = PHAForCausalLM.from_pretrained(out)
    ids = torch.randint(256, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    expected = {"ids": ids, "mask": mask}
    with torch.no_grad():
        expected["logits"] = model(ids).logits
        expected["padded"] = model(ids * mask, attention_mask=mask).logits
        settings: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected["written"] = model.generate(ids, max_new_tokens=8, **settings)
    model.train()
    model(ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        expected[f"gradient.{name}"] = weight.grad
    save_file(expected, out / "expected.safetensors")
    return out


def run_without_pha(folders: list[Path], scratch: Path) -> None:
    surroundings = {
        **os.environ,
        **{"HF_HOME": str(scratch), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "m")},
    }
    done = subprocess.run(
        [sys.executable, "-I", str(WITHOUT), *map(str, folders)],
        env=surroundings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == list(map(str, folders))


OWN_BRANCH = """
from torch import Tensor
from pha.model import Branch, Context, register_branch
from .rates import RATE

@register_branch("halved")
class Halved(Branch):
    def forward(self, z: Tensor, context: Context) -> Tensor:
        return RATE * z
"""


@pytest.fixture
def own_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A branch `halved` in a package of a user's own."""
    (tmp_path / "users_own").mkdir()
    (tmp_path / "users_own" / "branch.py").write_text(OWN_BRANCH)
    (tmp_path / "users_own" / "rates.py").write_text("RATE = 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("users_own.branch")
    yield "halved"
    del BRANCHES["halved"]


def test_shared_models_load_without_the_package(tmp_path: Path, own_branch: str) -> None:
    configs = {
        "ours": small_config(vocab_size=257),
        "own": small_config(vocab_size=257, branches=["gss", own_branch]),
    }
    folders = [exported(config, tmp_path / name) for name, config in configs.items()]
    run_without_pha(folders, tmp_path / "hf")


@pytest.mark.slow
def test_every_kind_of_model_loads_without_the_package(tmp_path: Path) -> None:
    configs = {
        name: PHAConfig.from_preset(name, vocab_size=257) for name in PRESETS if "tiny" in name
    }
    assert {name for config in configs.values() for name in config.branch_names} == set(BRANCHES)
    folders = [exported(config, tmp_path / name) for name, config in configs.items()]
    run_without_pha(folders, tmp_path / "hf")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """An export of which the code leaves a mark when it runs."""
    scrambled(small_config(vocab_size=257)).save_pretrained(tmp_path / "saved")
    load_tokenizer("bytes").save_pretrained(tmp_path / "saved")
    export_model(tmp_path / "saved", tmp_path / "shared")
    (tmp_path / "shared" / FILE).write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    return tmp_path / "shared"


def test_with_the_package_no_code_of_the_folder_runs(shared: Path, tmp_path: Path) -> None:
    for trust in (None, False, True):
        options = {} if trust is None else {"trust_remote_code": trust}
        model = AutoModelForCausalLM.from_pretrained(shared, **options)
        assert type(model) is PHAForCausalLM
        assert AutoTokenizer.from_pretrained(shared, **options)("é")["input_ids"] == [195, 169]
    assert type(load_model(shared).model) is PHAForCausalLM
    assert not (tmp_path / "mark").exists()


def test_what_the_package_saves_names_no_code_that_is_not_there(
    shared: Path, tmp_path: Path
) -> None:
    PHAForCausalLM.from_pretrained(shared).save_pretrained(tmp_path / "again")
    assert "auto_map" not in (tmp_path / "again" / "config.json").read_text()
    assert export_model(shared, tmp_path / "twice").path.joinpath(FILE).is_file()


def test_only_the_branches_of_the_model_travel() -> None:
    code = model_code(small_config())
    assert "class GatedStateSpace" in code
    assert "class Mamba2" not in code
    assert "triton" not in [line.split()[1] for line in code.splitlines() if "import " in line]
    assert "class Mamba2" in model_code(small_config(branches=["mamba2"]))
