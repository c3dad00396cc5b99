"""EleutherAI's lm-evaluation-harness on a PHA model: its own command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pha.evals.protocols import trained_protocol
from pha.loading import model_folder
from pha.utils.formats import read_json


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

    from pha import modeling  # noqa: F401 - makes the model known to transformers

    sys.argv = harness_command(model, arguments)
    cli_evaluate()
