"""Run the tutorials, docs/tutorials/*.md, into notebooks with what they printed and drew.

    python scripts/run_tutorials.py build/tutorials

Each runs in an empty folder of its own, without the Hub. One that has run since its text changed is
left as it is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

# Notebooks promise rich a terminal, whose moving lines no page can show.
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TTY_COMPATIBLE": "0"}
# A page has two languages. The notebook's is Python; shell becomes cells that begin with %%sh.
SPEC = "{name: python3, language: python, display_name: Python 3}"
KERNEL = f"---\njupyter:\n  kernelspec: {SPEC}\n---\n\n"
TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def run_tutorial(source: Path, out: Path) -> None:
    """Run the tutorial `source` and write it as the notebook `out`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = jupytext.reads(KERNEL + source.read_text(encoding="utf-8"), "md")
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=1800, resources=resources).execute(env=ENVIRONMENT)
    nbformat.write(notebook, out)


def main(out: Path) -> None:
    """Run what has changed."""
    out.mkdir(parents=True, exist_ok=True)
    for source in sorted(TUTORIALS.glob("*.md")):
        notebook = out / f"{source.stem}.ipynb"
        if not notebook.exists() or notebook.stat().st_mtime < source.stat().st_mtime:
            print(source.stem, flush=True)
            run_tutorial(source, notebook)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
