"""A model behind OpenAI's HTTP interface: what transformers' server is started with."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from pha.loading import model_folder
from pha.modeling import PHAForCausalLM
from pha.utils.errors import PHAError
from pha.utils.hardware import default_device
from pha.utils.modules import EXTRAS


def serve_model(source: Path, host: str, port: int) -> None:
    """Serve a run, one of its checkpoints or a saved model until the process is stopped.

    Raises:
        PHAError: no model there, or a folder that the server would take for something else.
        ModuleNotFoundError: a package of the extra is missing.
    """
    folder, _ = model_folder(source)
    name = str(folder)
    if "@" in name:
        raise PHAError(f"{name}: the server takes what is behind @ for a revision; rename it")
    for package in EXTRAS["serve"]:
        import_module(package)
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    # Where it looks for the class that config.json names.
    setattr(model_manager.transformers, PHAForCausalLM.__name__, PHAForCausalLM)
    print(f"{name} at http://{host}:{port}/v1 until Ctrl-C", file=sys.stderr, flush=True)
    Serve(force_model=name, host=host, port=port, device=str(default_device()))
