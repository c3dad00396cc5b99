"""The model card: what a shared model is, how it was measured and how it came about.

The YAML header follows the model cards of the Hugging Face Hub, with the results as `model-index`.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pha.modeling import PHAConfig
from pha.results import Evaluation, RunResult
from pha.sharing.code import FILE
from pha.utils.text import count, duration, fixed, percent, perplexity, plain, shorten

_TEMPLATE = Path(__file__).with_name("card.md")
_TAGS = ["pha", "pytorch", "safetensors", "hybrid", "state-space-model"]
# What the Hub calls a score -> in words, and how it is printed.
_METRICS = {
    "perplexity": ("perplexity per token", perplexity),
    "word_perplexity": ("perplexity per word", perplexity),
    "byte_perplexity": ("perplexity per byte", perplexity),
    "bits_per_byte": ("bits per byte", lambda value: fixed(value, 4)),
    "accuracy": ("next-token accuracy", lambda value: percent(value, 2)),
}
_LIMIT = 300


def model_card(
    name: str,
    config: PHAConfig,
    result: RunResult | None,
    settings: Mapping[str, Any],
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
        result: of the training run, or None where it is not known.
        settings: the run's configuration; empty where it is not known.
        no_results: why the card gives no results; None gives those of the run.
        weights: type of the weights, `fp32` or `bf16`.
        license_id: as the Hub names it, such as `apache-2.0`.
        datasets: as the Hub names them.
    """
    tables = []
    if result is not None and no_results is None:
        tables = [list(_eval_results(result, each, datasets)) for each in result.evaluations]
        tables = [scores for scores in tables if scores]
    results = [score for scores in tables for score in scores]
    data = ModelCardData(
        library_name="pha",
        pipeline_tag="text-generation",
        license=license_id,
        datasets=list(datasets) or None,
        tags=_TAGS,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        str(_TEMPLATE),
        md=_markdown,
        name=name,
        code=FILE,
        folder=json.dumps(name, ensure_ascii=False),
        command_folder=shlex.quote(name),
        parameters=count(result.model.parameters.total) if result else "",
        architecture=_architecture(config),
        no_results=no_results or ("" if results else "The run measured nothing on a split."),
        tables=tables,
        shown={kind: show for kind, (_, show) in _METRICS.items()},
        weights=weights,
        groups=_groups(config, result, settings, weights),
    )


def _architecture(config: PHAConfig) -> str:
    layers = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
    names = {
        "gss": "a gated state space",
        "mehta_gss": "a gated state space (Mehta et al. 2022)",
        "aux_ffn": "a feed-forward network",
    }
    if config.layer_pattern:
        each = config.branches_of_layers()
        return f"{layers}: " + ", ".join(" and ".join(branches) for branches in each)
    branches = [names.get(branch, branch) for branch in config.branches]
    together = " and ".join(filter(None, [", ".join(branches[:-1]), branches[-1]]))
    order = "in parallel, mixed with learned weights" if config.block == "parallel" else "in turn"
    words = f"{layers}, each with {together}" + (f" {order}" if len(branches) > 1 else "")
    if config.attention_layers:
        numbers = ", ".join(map(str, config.attention_layers))
        words += f", but attention alone in layers {numbers} (counted from 0)"
    return words


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


def _eval_results(
    result: RunResult, evaluation: Evaluation, datasets: Sequence[str]
) -> Iterator[EvalResult]:
    """Every score that is a number, with its protocol in its name."""
    source = _slug(str(result.data.get("source") or "text"))
    for kind, (words, _) in _METRICS.items():
        value = getattr(evaluation, kind)
        if math.isfinite(value):
            yield EvalResult(
                task_type="text-generation",
                task_name="language modelling",
                dataset_type=datasets[0] if datasets else source,
                dataset_name=_data_name(result),
                dataset_split=evaluation.split,
                metric_type=kind,
                metric_name=f"{words}; {_protocol(evaluation.protocol)}",
                metric_value=value,
            )


def _groups(
    config: PHAConfig, result: RunResult | None, settings: Mapping[str, Any], weights: str
) -> dict[str, dict[str, str]]:
    """Heading -> name -> value: model, training, data and provenance."""
    run, data = settings.get("run", {}), settings.get("data", {})
    training = {
        "recipe": _last_name(plain(settings.get("recipe"))),
        "sequences per step": plain(run.get("global_batch")),
        "tokens per sequence": plain(data.get("sequence_length")),
        "learning rate": plain(settings.get("optimizer", {}).get("learning_rate")),
        "seed": plain(run.get("seed")),
    }
    if run.get("imports"):
        training["modules beside pha"] = plain(run["imports"])
    if result is None:
        groups = {"Model": {"weights": weights} | _context(config)}
        return groups | {"Training": training} if settings else groups
    provenance, data = result.provenance, result.data
    commit = plain(provenance.get("git_commit"))
    if provenance.get("git_dirty"):
        commit += ", with changes that were not committed"
    software = [f"{name} {provenance[name]}" for name in _SOFTWARE if provenance.get(name)]
    return {
        "Model": {"preset": plain(result.model.preset), "weights": weights} | _context(config),
        "Training": training
        | {
            "recipe": _last_name(plain(result.recipe)),
            "seed": plain(result.seed),
            "tokens seen": fixed(result.tokens_seen, 0),
            "optimiser steps": fixed(result.steps, 0),
            "step of these weights": fixed(result.chosen_step, 0),
            "precision": plain(provenance.get("precision")),
            "time": duration(result.seconds),
            "hardware": plain(provenance.get("device")),
            "processes": plain(provenance.get("processes")),
        },
        "Data": {
            "text": _data_name(result),
            "training tokens": fixed(data.get("counts", {}).get("train", {}).get("tokens"), 0),
            "tokenizer": plain(_last_name(str(data.get("tokenizer") or ""))),
            "SHA-256 of the tokens": plain(data.get("sha256")),
        },
        "Provenance": {
            "commit": commit,
            "software": plain(software),
            "date": plain(provenance.get("date")),
        },
    }


def _context(config: PHAConfig) -> dict[str, str]:
    """How long its sequences were in training, and what attention makes of longer ones."""
    attention = config.attention_options()
    rotary = [layer for layer in attention if layer.get("positions", "rotary") == "rotary"]
    bases = {layer.get("theta") or config.rope_theta for layer in rotary}
    scaled = {layer["length_scaling"] for layer in attention if layer.get("length_scaling")}
    rows = {
        "trained length": f"{config.longest_trained:,} tokens",
        "base of the rotary embedding": ", ".join(f"{base:,.6g}" for base in sorted(bases)),
        "temperature": ", ".join(f"tau + ln(n / {T}) at n > {T} keys" for T in sorted(scaled)),
    }
    return {name: text for name, text in rows.items() if text}


_SOFTWARE = ("pha", "torch", "transformers", "python")


def _data_name(result: RunResult) -> str:
    """The data in words, without the folders that a path to it goes through."""
    description = str(result.data.get("description") or result.data.get("source") or "")
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
