"""Model folders of older versions, as the present one reads them.

Until 0.1 the auxiliary branch was called `ffn`, and the formula of b in Eq. 2 `input_scale`.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pha.model.config import RENAMED, is_old
from pha.utils.errors import PHAError
from pha.utils.files import atomic_folder, write_json
from pha.utils.formats import read_json
from pha.utils.outputs import claimed, require_new_folder

_BRANCH = re.compile(r"(\.(?:branches|norms|residuals))\.ffn\.")


def convert_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration in today's words."""
    config = {RENAMED.get(name, name): value for name, value in config.items()}
    if "branches" in config:
        config["branches"] = ["aux_ffn" if b == "ffn" else b for b in config["branches"]]
    options = config.get("branch_options") or {}
    if "ffn" in options:
        config["branch_options"] = {("aux_ffn" if k == "ffn" else k): v for k, v in options.items()}
    return config


def convert_model(folder: Path, out: Path) -> None:
    """Write a model folder of an older version anew; other files are copied.

    Raises:
        PHAError: `folder` holds no model of an older version, or `out` is not empty.
    """
    config = read_json(folder / "config.json")
    try:
        converted = convert_config(config) if is_old(config) else None
    except (AttributeError, TypeError) as error:
        raise PHAError(f"{folder}/config.json is damaged ({error})") from error
    if converted is None:
        raise PHAError(f"{folder} is not a model of an older version; there is nothing to convert")
    require_new_folder(out)
    with claimed(out), atomic_folder(out) as temporary:
        for file in folder.iterdir():
            if file.suffix == ".safetensors":
                try:
                    weights = load_file(file)
                except SafetensorError as error:
                    raise PHAError(f"{file} is damaged ({error})") from error
                named = {_BRANCH.sub(r"\1.aux_ffn.", name): x for name, x in weights.items()}
                save_file(named, temporary / file.name, metadata={"format": "pt"})
            elif file.is_file() and file.name != "config.json":
                shutil.copy2(file, temporary / file.name)
        write_json(temporary / "config.json", converted)
