"""`pha completion`: what a shell needs to complete verbs, options and the keys of recipes.

Not among the other commands, as it reads them all.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Literal

from pha.cli import KEYS, VERBS, Parser, add_arguments, find_verb
from pha.utils.text import read_docstring


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """What makes a shell complete verbs, options and keys.

      bash:  pha completion bash > ~/.local/share/bash-completion/completions/pha
      zsh:   pha completion zsh > ~/.zsh/_pha     (a folder in fpath, set before compinit)
      fish:  pha completion fish > ~/.config/fish/completions/pha.fish
    Made by shtab, once; make it again after an update.

    Args:
        shell: bash, zsh or fish
    """
    import shtab  # type: ignore[import-not-found,import-untyped,unused-ignore]

    parser = whole_parser()
    for each in (parser, *parser.verbs.values()):
        for action in each._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell))


class WholeParser(Parser):
    """Every verb with all that it takes.

    Attributes:
        verbs: the parser of each.
    """

    verbs: dict[str, Parser]


def whole_parser() -> WholeParser:
    """One parser of all verbs, with the keys of recipes where a verb takes them."""
    from pha.train.keys import recipe_keys

    parser = WholeParser(prog="pha")
    parser.add_argument("--import", metavar="MODULE", help="import this first")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    added = parser.add_subparsers(dest="verb", parser_class=Parser)
    parser.verbs = {}
    for name in VERBS:
        verb = find_verb(name)
        summary = read_docstring(verb)[0].partition("\n")[0].replace("%", "%%")
        parser.verbs[name] = each = added.add_parser(name, help=summary)
        add_arguments(each, verb)
        if KEYS in inspect.signature(verb).parameters:
            for key in recipe_keys().values():
                each.add_argument(
                    f"--{key.name}",
                    choices=key.choices or None,
                    help=key.meaning.replace("%", "%%"),
                )
    return parser
