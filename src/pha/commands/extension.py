"""The verb that makes a model fit for longer contexts: extend."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pha.commands.common import (
    DryRun,
    Folder,
    Json,
    Store,
    answer,
    figures_table,
    progress_bars,
    progress_console,
)
from pha.utils.errors import PHAError
from pha.utils.outputs import require_outputs, writing
from pha.utils.text import DASH, file_name, fixed


def extend(
    run: Annotated[Path, "RUN"],
    *,
    to: Annotated[int, "LENGTH"],
    data: Store | None = None,
    share: float = 0.05,
    base: Annotated[str, "X"] = "auto",
    length_scaling: bool = False,
    out: Folder | None = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train a finished run on longer sequences, and test what came of it.

      pha extend runs/mine --to 4096 --out runs/mine-4k
    Lengths grow by at most 4 in a stage, and each stage is a run in OUT/stage-N. Tokens of a
    step, masks and loss stay. Half of the steps begin with states of other texts, half of the
    sequences lie in one long document, and the rate is 0.2 of the first one, down to 0.
    Gates at the end: the loss at the old length rose by at most 0.5%; that at LENGTH is not
    above it; needles at LENGTH are found. A gate that fails is a finding, and the model stays.
    The same command continues a stopped extension.

    Args:
        run: a finished run of a PHA model on a text
        to: tokens of a sequence in the end
        data: token store made with the run's tokenizer (the run's own data)
        share: of the tokens that the model has seen, in each stage
        base: of the rotary embedding, in all stages; auto is the largest of the old one,
            0.0424 LENGTH^1.628, and the old one times s^(K/(K-2)) for s times the length
        length_scaling: let attention multiply its cosines by tau + ln(n/T) at n > T keys
        out: folder of the stages, extend.json and a picture (in runs/, by RUN and LENGTH)
    """
    from pha.report.probes import probe_record, save_probe
    from pha.results import JSON_FORMAT
    from pha.train.extend import plan_extension, train_stages
    from pha.train.gates import judge
    from pha.utils.files import write_json
    from pha.utils.hardware import default_device, provenance

    try:
        asked = None if base == "auto" else float(base)
    except ValueError:
        raise PHAError(f"--base {base}: write a number, or auto") from None
    out = out or Path("runs") / file_name(f"{run.resolve().name}-{to}")
    require_outputs(out, *(f"extend.{ending}" for ending in ("json", "svg", "png")))
    console = progress_console()
    plan = plan_extension(
        *(run, to, out, console),
        data=data,
        share=share,
        base=asked,
        length_scaling=length_scaling,
    )
    title = f"{run.resolve().name}: from {plan.trained:,} to {plan.length:,} tokens"
    table = figures_table(title, "stage", "tokens", "base", "sequences", "steps", "in all")
    stages = []
    for each in plan.stages:
        settings = each.config.run
        shown = DASH if each.base is None else f"{each.base:,.6g}"
        counts = (f"{n:,}" for n in (settings.global_batch, settings.steps or 0, each.tokens))
        table.add_row(each.out.name, f"{each.length:,}", shown, *counts)
        stages.append(
            {"run": str(each.out), "length": each.length, "base": each.base, "tokens": each.tokens}
            | {"attention": settings.init_attention, "steps": settings.steps}
            | {"long_documents": each.config.data.long_documents}
        )
    record: dict[str, Any] = {"model": str(run), "trained_length": plan.trained}
    record |= {"length": plan.length, "share": share, "stages": stages, "notes": plan.notes}
    if dry_run:
        answer(json, record, table, *plan.notes)
        return
    console.print(table)
    for note in plan.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if not train_stages(plan, console):
        return  # not the main process
    with progress_bars() as progress:
        found = judge(plan, progress)
    record |= {
        "split": plan.split,
        "losses": found.losses,
        "needle_gain": None if found.gain is None else asdict(found.gain),
        "gates": [asdict(gate) for gate in found.gates],
        "passed": found.passed,
        "by_position": probe_record(found.readings),
        "format": JSON_FORMAT,
        "provenance": provenance(default_device(), plan.stages[-1].config.run.precision),
    }
    with writing(out):
        write_json(out / "extend.json", record)
        save_probe(found.readings, out / "extend", title)
    losses = figures_table(
        f"loss on the {plan.split} split (nats per token)",
        *("", *(f"windows of {length:,}" for length in (plan.trained, plan.length))),
    )
    for name, values in found.losses.items():
        losses.add_row(name, *(fixed(value, 4) for value in values.values()))
    gates = figures_table("gates", "", "measured", "limit", "")
    for gate in found.gates:
        outcome = {True: "passed", False: "FAILED", None: "not measured"}[gate.passed]
        gates.add_row(gate.name, fixed(gate.value, 4), fixed(gate.limit, 4), outcome)
    words = [f"not measured: {gate.words}" for gate in found.gates if gate.words]
    failed = sum(gate.passed is False for gate in found.gates)
    verdict = (
        "all gates are passed" if found.passed else f"{failed} of {len(found.gates)} gates failed"
    )
    where = f"model: {plan.stages[-1].out}\nJSON and picture: {out}/extend.*"
    answer(json, record, losses, gates, *words, verdict, where)
