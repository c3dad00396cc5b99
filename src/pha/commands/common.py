"""What the verbs share: how one adds itself to the command line, and where output goes."""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console


class AddVerb(Protocol):
    """Adds a verb to the command line and returns its parser."""

    def __call__(
        self, name: str, run: Callable[..., Any], summary: str, detail: str = ""
    ) -> argparse.ArgumentParser:
        """`run` is called with the parsed options."""
        ...


def console_for(options: Namespace) -> Console:
    """Progress and tables; on standard error where standard output is for JSON."""
    return Console(stderr=bool(getattr(options, "json", False)))


def print_json(value: Any) -> None:
    """Write `value` to standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    print()
