"""Which packages this Python lacks, and what is lost without each."""

from __future__ import annotations

from importlib.util import find_spec

REQUIRED = (
    *("torch", "transformers", "accelerate", "tokenizers", "safetensors"),
    *("numpy", "yaml", "psutil", "rich"),
)
"""Nothing runs without these."""

OPTIONAL = {
    "jsonargparse": "recipes cannot be read: the stage `train` fails",
    "pytest": "the stage `tests` fails",
    "hypothesis": "tests that draw their inputs cannot be collected",
    "triton": "the scan runs as a loop in torch",
    "matplotlib": "no pictures",
    "jinja2": "no HTML report",
    "scipy": "no intervals when models are compared",
    "numba": "the scan on a CPU runs as a loop in torch",
    "datasets": "no data sets from the Hub; local text works",
    "pyarrow": "no .parquet",
    "zstandard": "no .zst",
}
"""Import name -> what is lost without it."""


def missing() -> dict[str, str]:
    """Import name -> what is lost, for each package that is not there."""
    known = dict.fromkeys(REQUIRED, "nothing runs without it") | OPTIONAL
    return {name: loss for name, loss in known.items() if find_spec(name) is None}
