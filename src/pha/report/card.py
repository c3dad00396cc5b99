"""The model card: what a shared model is, how it was measured and how it came about.

The YAML header follows the model cards of the Hugging Face Hub, with the results as `model-index`.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pha.modeling import PHAConfig
from pha.report.collect import Run, section
from pha.results import Evaluation
from pha.utils.text import count, duration, fixed, percent, perplexity, plain, shorten

LIBRARY = "pha"

_TAGS = ["pha", "pytorch", "safetensors", "hybrid", "state-space-model"]
_METRICS = {
    "perplexity": "perplexity per token",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
    "bits_per_byte": "bits per byte",
    "accuracy": "next-token accuracy",
}
_LIMIT = 300


@dataclass(frozen=True)
class Metric:
    """A measured value: `kind` names it on the Hub, `words` and `shown` are for people."""

    kind: str
    words: str
    value: float
    shown: str


@dataclass(frozen=True)
class Table:
    """The metrics of one evaluation, with its protocol in words."""

    split: str
    data: str
    protocol: str
    metrics: list[Metric]


@dataclass(frozen=True)
class Group:
    """Facts under a heading."""

    title: str
    rows: list[tuple[str, str]]


def model_card(
    name: str,
    config: PHAConfig,
    run: Run | None,
    *,
    no_results: str | None = None,
    weights: str = "fp32",
    license_id: str | None = None,
    datasets: Sequence[str] = (),
) -> ModelCard:
    """Write the card of a model.

    Args:
        name: of the model; also its folder's.
        config: of the model.
        run: the training run, or None where it is not known.
        no_results: why the card gives no results; None gives those of the run.
        weights: type of the weights, `fp32` or `bf16`.
        license_id: licence as the Hub names it, such as `apache-2.0`; left out if absent.
        datasets: data sets by their names on the Hub.
    """
    tables = [] if run is None or no_results else [_table(run, e) for e in run.evaluations]
    tables = [table for table in tables if table.metrics]
    results = [result for table in tables for result in _eval_results(run, table, datasets)]
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        license=license_id,
        datasets=list(datasets) or None,
        tags=_TAGS,
        model_name=name if results else None,
        eval_results=results or None,
    )
    body = (
        _environment()
        .get_template("card.md.j2")
        .render(
            name=name,
            folder=json.dumps(name, ensure_ascii=False),
            command_folder=shlex.quote(name),
            parameters=count(run.parameters) if run else "",
            architecture=_architecture(config),
            no_results=no_results or ("" if tables else "The run measured nothing on a split."),
            tables=tables,
            weights=weights,
            groups=_groups(run, weights),
        )
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pha.report"),
        autoescape=False,  # Markdown: the template's filter `md` escapes
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["md"] = _markdown
    return environment


def _architecture(config: PHAConfig) -> str:
    layers = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
    names = {
        "gss": "a gated state space",
        "mehta_gss": "a gated state space (Mehta et al. 2022)",
        "aux_ffn": "a feed-forward network",
    }
    branches = [names.get(branch, branch) for branch in config.branches]
    together = " and ".join(filter(None, [", ".join(branches[:-1]), branches[-1]]))
    order = "in parallel, mixed with learned weights" if config.block == "parallel" else "in turn"
    words = f"{layers}, each with {together}" + (f" {order}" if len(branches) > 1 else "")
    if config.attention_layers:
        numbers = ", ".join(map(str, config.attention_layers))
        words += f", but attention alone in layers {numbers} (counted from 0)"
    return words


def _table(run: Run, evaluation: Evaluation) -> Table:
    metrics = []
    for kind, words in _METRICS.items():
        value = getattr(evaluation, kind)
        if math.isfinite(value):
            show = {"accuracy": lambda x: percent(x, 2), "bits_per_byte": lambda x: fixed(x, 4)}
            metrics.append(Metric(kind, words, value, show.get(kind, perplexity)(value)))
    return Table(evaluation.split, _data_name(run), _protocol(evaluation.protocol), metrics)


def _protocol(protocol: Mapping[str, Any]) -> str:
    """How an evaluation was made, in words."""
    length, stride = protocol.get("sequence_length"), protocol.get("stride")
    parts = [f"{protocol.get('windows', '')} windows of {length} tokens".strip()] if length else []
    if stride not in (None, length):
        parts.append(f"advancing by {stride}")
    parts.append(str(protocol.get("documents", "")))
    if "tokens_scored" in protocol:
        whole = "the whole split" if protocol.get("whole_split") else "part of the split"
        parts.append(f"{protocol['tokens_scored']:,} tokens scored, {whole}")
    parts.append(str(protocol.get("precision", "")))
    return _line(", ".join(part for part in parts if part)) or "not recorded"


def _eval_results(run: Run | None, table: Table, datasets: Sequence[str]) -> Iterator[EvalResult]:
    assert run is not None
    source = str(run.data.get("source") or "text")
    for metric in table.metrics:
        yield EvalResult(
            task_type="text-generation",
            task_name="language modelling",
            dataset_type=datasets[0] if datasets else _slug(source),
            dataset_name=table.data,
            dataset_split=table.split,
            metric_type=metric.kind,
            metric_name=f"{metric.words}; {table.protocol}",
            metric_value=metric.value,
        )


def _groups(run: Run | None, weights: str) -> list[Group]:
    """Model, training, data and provenance as tables."""
    model = [("weights", weights)]
    if run is None:
        return [Group("Model", model)]
    preset = run.result.model.preset if run.result else None
    provenance, data = run.provenance, run.data
    training = section(run.config, "run")
    optimiser = section(run.config, "optimizer")
    commit = provenance.get("git_commit")
    if commit and provenance.get("git_dirty"):
        commit = f"{commit}, with changes that were not committed"
    versions = [f"{name} {provenance[name]}" for name in _SOFTWARE if provenance.get(name)]
    return [
        Group("Model", [("preset", plain(preset)), *model]),
        Group(
            "Training",
            [
                ("recipe", _last_name(plain(run.recipe))),
                ("tokens seen", fixed(run.tokens_seen, 0)),
                ("optimiser steps", fixed(run.steps, 0)),
                ("step of these weights", fixed(run.result.chosen_step if run.result else None, 0)),
                ("sequences per step", plain(training.get("global_batch"))),
                ("tokens per sequence", plain(section(run.config, "data").get("sequence_length"))),
                ("learning rate", plain(optimiser.get("learning_rate"))),
                ("seed", plain(run.seed)),
                ("precision", plain(provenance.get("precision"))),
                ("time", duration(run.seconds)),
                ("hardware", plain(provenance.get("device"))),
                ("processes", plain(provenance.get("processes"))),
            ],
        ),
        Group(
            "Data",
            [
                ("text", _data_name(run)),
                ("training tokens", fixed(_train_tokens(data), 0)),
                ("tokenizer", plain(_last_name(str(data.get("tokenizer") or "")))),
                ("SHA-256 of the tokens", plain(data.get("sha256"))),
            ],
        ),
        Group(
            "Provenance",
            [
                ("commit", plain(commit)),
                ("software", plain(versions)),
                ("date", plain(provenance.get("date"))),
            ],
        ),
    ]


_SOFTWARE = ("pha", "torch", "transformers", "python")


def _train_tokens(data: Mapping[str, Any]) -> float | None:
    tokens = section(section(data, "counts"), "train").get("tokens")
    return tokens if isinstance(tokens, int) else None


def _data_name(run: Run) -> str:
    """The data in words, without the folders that a path to it goes through."""
    description = str(run.data.get("description") or "") or str(run.data.get("source") or "")
    return _line(_last_name(description)) or "unnamed text"


def _last_name(path: str) -> str:
    """`gpt2:/home/me/gpt2` is `gpt2:gpt2`; anything that is no absolute path stays."""
    return re.sub(r"(^|(?<=[\s:'\"(]))(~?/|[A-Za-z]:\\)\S*[/\\](?=[^/\\\s])", "", path)


def _slug(text: str) -> str:
    """Lower-case letters, digits and dashes: what a data set may be called."""
    return re.sub(r"[^a-z0-9._]+", "-", _last_name(text).lower()).strip("-.") or "text"


def _line(text: str) -> str:
    """Text on one line of bounded length."""
    return shorten(text, _LIMIT)


def _markdown(text: str) -> str:
    """Text that stays what it is in a table of Markdown."""
    return re.sub(r"([\\|<>`*_\[\]])", r"\\\1", _line(text))
