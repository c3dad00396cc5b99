"""`pha VERB`: the command line, read from the verbs' signatures.

A verb is a function of `pha.commands`. Its parameters are its arguments: those before the `*` are
given by place, the others are options, and `*words` takes what the recipe parser will read. Its
docstring is the help. Only the chosen verb's module is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from pha.utils.errors import (
    INTERRUPTED,
    STOPPED,
    PHAError,
    StoppedError,
    TrainingInterruptedError,
    is_out_of_memory,
)
from pha.utils.modules import asked_for, remedy
from pha.utils.processes import leave_with_parent
from pha.utils.signals import exit_code, leave, on_stop_signals, write_nowhere
from pha.utils.text import did_you_mean, printable, read_docstring, split_commas

Verb = Callable[..., None]

VERBS = {
    "demo": "training:demo",
    "prepare": "training:prepare",
    "join": "training:join",
    "train": "training:train",
    "extend": "extension:extend",
    "sweep": "studies:sweep",
    "study": "studies:study",
    "average": "training:average",
    "convert": "sharing:convert",
    "recipes": "training:recipes",
    "params": "inspection:params",
    "eval": "evaluation:evaluate",
    "compare": "evaluation:compare",
    "probe": "probing:probe",
    "generate": "texts:generate",
    "score": "texts:score",
    "export": "sharing:export",
    "verify": "sharing:verify",
    "harness": "sharing:harness",
    "serve": "sharing:serve",
    "mixing": "inspection:mixing",
    "inspect": "inspection:inspect",
    "report": "inspection:report",
    "doctor": "inspection:doctor",
    "check-branch": "inspection:check_branch",
    "bench": "benchmark:bench",
    "completion": ".completion:completion",
}
"""Module and function of every verb, in the order of `pha --help`; relative to `pha.commands`."""

ABOUT = """\
The Parallel Hybrid Architecture: train, evaluate and study language models whose every layer runs a
gated state space, attention and a feed-forward network side by side.

first steps
  pha demo                                    train PHA, PHA+ and attention alone, see a report
  pha prepare my-texts/ --tokenizer bpe:8192 --out stores/mine
  pha train pha-tiny.text --data stores/mine --out runs/mine
  pha generate runs/mine --prompt "Once"
  pha report runs/mine
"""

START = """\
Three commands to begin with (`pha --help` lists all, `pha VERB --help` explains one):
  pha demo                                    train PHA, PHA+ and attention alone, see a report
  pha prepare my-texts/ --tokenizer bpe:8192 --out stores/mine
  pha train pha-tiny.text --data stores/mine --out runs/mine
"""

KEYS = "overrides"
"""The `*words` of a verb that takes the keys of recipes as options."""

# What a value is called in the help where its type does not say, and what it is in an error.
METAVARS = {int: "N", float: "X", Fraction: "FRACTION"}
NOUNS = {int: "whole number", float: "number", Fraction: "number such as 0.05"}


class Parser(argparse.ArgumentParser):
    """One clear line and exit code 2 for a mistake, instead of a page of usage."""

    def __init__(self, **settings: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Print `message` and leave."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse_unknown(self, words: Sequence[str], keys_too: bool = False) -> None:
        """Leave at the first option that there is not, before anything else is found missing.

        Args:
            words: of the command line.
            keys_too: whether the keys of recipes are options too, which are looked at later.
        """
        known = [option for action in self._actions for option in action.option_strings]
        for word in itertools.takewhile(lambda word: word != "--", words):
            option = word.partition("=")[0]
            if not re.match("--[a-z]", option) or option in known:
                continue
            hint = did_you_mean(option, known)
            if not keys_too or (hint and "." not in option):
                self.error(f"there is no option {option}{hint}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            hint = did_you_mean(value, choices, 0.5) or f" (choose from {', '.join(choices)})"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb; a mistake that a user can put right ends in one line and exit code 2."""
    leave_with_parent()
    asked: list[int] = []

    def stop(number: int) -> None:
        asked.append(number)
        leave(number)

    with on_stop_signals(stop):
        _main(arguments, asked)


def _main(arguments: Sequence[str] | None, asked: Sequence[int]) -> None:
    # OpenMP's threads spin for milliseconds after each piece of work, on processors that compiled
    # kernels between two pieces need. Read when torch is imported, which verbs do later.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    program = "pha"
    try:
        _open_streams()
        parser, options = _read_start(arguments)
        if options.version:
            from pha import __version__

            print(f"pha {__version__}")
        elif options.help:
            parser.epilog = _list_verbs()
            parser.print_help()
        elif not options.words:
            print(START, end="")
        else:
            verb, *words = options.words
            if verb not in VERBS:
                parser.error(f"there is no verb {verb!r}{did_you_mean(verb, VERBS)}")
            program = f"pha {verb}"
            run = read_verb(verb, words)
            with asked_for(options.modules):
                run()
            sys.stdout.flush()  # what cannot be written is an error of this command
    except BrokenPipeError:
        _leave(141)
    except TrainingInterruptedError as error:
        _leave(error.code, f"{program}: {error}")
    except Exception as error:
        if asked:  # a library has made another error of it
            _leave(exit_code(asked[0]), f"{program}: stopped; run the same command again")
        what = _explain(error)
        if what is None:
            raise
        _leave(2, f"{program}: error: {printable(' '.join(what.split()))}")
    except KeyboardInterrupt as error:
        code = STOPPED if isinstance(error, StoppedError) else INTERRUPTED
        _leave(code, f"{program}: {str(error) or 'interrupted'}")


