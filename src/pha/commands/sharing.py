"""Verbs that take a model elsewhere: export, convert, harness."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from pha.commands.common import AddVerb, console_for, print_json

_EXPORT = """\
The folder loads with transformers' AutoModelForCausalLM and AutoTokenizer after
`import pha`, and can be uploaded to the Hugging Face Hub as it is. Its model card,
README.md, gives the results of the run's result.json, each with its protocol, and how the run was
made.
"""

_HARNESS = """\
Needs `pip install 'pha[harness]'`. All further options are those of `lm_eval run`, such as
--tasks A,B, --include_path DIR, --limit N, --batch_size N and --output_path DIR. Sequences have at
most 2048 tokens; --model_args max_length=N sets another length. Tasks with local data run without
a network; the harness's own fetch theirs from the Hugging Face Hub. No code is fetched.
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


def harness(options: Namespace, arguments: Sequence[str]) -> None:
    """`pha harness`."""
    from pha.evals.harness import run_harness

    run_harness(options.model, arguments)
