"""Verbs that take a model elsewhere: export, convert, harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from pha.commands.common import (
    Dtype,
    File,
    Folder,
    Json,
    Model,
    answer,
    figures_table,
    require_file_name,
    writing,
)
from pha.utils.errors import PHAError


def export(
    model: Model,
    out: Folder,
    *,
    dtype: Dtype = "fp32",
    license: Annotated[str | None, "ID"] = None,
    dataset: Sequence[Annotated[str, "ID"]] = (),
    force: bool = False,
    json: Json = False,
) -> None:
    """A folder with model, tokenizer and model card to share.

    The folder loads with transformers' AutoModelForCausalLM and AutoTokenizer after `import pha`,
    and can be uploaded to the Hugging Face Hub as it is. Its model card, README.md, gives the
    results of the run's result.json, each with its protocol, and how the run was made.

    Args:
        out: the folder to write
        license: for the card, such as apache-2.0
        dataset: for the card: a data set by its name on the Hub; may be repeated
        force: replace an earlier export
    """
    from pha.report.export import export_model
    from pha.utils.hardware import PRECISIONS

    exported = export_model(
        model,
        out,
        dtype=PRECISIONS[dtype],
        license_id=license,
        datasets=dataset,
        force=force,
    )
    content = {"path": str(exported.path), "results": exported.results, "note": exported.note}
    note = [f"without results: {exported.note}"] if exported.note else []
    answer(json, content, str(exported.path), *note)


def convert(folder: Path, new_folder: Path) -> None:
    """A model folder of an older version, as this one reads it.

    FOLDER is what an older version saved: a run's model/, a checkpoint, an export.

    Args:
        folder: with config.json and model.safetensors
        new_folder: the folder to write
    """
    from pha.conversion import convert_model

    convert_model(folder, new_folder)
    print(f"{new_folder}: {folder} in today's names")


def harness(
    model: Model,
    *,
    tasks: Annotated[tuple[str, ...], "A,B"] = (),
    lambada: File | None = None,
    include_path: Folder | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_length: int = 2048,
    batch_size: int = 4,
    dtype: Dtype = "fp32",
    out: File | None = None,
    json: Json = False,
) -> None:
    """Tasks of EleutherAI's lm-evaluation-harness.

    Needs `pip install 'pha[harness]'`. Tasks with local data (--lambada, --include-path) run
    without a network; the harness's own fetch theirs from the Hugging Face Hub. No code is fetched.

    Args:
        tasks: tasks or groups by name
        lambada: lambada_openai from this lambada_test.jsonl
        include_path: a folder with task definitions (YAML)
        limit: only the first N documents of a task
        num_fewshot: examples before each question
        max_length: tokens at most
        batch_size: sequences at a time
        out: write JSON to FILE
    """
    from pha.evals.harness import require_harness, run_harness
    from pha.loading import load_model
    from pha.utils.files import write_json
    from pha.utils.hardware import PRECISIONS, default_device, provenance

    require_harness()
    if not tasks and lambada is None:
        raise PHAError("no task to run; name some with --tasks, or a file with --lambada")
    require_file_name(out)
    device = default_device()
    result = run_harness(
        load_model(model, device, dtype=PRECISIONS[dtype]),
        tasks,
        lambada=lambada,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        max_length=max_length,
        batch_size=batch_size,
    )
    record = {"model": str(model), **result, "provenance": provenance(device, dtype)}
    if out is not None:
        with writing(out):
            write_json(out, record)
    answer(json, record, _harness_table(result))


def _harness_table(result: dict[str, Any]) -> Table:
    limit = "" if result["limit"] is None else f", the first {result['limit']} documents only"
    title = f"lm_eval {result['lm_eval']}, at most {result['max_length']} tokens{limit}"
    table = figures_table(title, "task", "documents", "metric", "value")
    for task, values in result["tasks"].items():
        documents = result["documents"].get(task)
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, float | int) or metric.endswith("_stderr") or not variant:
                continue
            error = values.get(f"{metric}_stderr,{variant}")
            figures = [value, error] if isinstance(error, float) else [value]
            shown = " ± ".join(f"{x:.4f}" if abs(x) < 1e4 else f"{x:.4g}" for x in figures)
            name = metric if variant == "none" else f"{metric} ({variant})"
            table.add_row(task, "" if documents is None else f"{documents:,}", name, shown)
    return table