def _open_streams() -> None:
    """Let output go nowhere where it is closed, and escape what it cannot show."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave(code: int, line: str | None = None) -> NoReturn:
    """Say why and leave with this code, also where nothing can be written any more."""
    with contextlib.suppress(OSError):
        if line is not None:
            print(line, file=sys.stderr, flush=True)
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:  # with which the interpreter would end in a code of its own
            write_nowhere([descriptor])
    sys.exit(code)


def _explain(error: Exception) -> str | None:
    """What a user is told of an error; None where nothing is known that would help."""
    if isinstance(error, PHAError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return remedy(error)
    if is_out_of_memory(error):
        return "there is not enough memory: close other programs, or ask for less at a time"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


def _read_start(arguments: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    """What stands before the verb; the verb and its words are left together."""
    usage = "pha [-h] [--import MODULE] [--version] VERB ..."
    parser = Parser(prog="pha", usage=usage, description=ABOUT, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="import this first, such as a file my_branch.py here with a branch of your own",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    parser.refuse_unknown(list(itertools.takewhile(lambda word: word.startswith("-"), given)))
    return parser, parser.parse_args(given)


def _list_verbs() -> str:
    """Every verb with the first line of its docstring."""
    lines = ["verbs:"]
    for name in VERBS:
        summary = read_docstring(find_verb(name))[0].partition("\n")[0].removesuffix(".")
        lines.append(f"  {name:<9} {summary[0].lower()}{summary[1:]}")
    return "\n".join(lines)


def find_verb(name: str) -> Verb:
    """The function of a verb."""
    module, _, function = VERBS[name].partition(":")
    found: Verb = getattr(importlib.import_module(f".{module}", "pha.commands"), function)
    return found


def read_verb(name: str, words: Sequence[str]) -> functools.partial[None]:
    """The call of a verb that the words of the command line ask for; leaves on a mistake."""
    verb = find_verb(name)
    parameters = list(inspect.signature(verb).parameters.values())
    parser = make_parser(f"pha {name}", verb)
    more = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    if more in (None, KEYS):
        parser.refuse_unknown(words, keys_too=more is not None)
    options, rest = parser.parse_known_args(words)
    if rest and more is None:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    values = vars(options)
    by_place = [values.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return functools.partial(verb, *by_place, *rest, **values)


def make_parser(program: str, verb: Verb) -> Parser:
    """The parser of a verb: its parameters with their types and defaults, and its docstring."""
    parser = Parser(prog=program, description=read_docstring(verb)[0])
    add_arguments(parser, verb)
    return parser


def add_arguments(parser: argparse.ArgumentParser, verb: Verb) -> None:
    """Add the parameters of a verb."""
    _, helps = read_docstring(verb)
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        settings = _describe(hints[name])
        several = settings.pop("several", False)
        if parameter.kind is parameter.KEYWORD_ONLY:
            words = f"--{name.replace('_', '-')}"
            settings |= {"required": required} | ({"action": "append"} if several else {})
        else:
            words = name
            if "choices" not in settings:
                settings.setdefault("metavar", name.upper())
            if several or not required:
                settings["nargs"] = "?" if not several else "+" if required else "*"
        text = helps.get(name) or settings.pop("help", "")
        settings["help"] = f"{text}{_show_default(default)}".replace("%", "%%")
        # What is given is appended to the default, which therefore must be a list.
        default = list(default or ()) if several else default
        parser.add_argument(words, default=default, **settings)


def _describe(hint: Any) -> dict[str, Any]:
    """What argparse is told of a type.

    `Annotated[T, "NAME", "help"]` names the value and explains it, `T | None` is T, a `Literal` is
    a choice, a `bool` is a flag, a tuple is one word with commas, and a sequence is several words.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        said = zip(("metavar", "help"), hint.__metadata__, strict=False)
        return _describe(inner[0]) | {name: text for name, text in said if text is not None}
    if NoneType in inner:
        both = {"action": argparse.BooleanOptionalAction} if inner[0] is bool else {}
        return _describe(inner[0]) | both
    if origin is Literal:
        return {"choices": inner}
    if origin is Sequence:
        return _describe(inner[0]) | {"several": True}
    if origin is tuple:
        return {"type": _reader(inner[0], with_commas=True)}
    if hint is bool:
        return {"action": "store_true"}
    if hint not in METAVARS:
        return {"type": hint}
    return {"type": _reader(hint), "metavar": METAVARS[hint]}


def _reader(kind: type, with_commas: bool = False) -> Callable[[str], Any]:
    """Makes a value of a word, or says in a line what the word is not."""

    def read(text: str) -> Any:
        try:
            if not with_commas:
                return kind(text)
            return tuple(kind(part) for part in split_commas(text) if part)
        except (ValueError, ZeroDivisionError):
            noun = f"list of {NOUNS[kind]}s" if with_commas else NOUNS[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun}") from None

    return read


def _show_default(value: Any) -> str:
    if value is None or value is False or value in ("", ()):
        return ""
    return f" ({','.join(map(str, value)) if isinstance(value, tuple) else value})"
