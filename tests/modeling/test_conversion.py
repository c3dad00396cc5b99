"""Models that an older version saved: refused by name, converted to the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pha.cli import main
from pha.conversion import convert_model
from pha.modeling import PHAForCausalLM, PHAModel
from pha.utils.errors import PHAError

SAMPLES = Path(__file__).parents[1] / "samples" / "0e10920"
NAMES = sorted(path.name for path in SAMPLES.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_commit_that_saved_it(name: str, tmp_path: Path) -> None:
    expected, folder = load_file(SAMPLES / "logits.safetensors"), tmp_path / "new"
    with pytest.raises(PHAError, match=r"older version.*pha convert"):
        PHAForCausalLM.from_pretrained(SAMPLES / name)
    main(["convert", str(SAMPLES / name), str(folder)])
    model = PHAForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    torch.testing.assert_close(logits, expected[name], rtol=0, atol=2e-5)
    body = PHAModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = body(expected["ids"]).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), logits)


def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    new = tmp_path / "new"
    main(["convert", str(SAMPLES / "sequential"), str(new)])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text(json.dumps({"branches": ["ffn"]}))
    (damaged / "model.safetensors").write_bytes(b"\x00\x01")
    contents: list[Any] = [[], {"branches": ["ffn"], "branch_options": ["ffn"]}]
    for content in contents:
        wrong = tmp_path / "wrong"
        wrong.mkdir(exist_ok=True)
        (wrong / "config.json").write_text(json.dumps(content))
        with pytest.raises(PHAError, match=r"config\.json is damaged"):
            convert_model(wrong, tmp_path / "again")
    for source, target, said in (
        (SAMPLES / "sequential", full, "is not empty"),
        (new, tmp_path / "again", "nothing to convert"),
        (tmp_path / "nowhere", tmp_path / "again", "does not exist"),
        (damaged, tmp_path / "again", "is damaged"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", str(source), str(target)])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "again").exists()
