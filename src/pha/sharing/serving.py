"""A model in tools of others: transformers' server, and EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from pha.evals.protocols import trained_protocol
from pha.loading import model_folder
from pha.modeling import PHAForCausalLM
from pha.utils.errors import PHAError
from pha.utils.formats import read_json
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


def harness_command(model: Path, arguments: Sequence[str]) -> list[str]:
    """`lm_eval run` on a model, as a list of words.

    The longest sequence is set, and so in what the harness prints and writes: that of training. Of
    longer ones it leaves out the beginning. A PHA model reads any length that `max_length` says.

    Args:
        model: a run, checkpoint or saved model.
        arguments: further ones of `lm_eval run`; its `--model_args` are merged with ours.

    Raises:
        PHAError: no such model.
    """
    folder, run = model_folder(model)
    trained = trained_protocol(run)
    if trained is None:  # what a configuration of ours says too, and GPT-2's in another word
        config = read_json(folder / "config.json")
        length = config.get("trained_length") or config.get("max_position_embeddings")
    else:
        length = trained.sequence_length
    longest = {} if length is None else {"max_length": length}
    ours = {"pretrained": str(folder), **longest, "add_bos_token": False}
    return ["lm_eval", "run", "--model", "hf", "--model_args", json.dumps(ours), *arguments]


def run_harness(model: Path, arguments: Sequence[str]) -> None:
    """Run `harness_command` in this process.

    Raises:
        PHAError: no such model.
    """
    from lm_eval.__main__ import cli_evaluate

    sys.argv = harness_command(model, arguments)
    cli_evaluate()
