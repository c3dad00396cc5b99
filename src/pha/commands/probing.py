"""The verb that asks models about long contexts: probe."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pha.commands.common import (
    Attention,
    Folder,
    Json,
    Model,
    Precision,
    Store,
    answer,
    progress_bars,
    read_attention,
    require_tokens,
)
from pha.utils.errors import PHAError
from pha.utils.outputs import require_outputs, writing
from pha.utils.text import shorten


def probe(
    models: Sequence[Model],
    *,
    data: Store,
    probes: Annotated[tuple[str, ...], "A,B,..."] = ("position",),
    split: str = "test",
    sequence_length: int | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
    precision: Precision = "fp32",
    attention: Sequence[Attention] = (),
    piece: int = 2048,
    out: Folder | None = None,
    json: Json = False,
) -> None:
    """What models make of long contexts: loss by position and kind of token, and recall.

      pha probe runs/a runs/b --data STORE --probes position,planted --out DIR
    With T the trained length, probes are
      position  loss by octave of position to 64 T, and against windows of T
      context   the same targets with T/4 to 64 T tokens before them
      classes   new tokens, repeated bigrams and 5-grams, by count and distance; in windows of T
      planted   what 32 random tokens cost less when they come again after a gap
      needles   facts hidden in the text: gain, binding and presence by length and depth
      horizon   what it costs to let the state or attention see w tokens alone (ours)
      need      what it costs to have a branch's mean in its place (ours)
    Models after the first are set against it, token by token. Documents are not kept apart:
    take a split of long ones.

    Args:
        models: runs, checkpoints or saved models; hf:FOLDER or hf:NAME of transformers
        probes: which, see above
        split: train, validation or test
        sequence_length: T (as the models were trained, else 1024)
        length: the longest context (64 T, or what text or model have room for); horizon and
            need have windows of T
        max_tokens: read only so many tokens of the split
        piece: tokens per forward pass; what is longer goes through in pieces
        out: write probe-NAME.json, .svg and .png for each probe
    """
    from pha.data import TokenStore
    from pha.evals.probes import PROBES
    from pha.evals.probes.reading import Question
    from pha.evals.protocols import DEFAULT_LENGTH, own_protocol
    from pha.loading import load_model
    from pha.report.probes import probe_record, probe_tables, save_probe
    from pha.results import JSON_FORMAT
    from pha.utils.files import write_json
    from pha.utils.hardware import choose_precision, default_device, provenance

    for name in probes:
        if name not in PROBES:
            raise PHAError(f"there is no probe {name!r}; choose {', '.join(PROBES)}")
    require_tokens(
        piece=piece, sequence_length=sequence_length, length=length, max_tokens=max_tokens
    )
    for name in probes:
        require_outputs(out, *(f"probe-{name}.{ending}" for ending in ("json", "svg", "png")))
    device, store, options = default_device(), TokenStore.open(data), read_attention(attention)
    loaded = [load_model(path, device, attention=options) for path in models]
    for model in loaded:
        store.require_tokenizer(model.tokenizer)
    lengths = {p.sequence_length for m in loaded if (p := own_protocol(m)) is not None}
    if sequence_length is None and len(lengths) > 1:
        raise PHAError(
            f"the models were trained on sequences of {' and '.join(map(str, sorted(lengths)))} "
            "tokens; choose one with --sequence-length"
        )
    trained = sequence_length or min(lengths, default=DEFAULT_LENGTH)
    chosen = choose_precision(precision, device)
    limits = [getattr(each.model, "longest", None) for each in loaded]
    longest = min((limit for limit in limits if limit is not None), default=None)
    question = Question(store, split, trained, length, max_tokens, chosen, piece, longest)
    names = _names(models)
    found = {}
    with progress_bars() as progress:
        for name in probes:
            found[name] = {
                label: [PROBES[name](model, question, partial(progress, f"{name} {label}"))]
                for label, model in zip(names, loaded, strict=True)
            }
    facts = {"format": JSON_FORMAT, "provenance": provenance(device, chosen)}
    facts |= {"attention": options} if options else {}
    records = {
        name: {
            "probe": name,
            "models": dict(zip(names, map(str, models), strict=True)),
            "protocol": next(iter(readings.values()))[0].protocol,
            "panels": probe_record(readings),
        }
        for name, readings in found.items()
    }
    if out is not None:
        with writing(out):
            for name, record in records.items():
                write_json(out / f"probe-{name}.json", record | facts)
                save_probe(found[name], out / f"probe-{name}", f"{name}: {', '.join(names)}")
    shown: list[Any] = [f"{name}: {path}" for name, path in zip(names, models, strict=True)]
    shown += [table for readings in found.values() for table in probe_tables(readings)]
    where = [] if out is None else [f"JSON and pictures: {out}/probe-*"]
    answer(json, {"probes": records} | facts, *shown, *where)


def _names(models: Sequence[Path]) -> list[str]:
    """Short names of models, all different."""
    names = [shorten(path.name or str(path), 24) for path in models]
    if len(set(names)) < len(names):
        names = [f"{chr(ord('A') + i)}: {name}" for i, name in enumerate(names)]
    return names
