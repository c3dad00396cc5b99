"""EleutherAI's lm-evaluation-harness on a PHA model: its tasks, its protocols, our weights."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pha.loading import LoadedModel
from pha.utils.errors import PHAError

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

LAMBADA = "lambada_openai"


def require_harness() -> None:
    """Check that the optional package is there.

    Raises:
        PHAError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise PHAError("lm_eval is not installed; run `pip install 'pha[harness]'`")


def harness_model(loaded: LoadedModel, *, max_length: int = 2048, batch_size: int = 4) -> HFLM:
    """The model as the harness sees it.

    Our configuration names no longest sequence, because the model has none, and the harness would
    take 2048 in silence; here it is always set.

    Args:
        loaded: model and tokenizer. The model is used as it is, on its device.
        max_length: most tokens per forward pass; longer contexts lose their beginning.
        batch_size: sequences per forward pass. All their logits exist at once: 4 sequences of
            2048 take 1.6 GB per copy with a vocabulary of 50,257, in fp32.

    Raises:
        PHAError: lengths below 1, or no lm_eval here.
    """
    require_harness()
    if max_length < 1 or batch_size < 1:
        raise PHAError(f"max length {max_length} and batch size {batch_size} must be at least 1")
    _quieten()
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        backend="causal",
        max_length=max_length,
        batch_size=batch_size,
        add_bos_token=False,
        trust_remote_code=False,
    )


def lambada_task(path: Path) -> dict[str, Any]:
    """The harness's task `lambada_openai` on a local file instead of the Hub's copy.

    The last word, with the space before it, is to be predicted from what precedes it: accuracy
    asks that every one of its tokens is the likeliest, perplexity is per such word.

    Args:
        path: JSON lines with a field `text`, as OpenAI's lambada_test.jsonl.

    Raises:
        PHAError: no such file, or a line that is not such a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise PHAError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise PHAError(f"{path} cannot be read ({error.strerror or error})") from error
    records = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise PHAError(f"{path} is empty; give LAMBADA as JSON lines with a field text")
    for number, line in records:
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PHAError(f"{path}, line {number}, is no JSON object with a field text") from error
        if not isinstance(text, str) or not text.rpartition(" ")[0]:
            raise PHAError(f"{path}, line {number}, has a text of fewer than two words")
    return {
        "task": LAMBADA,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{ text.rpartition(' ')[0] }}",
        "doc_to_target": "{{ ' ' + text.rpartition(' ')[2] }}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
    }


def run_harness(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    lambada: Path | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_length: int = 2048,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Evaluate a model on tasks of the harness (`lm_eval.simple_evaluate`).

    Tasks whose data are local files make no network calls; the harness's own fetch their data from
    the Hub.

    Args:
        loaded: model and tokenizer.
        tasks: names of tasks or groups, the harness's own or those in `include_path`.
        lambada: also run `lambada_task` of this file.
        include_path: a folder with task definitions in YAML, which take precedence.
        limit: documents per task, the first ones; a result with a limit is not one of the task.
        num_fewshot: examples before each question; the tasks' own numbers if absent.
        max_length: see `harness_model`.
        batch_size: see `harness_model`.

    Returns:
        `tasks` (task -> metric -> value, as the harness names them), `groups`, `documents` (task ->
        how many), `versions`, `num_fewshot`, and the protocol: `limit`, `max_length`, `lm_eval`.

    Raises:
        PHAError: an unknown task, one whose definition or data cannot be loaded, no lm_eval here.
    """
    require_harness()
    specs: list[str | dict[str, Any]] = list(dict.fromkeys(tasks))
    if lambada is not None:
        specs.append(lambada_task(lambada))
    if not specs:
        raise PHAError("no task to run; name one")
    if limit is not None and limit < 1:
        raise PHAError(f"the limit is {limit}; at least 1 document")
    _quieten()
    import lm_eval

    manager = _load_tasks(specs, include_path)
    # The harness prints remarks, which do not belong where results go.
    with contextlib.redirect_stdout(sys.stderr):
        results = lm_eval.simple_evaluate(
            harness_model(loaded, max_length=max_length, batch_size=batch_size),
            tasks=specs,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=1000,
        )
    return {
        "tasks": results["results"],
        "groups": results.get("groups", {}),
        "documents": {name: n["effective"] for name, n in results["n-samples"].items()},
        "versions": results["versions"],
        "num_fewshot": results["n-shot"],
        "limit": limit,
        "max_length": max_length,
        "lm_eval": metadata.version("lm_eval"),
    }


def _load_tasks(specs: Sequence[str | dict[str, Any]], include_path: Path | None) -> TaskManager:
    """A task manager that can load all of `specs`, tried out."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise PHAError(f"{include_path} is not a folder of task definitions")
    names = [spec for spec in specs if isinstance(spec, str)]
    try:
        # Reading the harness's own thousands of definitions takes seconds.
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=include_path)
    except Exception as error:  # whatever a definition can be wrong in
        raise PHAError(f"{include_path} has a bad task definition ({_reason(error)})") from error
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists them"
            raise PHAError(f"there is no task {name}; {hint}")
    for spec in specs:
        try:
            manager.load([spec])
        except Exception as error:  # the harness, datasets and the Hub client raise many kinds
            name = spec if isinstance(spec, str) else spec["task"]
            raise PHAError(
                f"task {name} cannot be loaded ({_reason(error)}); a task needs its data on the "
                "Hub, or in local files (--lambada, --include-path)"
            ) from error
    return manager


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _quieten() -> None:
    """Errors alone: the harness warns of every default that it takes."""
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
