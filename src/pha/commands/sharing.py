"""Verbs that take a model elsewhere: export, convert, harness."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.table import Table

from pha.commands.common import AddVerb, console_for, print_json
from pha.utils.errors import PHAError

_EXPORT = """\
The folder loads with transformers' AutoModelForCausalLM and AutoTokenizer after
`import pha`, and can be uploaded to the Hugging Face Hub as it is. Its model card,
README.md, gives the results of the run's result.json, each with its protocol, and how the run was
made.
"""

_HARNESS = """\
Needs `pip install 'pha[harness]'`. Tasks with local data (--lambada, --include-path) run without a
network; the harness's own fetch theirs from the Hugging Face Hub. No code is fetched.
"""


def add_export(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb("export", export, "a folder with model, tokenizer and model card to share", _EXPORT)
    sub.add_argument("model", metavar="RUN_OR_MODEL", type=Path)
    sub.add_argument("out", metavar="DIR", type=Path, help="the folder to write")
    sub.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="type of the weights (fp32)"
    )
    sub.add_argument("--license", metavar="ID", help="for the card, such as apache-2.0")
    sub.add_argument(
        "--dataset",
        metavar="ID",
        action="append",
        default=[],
        help="for the card: a data set by its name on the Hub; may be repeated",
    )
    sub.add_argument("--force", action="store_true", help="replace an earlier export")
    sub.add_argument("--json", action="store_true", help="print as JSON")


def export(options: Namespace) -> None:
    """`pha export`."""
    from pha.sharing import export_model
    from pha.utils.hardware import PRECISIONS

    exported = export_model(
        options.model,
        options.out,
        dtype=PRECISIONS[options.dtype],
        license_id=options.license,
        datasets=options.dataset,
        force=options.force,
    )
    if options.json:
        print_json({"path": str(exported.path), "results": exported.results, "note": exported.note})
        return
    console = console_for(options)
    console.print(str(exported.path), highlight=False, markup=False, soft_wrap=True)
    if exported.note:
        console.print(f"without results: {exported.note}", highlight=False, soft_wrap=True)


def add_convert(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb(
        "convert",
        convert,
        "a model folder of an older version, as this one reads it",
        "FOLDER is what an older version saved: a run's model/, a checkpoint, an export.",
    )
    sub.add_argument("folder", metavar="FOLDER", type=Path)
    sub.add_argument("out", metavar="NEW_FOLDER", type=Path)


def convert(options: Namespace) -> None:
    """`pha convert`."""
    from pha.conversion import convert_model

    convert_model(options.folder, options.out)
    print(f"{options.out}: {options.folder} in today's names")


def add_harness(verb: AddVerb) -> None:
    """The parser of its verb."""
    sub = verb("harness", harness, "tasks of EleutherAI's lm-evaluation-harness", _HARNESS)
    sub.add_argument("model", metavar="RUN_OR_MODEL", type=Path)
    sub.add_argument("--tasks", metavar="A,B", default="", help="tasks or groups by name")
    sub.add_argument(
        "--lambada", metavar="FILE", type=Path, help="lambada_openai from this lambada_test.jsonl"
    )
    sub.add_argument(
        "--include-path", metavar="DIR", type=Path, help="a folder with task definitions (YAML)"
    )
    sub.add_argument("--limit", metavar="N", type=int, help="only the first N documents of a task")
    sub.add_argument("--num-fewshot", metavar="N", type=int, help="examples before each question")
    sub.add_argument(
        "--max-length", metavar="N", type=int, default=2048, help="tokens at most (2048)"
    )
    sub.add_argument(
        "--batch-size", metavar="N", type=int, default=4, help="sequences at a time (4)"
    )
    sub.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="type of the weights (fp32)"
    )
    sub.add_argument("--out", metavar="FILE", type=Path, help="write JSON to FILE")
    sub.add_argument("--json", action="store_true", help="print as JSON")


def harness(options: Namespace) -> None:
    """`pha harness`."""
    from pha.evals.harness import require_harness, run_harness
    from pha.loading import load_model
    from pha.utils.files import write_json
    from pha.utils.hardware import PRECISIONS, default_device, provenance

    require_harness()
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks and options.lambada is None:
        raise PHAError("no task to run; name some with --tasks, or a file with --lambada")
    if options.out is not None and options.out.is_dir():
        raise PHAError(f"{options.out} is a folder: name the file to write")
    device = default_device()
    loaded = load_model(options.model, device, dtype=PRECISIONS[options.dtype])
    result = run_harness(
        loaded,
        tasks,
        lambada=options.lambada,
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        max_length=options.max_length,
        batch_size=options.batch_size,
    )
    record = {
        "model": str(options.model),
        **result,
        "provenance": provenance(device, options.dtype),
    }
    if options.out is not None:
        try:
            write_json(options.out, record)
        except OSError as error:
            raise PHAError(
                f"{options.out} cannot be written ({error.strerror or error})"
            ) from error
    if options.json:
        print_json(record)
    else:
        console_for(options).print(_harness_table(result))


def _harness_table(result: dict[str, Any]) -> Table:
    limit = "" if result["limit"] is None else f", the first {result['limit']} documents only"
    table = Table(
        title=f"lm_eval {result['lm_eval']}, at most {result['max_length']} tokens{limit}"
    )
    table.add_column("task", no_wrap=True)
    table.add_column("documents", justify="right")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for task, values in result["tasks"].items():
        documents = result["documents"].get(task)
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, float | int) or metric.endswith("_stderr") or not variant:
                continue
            error = values.get(f"{metric}_stderr,{variant}")
            shown = _figure(value) + (f" ± {_figure(error)}" if isinstance(error, float) else "")
            name = metric if variant == "none" else f"{metric} ({variant})"
            table.add_row(task, "" if documents is None else f"{documents:,}", name, shown)
    return table


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"
