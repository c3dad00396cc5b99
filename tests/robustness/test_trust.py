"""Loading runs no code, reads nothing outside the folder, and takes no weights of another model."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pha import PHAConfig, PHAForCausalLM
from pha.loading import load_model
from pha.train.checkpoint import load_checkpoint
from pha.utils.errors import PHAError
from pha.utils.files import sha256_file
from tests.robustness.readers import SMALL, scratch


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A valid model in a folder of its own."""
    return Path(shutil.copytree(scratch() / "model", tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(content | changes), encoding="utf-8")


def test_an_optimiser_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(scratch() / "run/checkpoints/step-3", tmp_path / "step-3"))
    model = PHAForCausalLM(PHAConfig(**SMALL))
    optimizer = torch.optim.AdamW(model.parameters())
    record = json.loads((folder / "trainer.json").read_text())
    record.pop("digest", None)
    del record["sha256"]["optimizer.safetensors"]
    (folder / "optimizer.safetensors").unlink()  # so that it is one of an older version
    mark = tmp_path / "mark"
    torch.save(Evil(mark), tmp_path / "saved")
    for data in (pickle.dumps(Evil(mark)), (tmp_path / "saved").read_bytes()):
        (folder / "optimizer.pt").write_bytes(data)
        record["sha256"]["optimizer.pt"] = sha256_file(folder / "optimizer.pt")
        (folder / "trainer.json").write_text(json.dumps(record))
        with pytest.raises(PHAError, match="is damaged"):
            load_checkpoint(folder, model, optimizer)
    assert not mark.exists()


def test_pickled_weights_are_not_read(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"x": Evil(tmp_path / "mark")}, model / "pytorch_model.bin")
    with pytest.raises(PHAError, match="cannot be loaded"):
        load_model(model)
    assert not (tmp_path / "mark").exists()


def test_code_beside_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    code = f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\nclass X: pass\n"
    (model / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py", "tokenization.py"):
        (model / name).write_text(code)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    edit(model / "config.json", auto_map=dict.fromkeys(names, "evil.X"))
    edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.X", "evil.X"]},
        tokenizer_class="evil.X",
        tokenizer_file=str(tmp_path / "elsewhere.json"),
    )
    with contextlib.suppress(PHAError):
        load_model(model)
    assert not (tmp_path / "mark").exists()


def test_weights_and_tokenizer_lie_in_the_folder(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    shutil.copyfile(weights, tmp_path / "x.safetensors")
    names = load_file(weights)
    weights.rename(tmp_path / "y.safetensors")
    for place in ("../x.safetensors", str(tmp_path / "x.safetensors"), "", 3, None):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(PHAError, match=r"no file in it|not of type str"):
            load_model(model)
    (model / "model.safetensors.index.json").unlink()
    edit(model / "config.json", transformers_weights="../x.safetensors")
    with pytest.raises(PHAError, match="no file in it"):
        load_model(model)
    edit(model / "config.json", transformers_weights=None)
    edit(model / "adapter_config.json", base_model_name_or_path=str(tmp_path))
    with pytest.raises(PHAError, match="adapter"):
        load_model(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 2}, r"weights lack model\.layers\.1\."),
        ({"branches": ["gss"]}, r"also have model\.layers\.0\."),
        ({"hidden_size": 24}, r"another shape of model\..* and \d+ more"),
        ({"vocab_size": 10**15}, "vocab_size is 1000000000000000"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": 1 << 24, "hidden_size": 1 << 20}, "parameters, which its weights"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"auxiliary_ffn_expansion": 1e300}, "auxiliary_ffn_expansion is 1e[+]300"),
    ],
    ids=str,
)
def test_weights_of_another_configuration(model: Path, changes: dict[str, Any], said: str) -> None:
    edit(model / "config.json", **changes)
    with pytest.raises(PHAError, match=said):
        load_model(model)


def test_from_pretrained_refuses_them_too(model: Path) -> None:
    assert isinstance(PHAForCausalLM.from_pretrained(model), PHAForCausalLM)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.branches.gss.W_o.weight"
    name = name if name in weights else sorted(weights)[-1]
    save_file(weights | {"extra": torch.zeros(2)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(PHAError, match="weights also have extra;"):
        PHAForCausalLM.from_pretrained(model)
    del weights[name]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(PHAError, match=f"weights lack {name};"):
        PHAForCausalLM.from_pretrained(model)
    _, found = PHAForCausalLM.from_pretrained(model, output_loading_info=True)
    assert set(found["missing_keys"]) == {name}


BOMBS = """
import gzip, json, lzma, resource, sys
from pathlib import Path
import numpy as np, zstandard
from tests.robustness.readers import readers
from pha.utils.errors import PHAError

folder, known, refused = Path(sys.argv[1]), readers(), []
compress = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}

def feed(name, data):
    path = folder / name.replace(" ", "-") / known[name].name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        known[name].read(path)
        said = "read"
    except PHAError as error:
        said = str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(json.dumps([name, grown, said[-160:]]))

for name in known:  # what is loaded once is no part of it
    feed(name, known[name].sample)
for ending, pack in compress.items():
    for text in (b"a line of it\\n", b"endless", b"\\0"):
        feed(f"text.{ending}", pack(text * ((1 << 20) // len(text))) * 150)
feed("records", b'{"text": "' + b"x" * (100 << 20) + b'"}')
feed("prompts", b"x" * (100 << 20))
for name in ("result", "store record", "model config", "tokenizer", "checkpoint record"):
    feed(name, b"[" + b"[]," * (30 << 20) + b"[]]")
feed("model weights", (1 << 60).to_bytes(8, "little") + b"{}")
many = str(1 << 60).encode()
header = b'{"x":{"dtype":"U8","shape":[' + many + b'],"data_offsets":[0,' + many + b']}}'
feed("model weights", len(header).to_bytes(8, "little") + header)
starts = known["store starts"].sample
feed("store starts", starts.replace(b"(1,)", b"(9" + b"9" * 17 + b",)"))
record = json.loads(known["store record"].sample)
record["splits"]["train"]["tokens"] = record["splits"]["train"]["documents"] = 1 << 60
feed("store record", json.dumps(record).encode())
"""


@pytest.mark.slow
def test_memory_is_bounded_whatever_a_file_promises(tmp_path: Path) -> None:
    """What a process grows by, in MB: no text is held, and of records a few copies are."""
    words = [sys.executable, "-c", BOMBS, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    bombs = found[len(found) - 20 :]
    grown = {(name, said): size for name, size, said in bombs}
    assert max(grown.values()) < 700, grown
    assert all(size < 120 for (name, _), size in grown.items() if name.startswith("text")), grown
    works = [name for name, _, said in bombs if said == "read"]
    assert works == ["text.gz", "text.xz", "text.zst", "records"], bombs
