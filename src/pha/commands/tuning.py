"""`pha bench sweep`: the block sizes of the gated scan that a GPU is fastest with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from pha.commands.common import answer, figures_table, progress_console
from pha.utils.outputs import require_folder, require_own, writing


def sweep_scan(
    models: Sequence[str],
    lengths: Sequence[int],
    batch: int,
    precision: str,
    seconds: float,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure all sizes on one device and keep the best for it, where the scan finds them.

    Raises:
        PHAError: no GPU, a model that is no preset, or no size that works.
    """
    import torch

    from pha.bench.peers import model_config
    from pha.modeling import PHAConfig
    from pha.ops.gated_scan.sizes import write_tuned
    from pha.ops.gated_scan.tuning import sweep
    from pha.results import JSON_FORMAT
    from pha.utils.errors import PHAError
    from pha.utils.files import write_json
    from pha.utils.hardware import PRECISIONS, default_device, provenance

    device = default_device()
    if device.type != "cuda":
        raise PHAError("sweep tries sizes of a kernel that needs a CUDA device; there is none here")
    configs = [model_config(name, max(lengths)) for name in models]
    if not all(isinstance(config, PHAConfig) for config in configs):
        raise PHAError("sweep takes the shapes of our presets; leave hf:PEER out")
    if out is not None:
        require_folder(out)
        require_own(out / "bench-sweep.json")
    shapes = [(batch, length, config.state_size) for config in configs for length in lengths]
    with progress_console().status("") as status:
        rows, best = sweep(shapes, PRECISIONS[precision], seconds, progress=status.update)
    path = write_tuned(device, best)
    record: dict[str, Any] = {
        "kind": "sweep",
        "format": JSON_FORMAT,
        "best": asdict(best),
        "rows": rows,
        "provenance": provenance(device, precision),
    }
    if out is not None:
        with writing(out):
            write_json(out / "bench-sweep.json", record)
    table = figures_table(
        f"gated scan, forward and backward, {torch.cuda.get_device_name(device)}",
        "block, unroll, stages, wanted, enough",
        "ms",
        "over the best",
    )
    times: dict[str, list[float | None]] = {}
    for row in rows:
        sizes = ", ".join(str(value) for value in list(row["sizes"].values())[:5])
        times.setdefault(sizes, []).append(row["seconds"])
    whole = {sizes: fmean(t for t in each if t) for sizes, each in times.items() if all(each)}
    for sizes in times:
        shown = "failed", "-"
        if sizes in whole:
            shown = f"{whole[sizes] * 1e3:.3f}", f"{whole[sizes] / min(whole.values()):.2f}"
        table.add_row(sizes, *shown)
    answer(as_json, record, table, f"the best is kept in {path}")
