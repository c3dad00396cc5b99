"""Run the tutorials, docs/tutorials/*.md, into notebooks with their outputs.

    python scripts/run_tutorials.py build/tutorials [NAME ...]

Each runs in an empty folder of its own, without a network. One that has not changed since is left.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def run_tutorial(source: Path, workplace: Path) -> nbformat.NotebookNode:
    """The notebook of a tutorial after it has run in a folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    workplace.mkdir(parents=True, exist_ok=True)
    resources = {"metadata": {"path": str(workplace)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()
    return notebook
