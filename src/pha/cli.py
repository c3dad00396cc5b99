"""`pha VERB`: parsing and printing only. Every verb imports what it needs when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pha.utils.errors import PHAError

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

    def verb(name: str, run: str, summary: str, detail: str = "") -> Parser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{detail}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    demo = verb(
        "demo",
        "demo",
        "train pha-tiny and attention-only-tiny, compare them, write a report",
        "Reads the source text of this Python's standard library. What is finished is reused;\n"
        "after Ctrl-C the same command continues.",
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="where (runs/demo)")
    demo.add_argument("--steps", type=int, help="optimiser steps per model (the recipe's)")

    prepare = verb(
        "prepare",
        "prepare",
        "turn text into a token store",
        "SOURCE is stdlib, a UTF-8 text file, or a folder. A folder whose files are named train,\n"
        "valid and test (such as wiki.train.raw) keeps these splits; any other is split by file.",
    )
    prepare.add_argument("source", metavar="SOURCE")
    prepare.add_argument(
        "--tokenizer",
        required=True,
        help="gpt2:FOLDER with encoder.json and vocab.bpe, bytes, bpe:SIZE trained on the text, "
        "or the folder of a saved tokenizer",
    )
    prepare.add_argument("--out", type=Path, required=True, help="folder of the store")
    prepare.add_argument(
        "--separator",
        choices=("auto", "end-of-text", "none"),
        default="auto",
        help="what ends a document; auto: end-of-text where documents are separate texts",
    )
    prepare.add_argument("--json", action="store_true", help="print the store's facts as JSON")

    train = verb(
        "train",
        "train",
        "train a model by a recipe",
        "RECIPE is PRESET.PROTOCOL (`pha recipes` lists both) or a YAML file. Any key can be set:\n"
        "  pha train pha-tiny.text --data stores/mine --run.epochs 3 --model.dropout 0.2\n"
        "`pha recipes --keys` explains every key. The same command continues a stopped run.",
    )
    train.add_argument("recipe", metavar="RECIPE")
    train.add_argument("--data", metavar="STORE", help="token store made by `pha prepare`")
    train.add_argument("--out", type=Path, help="run folder (runs/RECIPE)")
    train.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: continue from the newest checkpoint; never: refuse a folder in use",
    )
    train.add_argument("--init-from", metavar="MODEL", help="start from these weights")
    train.add_argument("--dry-run", action="store_true", help="say what it takes, do nothing")
    train.add_argument("--quiet", action="store_true", help="progress, but no table at the end")
    train.add_argument("--json", action="store_true", help="print the result as JSON")

    recipes = verb("recipes", "recipes", "list recipes, or explain their keys")
    recipes.add_argument("name", metavar="RECIPE", nargs="?", help="print this one, resolved")
    recipes.add_argument("--keys", action="store_true", help="every key with type and default")

    params = verb("params", "params", "parameters of every preset by component")
    params.add_argument("presets", metavar="PRESET", nargs="*", help="only these")
    params.add_argument("--vocab-size", type=int, default=50257, help="V (50257, GPT-2)")
    params.add_argument("--json", action="store_true", help="print as JSON")

    evaluate = verb(
        "eval",
        "evaluate",
        "token, word and byte perplexity and accuracy over a whole split",
    )
    evaluate.add_argument("model", metavar="RUN_OR_MODEL", type=Path)
    evaluate.add_argument("--data", metavar="STORE", type=Path, required=True)
    evaluate.add_argument("--split", default="test", help="train, validation or test (test)")
    evaluate.add_argument(
        "--sequence-length", type=int, help="tokens per window (the run's own, else 1024)"
    )
    evaluate.add_argument("--stride", type=int, help="advance per window (its length)")
    evaluate.add_argument(
        "--packed-documents",
        action=argparse.BooleanOptionalAction,
        help="reset at document starts (as the run was trained)",
    )
    evaluate.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="fp32")
    evaluate.add_argument("--json", action="store_true", help="print as JSON")

    generate = verb("generate", "generate", "continue a text")
    generate.add_argument("model", metavar="RUN_OR_MODEL", type=Path)
    generate.add_argument("--prompt", required=True, help="text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest")
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--json", action="store_true", help="print as JSON")

    mixing = verb("mixing", "mixing", "mixing weights and effective shares per layer")
    mixing.add_argument("run_path", metavar="RUN_OR_MODEL", type=Path)
    mixing.add_argument("--json", action="store_true", help="print as JSON")

    report = verb("report", "report", "one self-contained HTML page about runs")
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path)
    report.add_argument("--out", type=Path, help="the page (report.html in the first run)")
    report.add_argument("--title", help="its heading")

    doctor = verb("doctor", "doctor", "versions, devices and a self-check of every backend")
    doctor.add_argument("--json", action="store_true", help="print as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb; mistakes that a user can put right end in one line and exit code 2."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if options.version:
        from pha import __version__

        print(f"pha {__version__}")
        return
    if options.verb is None:
        parser.print_help()
        return
    if rest and options.verb != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from pha import commands

    command: Callable[..., Any] = getattr(commands, options.run)
    try:
        _import(options.modules)
        command(options, rest) if options.verb == "train" else command(options)
    except PHAError as error:
        sys.exit(_fail(options.verb, str(error)))
    except commands.TrainingInterruptedError as error:
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
