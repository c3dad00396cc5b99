"""Verbs that take a model elsewhere: export, verify, convert, harness, serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pha.commands.common import Dtype, Folder, Json, Model, Store, answer
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
    or with trust_remote_code=True where pha is not installed: the model's code lies in it, as
    modeling_pha.py. It can be uploaded to the Hugging Face Hub as it is. Its model card, README.md,
    gives the results of the run's result.json, each with its protocol, and how the run was made.

    Args:
        out: the folder to write
        license: for the card, such as apache-2.0
        dataset: for the card: a data set by its name on the Hub; may be repeated
        force: replace an earlier export
    """
    from pha.sharing import export_model
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


def verify(folder: Folder, *, data: Store, json: Json = False) -> None:
    """Whether an exported model scores what its card says.

    Reads the scores and their protocols from README.md, evaluates again on the same tokens, and
    says yes or no: exit code 0 or 2.

    Args:
        folder: of `pha export`
    """
    from pha.commands.common import figures_table, progress_bars
    from pha.sharing.verify import verify_export

    with progress_bars() as progress:
        checks = verify_export(folder, data, progress)
    table = figures_table(str(folder), "score", "on the card", "measured", "")
    for each in checks:
        verdict = "yes" if each.same else "NO"
        table.add_row(f"{each.split}: {each.name}", *map("{:.7g}".format, each.values), verdict)
    same = all(each.same for each in checks)
    record = {"same": same, "checks": [asdict(each) for each in checks]}
    answer(json, record, table, *(["yes: the model scores what its card says"] if same else []))
    if not same:
        raise PHAError(f"no: {folder} does not score what its card says")


def convert(folder: Path, new_folder: Path, *, json: Json = False) -> None:
    """A model folder of an older version, as this one reads it.

    FOLDER is what an older version saved: a run's model/, a checkpoint, an export.

    Args:
        folder: with config.json and model.safetensors
        new_folder: the folder to write
    """
    from pha.conversion import convert_model

    convert_model(folder, new_folder)
    record = {"path": str(new_folder), "from": str(folder)}
    answer(json, record, f"{new_folder}: {folder} in today's names")


def harness(model: Model, *arguments: str) -> None:
    """Tasks of EleutherAI's lm-evaluation-harness.

    Needs `pip install 'pha-lm[harness]'`. All further options are those of `lm_eval run`, such as
    --tasks A,B, --include_path DIR, --limit N, --batch_size N and --output_path DIR. Longer texts
    than the model was trained on lose their beginning; --model_args max_length=N sets another
    length, which for PHA may be any. Tasks with local data run without a network; the harness's own
    fetch theirs from the Hugging Face Hub. No code is fetched.
    """
    from pha.sharing.serving import run_harness

    run_harness(model, arguments)


def serve(model: Model, *, host: str = "localhost", port: int = 8000) -> None:
    """A model behind OpenAI's HTTP interface, by transformers' own server.

    Needs `pip install 'pha-lm[serve]'`. Clients ask http://HOST:PORT/v1/completions for the model
    by the name that is printed, which is its folder. It stays in memory until Ctrl-C.
    /v1/chat/completions, and so `transformers chat`, wants a chat template in the tokenizer; a
    model that has only read texts has none. Whoever reaches the port can use the model, and have
    the server load others: think before listening elsewhere than at localhost.

    Args:
        host: where to listen
        port: where to listen
    """
    from pha.sharing.serving import serve_model

    serve_model(model, host, port)
