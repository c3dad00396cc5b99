"""EleutherAI's lm-evaluation-harness on a PHA model: its own command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pha.loading import model_folder
from pha.utils.errors import PHAError

MAX_LENGTH = 2048


def harness_command(model: Path, arguments: Sequence[str]) -> list[str]:
    """`lm_eval run` on a model, as a list of words.

    Our configuration names no longest sequence, because the model has none, and the harness would
    take 2048 in silence; here it is always set, and so in what the harness prints and writes.

    Args:
        model: a run, checkpoint or saved model.
        arguments: further ones of `lm_eval run`; its `--model_args` are merged with ours.

    Raises:
        PHAError: no such model.
    """
    folder, _ = model_folder(model)
    ours = {"pretrained": str(folder), "max_length": MAX_LENGTH, "add_bos_token": False}
    return ["lm_eval", "run", "--model", "hf", "--model_args", json.dumps(ours), *arguments]


def run_harness(model: Path, arguments: Sequence[str]) -> None:
    """Run `harness_command` in this process.

    Raises:
        PHAError: no lm_eval here, or no such model.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise PHAError("lm_eval is not installed; run `pip install 'pha[harness]'`") from error
    from pha import modeling  # noqa: F401 - makes the model known to transformers

    sys.argv = harness_command(model, arguments)
    cli_evaluate()
