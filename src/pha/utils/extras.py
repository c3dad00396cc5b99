"""Which extra of this package brings what is not installed."""

from __future__ import annotations

EXTRAS = {
    "train": ("accelerate", "filelock", "jsonargparse", "psutil", "rich", "shtab", "yaml"),
    "report": ("jinja2", "matplotlib", "scipy"),
    "data": ("datasets", "pyarrow", "zstandard"),
    "cpu": ("numba",),
    "harness": ("lm_eval",),
    "serve": ("fastapi", "openai", "uvicorn"),
    "cluster": ("submitit",),
}


def remedy(error: ModuleNotFoundError) -> str | None:
    """What to install where a package of an extra is missing; None for any other module."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            todo = f"run `pip install 'pha-lm[{extra}]'`"
            return f"this needs {package}, which is not installed; {todo}"
    return None
