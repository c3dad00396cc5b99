"""Verbs from a text to a trained model: demo, prepare, train, average, recipes."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich import box
from rich.console import RenderableType
from rich.table import Table

from pha.commands.common import (
    DryRun,
    Folder,
    Json,
    Recipe,
    Store,
    answer,
    figures_table,
    outcome_console,
    progress_console,
)
from pha.utils.errors import PHAError
from pha.utils.formats import to_json
from pha.utils.modules import import_modules
from pha.utils.text import file_name

if TYPE_CHECKING:
    from pha.data import TokenStore


def demo(*, out: Folder = Path("runs/demo"), steps: int | None = None, json: Json = False) -> None:
    """Train pha-tiny, pha-plus-tiny and attention-only-tiny, compare them, write a report.

    Reads the source text of this Python's standard library. What is finished is reused;
    after Ctrl-C the same command continues.

    Args:
        out: where
        steps: optimiser steps per model (the recipe's)
    """
    from pha.studies.demo import run_demo

    results = run_demo(out, progress_console(), outcome_console(json), steps)
    answer(json, [result.to_dict() for result in results])


def prepare(
    sources: Sequence[Annotated[str, "SOURCE"]],
    *,
    tokenizer: str,
    out: Folder,
    separator: Literal["auto", "end-of-text", "none"] = "auto",
    text_field: str = "text",
    holdout: Fraction | None = None,
    split_seed: int | None = None,
    part: Annotated[str | None, "K/N"] = None,
    json: Json = False,
) -> None:
    """Turn text into a token store.

    SOURCE is one of these; several, of one kind, make one store
      stdlib                  this Python's standard library
      FILE                    UTF-8 text, cut 90/5/5; or records: .jsonl (.gz, .xz, .zst), .parquet
      -                       what comes through a pipe: such a text, or JSON lines
      FOLDER                  files named train, valid and test (wiki.train.raw, train-2.jsonl.xz)
                              keep these splits; any others are split by document, and of a few
                              files each is cut 90/5/5
      'books/**/*.jsonl.xz'   a pattern, quoted: likewise
      's3://bucket/x*.jsonl'  a file or pattern behind a URL, read as a stream; https://, gs://, ...
      hf:OWNER/NAME[:CONFIG]  a data set of the Hugging Face Hub, read as a stream
      hf:FOLDER:CONFIG        a local folder in the Hub's layout
      wikitext-103, wikitext-2, openwebtext
                              short for data sets of the Hub; a path of that name comes first

    Args:
        sources: text, as above
        tokenizer: gpt2, gpt2:FOLDER with encoder.json and vocab.bpe, bytes, bpe:SIZE trained on the
            text (at most its first GB), the folder of a saved tokenizer, or a run, for its own
        out: folder of the store
        separator: what ends a document; auto: end-of-text where documents are separate texts
        text_field: field of a record that holds the text
        holdout: share of documents in each of validation and test, where the source has no splits
            (0.05 of files, 0.005 of Hub data sets)
        split_seed: of the hash that splits documents (0)
        part: make part K of N alone, each maybe elsewhere; `pha join` makes them one store
        json: print the store's facts as JSON
    """
    from pha.data import SourceOptions
    from pha.data import prepare as prepare_store
    from pha.data.display import PreparationDisplay
    from pha.data.parts import Part

    begin = time.monotonic()
    with PreparationDisplay(progress_console()) as display:
        store = prepare_store(
            sources,
            tokenizer,
            out,
            separator=separator,
            options=SourceOptions(text_field, holdout, split_seed),
            part=None if part is None else Part.parse(part),
            progress=display,
        )
    _answer_store(json, store, time.monotonic() - begin)


def join(store: Store, *, json: Json = False) -> None:
    """Make the parts of a store one.

    STORE holds what `pha prepare ... --part K/N --out STORE` made, here or copied from other
    machines: a folder part-K-of-N for every K. They are checked and stay where they are. The store
    then is the one that a single process would have made, with the same hashes.

    Args:
        store: folder with the parts
        json: print the store's facts as JSON
    """
    from pha.data.display import PreparationDisplay
    from pha.data.joining import join as join_parts

    begin = time.monotonic()
    with PreparationDisplay(progress_console()) as display:
        joined = join_parts(store, display)
    _answer_store(json, joined, time.monotonic() - begin)


def _answer_store(json: bool, store: TokenStore, seconds: float) -> None:
    counts = {split: store.counts(split) for split in store.splits}
    effort = {
        "seconds": round(seconds, 2),
        "tokens_per_second": round(sum(c.tokens for c in counts.values()) / seconds),
        "bytes_per_second": round(sum(c.bytes for c in counts.values()) / seconds),
    }
    title = f"{store.path}: {store.vocab_size} token vocabulary"
    table = figures_table(title, "split", "documents", "tokens", "words", "lines", "bytes")
    for split, c in counts.items():
        numbers = (c.documents, c.tokens, c.words, c.lines, c.bytes)
        table.add_row(split, *(f"{n:,}" for n in numbers))
    facts = store.describe()
    rates = (
        f"{effort['seconds']:,} s, {effort['tokens_per_second']:,} tokens/s, "
        f"{effort['bytes_per_second'] / 1e6:.2f} MB/s"
    )
    rule = f"split: {facts['split']['rule']}, sha256 {facts['split']['sha256']}"
    answer(json, facts | {"preparation": effort}, table, rates, rule)


def train(
    recipe: Recipe,
    *overrides: str,
    data: Store | None = None,
    out: Folder | None = None,
    resume: Literal["auto", "never"] = "auto",
    init_from: Annotated[str | None, "MODEL"] = None,
    budget: Annotated[str | None, "TIME"] = None,
    cluster: Annotated[str | None, "PARTITION"] = None,
    nodes: int = 1,
    gpus: int = 8,
    hours: float = 24.0,
    dry_run: DryRun = False,
    devices: int | None = None,
    device_tflops: float | None = None,
    device_gb: float | None = None,
    quiet: bool = False,
    json: Json = False,
) -> None:
    """Train a model by a recipe.

    RECIPE is PRESET.PROTOCOL (`pha recipes` lists both) or a YAML file; hf:NAME in the place of
    a preset is a model of transformers. Any key can be set:
      pha train pha-tiny.text --data stores/mine --run.epochs 3 --model.dropout 0.2
    `pha recipes --keys` explains every key. The same command continues a stopped run.

    Args:
        out: run folder (runs/RECIPE)
        resume: auto: continue from the newest checkpoint; never: refuse a folder in use
        init_from: start from these weights
        budget: train for so long (20min, 90s, 2h): some steps tell the speed, by which run.steps is
            set; steps, schedule and evaluations then end with the time, interruptions left out
        cluster: hand the run to Slurm, which starts it again after a preemption or its time;
            with --dry-run: print the script
        nodes: with --cluster: machines
        gpus: with --cluster: of each machine
        hours: with --cluster: of each attempt
        devices: with --dry-run: what it takes on so many devices such as this one, or
        device_tflops: on GPUs with so many TFLOP/s of matrix products
        device_gb: and so much memory
        quiet: progress, but no table at the end
        json: print the result as JSON
    """
    from pha.runs import RunFolder
    from pha.train.budget import fit_budget, read_seconds
    from pha.train.cluster import ClusterJob
    from pha.train.plan import Card
    from pha.train.recipes import LENGTHS, as_words, load_recipe, parse_overrides
    from pha.train.run import run_training
    from pha.train.session import open_session, print_plan

    words = list(overrides)
    if data is not None:
        words += ["--data.store", str(data)]
    if init_from is not None:
        words += ["--run.init_from", init_from]
    before = RunFolder(out or Path("runs") / file_name(recipe)).read_config().get("run", {})
    import_modules(before.get("imports", []), "run.imports")
    asked = parse_overrides(words)
    if budget is not None:
        if given := [key for key in LENGTHS if asked.get(key) is not None]:
            raise PHAError(f"--budget says how long the run is, and so does {given[0]}; give one")
        asked["run.steps"] = 1
    config = load_recipe(recipe, asked)
    unheard = [key for key in asked if key.startswith("model.") and key != "model.dropout"]
    if config.run.init_from is not None and unheard:
        raise PHAError(f"{unheard[0]}: the model is that of {config.run.init_from}; leave it out")
    out = out or Path("runs") / file_name(str(config.recipe))
    console = outcome_console(json) if dry_run else progress_console()
    if devices is not None and (devices < 1 or not dry_run):
        raise PHAError("--devices is for --dry-run, and at least 1; torchrun starts processes")
    if cluster is None and (nodes, gpus, hours) != (1, 8, 24.0):
        raise PHAError("--nodes, --gpus and --hours are for --cluster; torchrun starts processes")
    if cluster is not None and budget is not None:
        raise PHAError("--budget measures this machine; with --cluster give run.steps")
    if cluster is not None:
        if resume == "never" or (devices, device_tflops, device_gb) != (None, None, None):
            raise PHAError(
                "--cluster goes on with what is there; leave out --resume, --devices, "
                "--device-tflops and --device-gb"
            )
        words += as_words({"run.imports": config.run.imports})
        job = ClusterJob([recipe, *words], out, cluster, nodes, gpus, hours)
        if dry_run:
            print(job.script(), end="")
            return
        number = job.submit()
        said = f"job {number} is in the queue and will write to {job.log}"
        answer(json, {"job": number, "log": str(job.log)}, said)
        return
    if budget is not None:
        config = fit_budget(config, out, read_seconds(budget), console)
    card = None
    if device_tflops is not None or device_gb is not None:
        if (
            not dry_run
            or not device_tflops
            or not device_gb
            or not (0 < device_tflops < math.inf and 0 < device_gb < math.inf)
        ):
            raise PHAError("--device-tflops and --device-gb are for --dry-run, both, and above 0")
        card = Card(device_tflops * 1e12, round(device_gb * 1e9))
    if dry_run:
        session = open_session(config, out, console, resume, devices, card)
        answer(json, print_plan(session))
        return
    result = run_training(config, out, console, resume)
    if result is None:
        return  # not the main process
    shown: list[RenderableType] = []
    if not quiet:
        from pha.report.tables import results_table

        shown = [results_table([result]), f"run folder: {out}"]
    answer(json, result.to_dict(), *shown)


def average(models: Sequence[Annotated[Path, "MODEL"]], *, out: Folder, json: Json = False) -> None:
    """Average the weights of saved models.

    MODEL is a run, a checkpoint or a saved model; all must be of one shape. Runs average
    their own best checkpoints where run.average_best says so.

    Args:
        models: two or more of one shape
        out: folder of the averaged model
    """
    from pha.loading import model_folder
    from pha.train.averaging import average_models
    from pha.utils.outputs import claimed, require_new_folder

    require_new_folder(out)
    folders = [model_folder(path)[0] for path in models]
    with claimed(out):
        average_models(folders, out)
    record = {"path": str(out), "models": list(map(str, folders))}
    answer(json, record, f"{out}: the average of {len(folders)} models")


def recipes(recipe: Recipe | None = None, *, keys: bool = False, json: Json = False) -> None:
    """List recipes, or explain their keys.

    `pha recipes --keys` is a table of every key, and `pha recipes --keys WORD` of those that have
    the word in their name or meaning.

    Args:
        recipe: print this one, resolved; with --keys a word to look for
        keys: every key with its default and meaning
    """
    import yaml

    from pha.model.presets import PRESETS
    from pha.peers import PEERS, PREFIX
    from pha.tasks import TASKS
    from pha.train.recipes import describe, load_recipe, protocols

    if keys:
        _explain_keys(recipe or "", json)
        return
    if recipe is not None:
        # A recipe without data of its own needs some to be shown.
        content = load_recipe(recipe, defaults={"data.store": "STORE"}).to_dict()
        answer(json, content, yaml.safe_dump(content, sort_keys=False).rstrip("\n"))
        return
    about = {name: describe(text) for name, text in protocols().items()}
    about |= {
        name: f"task: {(inspect.getdoc(task) or '').partition(chr(10))[0]}"
        for name, task in TASKS.items()
    }
    table = Table(title="RECIPE = PRESET.PROTOCOL", title_justify="left")
    table.add_column("protocol", no_wrap=True)
    table.add_column("what it is")
    for name, text in about.items():
        table.add_row(name, text)
    peers = [PREFIX + name for name in PEERS]
    record = {"protocols": about, "presets": list(PRESETS), "peers": peers}
    lines = "presets: " + "  ".join(PRESETS), "models of transformers, also hf:FOLDER: "
    answer(json, record, table, lines[0], lines[1] + "  ".join(peers))


def _explain_keys(word: str, json: bool) -> None:
    """The keys of recipes, those that have to do with a word, as a table for each section.

    Raises:
        PHAError: there is none.
    """
    from pha.train.keys import in_words, recipe_keys

    found = [
        key for key in recipe_keys().values() if word.lower() in f"{key.name} {key.meaning}".lower()
    ]
    if not found:
        raise PHAError(
            f"no key has {word!r} in its name or meaning; `pha recipes --keys` lists all"
        )
    tables = []
    for section, keys in groupby(found, lambda key: key.name.partition(".")[0]):
        table = Table(
            title=section, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for heading in ("key", "default", "meaning"):
            table.add_column(heading, overflow="fold")
        for key in keys:
            table.add_row(key.name, to_json(key.default), f"{key.meaning} ({in_words(key.hint)})")
        tables.append(table)
    record = [
        {"key": key.name, "default": key.default, "type": in_words(key.hint)}
        | {"meaning": key.meaning}
        for key in found
    ]
    answer(json, record, *tables)
