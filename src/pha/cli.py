"""`pha VERB`: parsing and printing only. Every verb imports what it needs when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pha.commands import VERBS
from pha.utils.errors import PHAError, TrainingInterruptedError
from pha.utils.extras import remedy

# Verbs that pass further arguments on: --section.key to the recipe, or lm_eval's to lm_eval.
OPEN = frozenset({"train", "sweep", "study", "harness"})

ABOUT = """\
The Parallel Hybrid Architecture: train, evaluate and study language models whose every layer runs a
gated state space, attention and a feed-forward network side by side.

first steps
  pha demo                                    train PHA and its attention-only twin, see a report
  pha prepare my-texts/ --tokenizer bpe:8192 --out stores/mine
  pha train pha-tiny.text --data stores/mine --out runs/mine
  pha generate runs/mine --prompt "Once"
  pha report runs/mine
"""


class Parser(argparse.ArgumentParser):
    """One clear line and exit code 2 for a mistake, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and leave."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="pha",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="import this first, such as a file my_branch.py here with a branch of your own",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")

    def verb(name: str, run: Callable[..., Any], summary: str, detail: str = "") -> Parser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{detail}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    for add in VERBS:
        add(verb)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb; mistakes that a user can put right end in one line and exit code 2."""
    # OpenMP's threads spin for milliseconds after each piece of work, on processors that compiled
    # kernels between two pieces need. Read when torch is imported, which verbs do later.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if options.version:
        from pha import __version__

        print(f"pha {__version__}")
        return
    if options.verb is None:
        parser.print_help()
        return
    if rest and options.verb not in OPEN:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        _import(options.modules)
        options.run(options, rest) if options.verb in OPEN else options.run(options)
    except PHAError as error:
        sys.exit(_fail(options.verb, str(error)))
    except ModuleNotFoundError as error:
        if (what := remedy(error)) is None:
            raise
        sys.exit(_fail(options.verb, what))
    except TrainingInterruptedError as error:
        print(f"pha {options.verb}: {error}", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print(f"pha {options.verb}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


def _import(modules: Sequence[str]) -> None:
    if modules:
        sys.path.insert(0, str(Path.cwd()))
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise PHAError(f"--import {name}: {error}") from error


def _fail(verb: str, message: str) -> int:
    print(f"pha {verb}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
