"""The code of a model as one file, by which transformers loads it where `pha` is not installed.

The file is the package's own files that the model needs, one after the other, each behind those it
imports. What changes is only what one file asks for: imports from libraries stand once at the top;
those of our files go, and so do `__all__` and what is for type checkers; a private name or constant
that two files have gets that of its file. Kernels, the compiled decoder and branches that the model
does not have are in files that nothing here imports.
"""

from __future__ import annotations

import ast
import inspect
import re
import symtable
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import resolve_name

from pha.model import BRANCHES
from pha.modeling import PHAConfig
from pha.utils.errors import PHAError
from pha.utils.hardware import git_state
from pha.utils.versions import __version__

FILE = "modeling_pha.py"
AUTO_MAP = {
    "AutoConfig": "modeling_pha.PHAConfig",
    "AutoModel": "modeling_pha.PHAModel",
    "AutoModelForCausalLM": "modeling_pha.PHAForCausalLM",
    # By this name alone does `transformers serve` load what is no class of transformers.
    "AutoModelForDecision": "modeling_pha.PHAForCausalLM",
    "AutoModelForSequenceClassification": "modeling_pha.PHAForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_pha.PHAForTokenClassification",
}
"""Auto class of transformers -> what it finds in the file: `auto_map` in config.json."""

_FACES = ("pha.modeling.language_model", "pha.modeling.classification")
_RULE = "# " + "-" * 98
_HEADER = '''\
# SPDX-License-Identifier: Apache-2.0
# Copyright The PHA authors
"""A language model of the Parallel Hybrid Architecture for transformers, in plain torch.

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` runs this file. It was made
by `pha export` of {made_by}:
change that, not this. Its parts, in order:

{contents}
"""

from __future__ import annotations

{imports}

# Operators of torch are named in the whole process, where there may be other copies of this file.
_OPERATORS = f"pha_{{zlib.crc32(__name__.encode())}}"
'''


@dataclass(frozen=True)
class _Import:
    module: str
    name: str | None  # None: the module itself
    here: str  # what it is called where it is imported


@dataclass(frozen=True)
class _File:
    """One of our files.

    Attributes:
        module: its name.
        path: where it is, from the folder of its package.
        says: its docstring.
        body: its text without docstring, imports, `__all__` and what is for type checkers.
        imports: what it imports.
        defined: the names that it defines.
    """

    module: str
    path: str
    says: str
    body: str
    imports: tuple[_Import, ...]
    defined: frozenset[str]


def model_code(config: PHAConfig) -> str:
    """The text of `FILE` for a model.

    Raises:
        PHAError: a branch of the user's own whose file cannot be joined with ours.
    """
    modules = [*(BRANCHES[name].__module__ for name in config.branch_names), *_FACES]
    roots = {_root(module) for module in modules}
    if "__main__" in roots:
        raise PHAError("a branch of a script cannot be exported; put its class into a module")
    files: dict[str, _File] = {}
    for module in modules:
        _collect(module, roots, files)
    every = {each for file in files.values() for each in file.imports}
    foreign = {each for each in every if _root(each.module) not in {*roots, "__future__"}}
    foreign.add(_Import("zlib", None, "zlib"))
    shared = _shared(files.values(), foreign)
    parts = [
        f"{_RULE}\n{_comment(file)}\n\n\n{_renamed(file, shared, roots)}" for file in files.values()
    ]
    commit, changed = git_state()
    made_by = f"pha {__version__}" + (f", commit {commit[:12]}" if commit else "")
    header = _HEADER.format(
        made_by=made_by + (" with changes" if changed else ""),
        contents="\n".join(f"- {file.path}" for file in files.values()),
        imports="\n".join(_statements(foreign)),
    )
    return "\n\n".join([header, *parts]).replace('"pha::', 'f"{_OPERATORS}::')


def _comment(file: _File) -> str:
    return "\n".join(f"# {line}".rstrip() for line in [file.path, "", *file.says.splitlines()])


def _root(module: str) -> str:
    return module.partition(".")[0]


def _collect(module: str, roots: set[str], files: dict[str, _File]) -> None:
    """Add a module's file behind those that it imports."""
    if module in files:
        return
    file = _read(module)
    for each in file.imports:
        if _root(each.module) in roots:
            _collect(_home(each, roots), roots, files)
    files[module] = file


def _home(wanted: _Import, roots: set[str]) -> str:
    """Our module that defines a name, from which others may have imported it.

    Raises:
        PHAError: it is a module, or gets another name.
    """
    file = _read(wanted.module)
    if wanted.name == wanted.here:
        source = next((each for each in file.imports if each.here == wanted.name), None)
        if source is not None and _root(source.module) in roots:
            return _home(source, roots)
        if source is not None or wanted.name in file.defined:
            return wanted.module
    raise PHAError(
        f"{wanted.here} is imported from {wanted.module} as a module or by another name; what is "
        "exported with a model imports names of classes and functions, as they are"
    )


@cache
def _read(module: str) -> _File:
    loaded = import_module(module)
    text = inspect.getsource(loaded)
    tree = ast.parse(text)
    imports: list[_Import] = []
    dropped: list[ast.stmt] = []
    for statement in tree.body:
        match statement:
            case ast.Import(names=names):
                imports += [_Import(x.name, None, x.asname or _root(x.name)) for x in names]
            case ast.ImportFrom(names=names, module=where, level=level):
                source = resolve_name("." * level + (where or ""), loaded.__package__)
                imports += [_Import(source, x.name, x.asname or x.name) for x in names]
                imports = [each for each in imports if each.here != "TYPE_CHECKING"]
            case ast.Expr(ast.Constant(str())) if statement is tree.body[0]:
                pass
            case ast.If(ast.Name("TYPE_CHECKING")) | ast.Assign([ast.Name("__all__")]):
                pass
            case _:
                continue
        dropped.append(statement)
    lines = text.splitlines(keepends=True)
    for statement in reversed(dropped):
        del lines[statement.lineno - 1 : statement.end_lineno]
    body = re.sub(r"\n{4,}", "\n\n\n", "".join(lines).strip("\n")) + "\n"
    symbols = symtable.symtable(text, module, "exec").get_symbols()
    defined = {symbol.get_name() for symbol in symbols if symbol.is_assigned()} - {"__all__"}
    path = module.replace(".", "/") + ("/__init__.py" if hasattr(loaded, "__path__") else ".py")
    says = ast.get_docstring(tree) or ""
    return _File(module, path, says, body, tuple(imports), frozenset(defined))


def _shared(files: Iterable[_File], foreign: set[_Import]) -> set[str]:
    """Private names and constants that more than one file defines.

    Raises:
        PHAError: another name of two files, or of a file and a library.
    """
    counts = Counter(name for file in files for name in file.defined)
    counts.update(each.here for each in foreign)
    twice = {name for name, times in counts.items() if times > 1}
    if others := sorted(x for x in twice if not (x.startswith("_") or x.isupper())):
        raise PHAError(
            f"{others[0]} has two meanings in the files that would be exported; rename it in yours"
        )
    return twice


def _renamed(file: _File, shared: set[str], roots: set[str]) -> str:
    """Its text, in which what is shared has the name of the file that defines it, too.

    Raises:
        PHAError: such a name is that of an attribute too.
    """
    body, homes = file.body, dict.fromkeys(file.defined & shared, file.module)
    for each in file.imports:
        if each.name in shared and _root(each.module) in roots:
            homes[each.name] = _home(each, roots)
    for name, module in sorted(homes.items()):
        if re.search(rf"\.{name}\b", body):
            raise PHAError(f"{file.module} has {name} as an attribute too; rename it to export it")
        place = "_".join(module.split(".")[1:] or [module])
        body = re.sub(rf"\b{name}\b", f"{name}_of_{place}", body)
    return body


def _statements(imports: set[_Import]) -> list[str]:
    """Import statements, those of one module as one."""
    whole, names = [], defaultdict[str, list[str]](list)
    for each in sorted(imports, key=lambda each: (each.module, each.name or "", each.here)):
        name = each.name or each.module
        name += "" if each.here in (name, _root(name)) else f" as {each.here}"
        if each.name is None:
            whole.append(f"import {name}")
        else:
            names[each.module].append(name)
    return whole + [_statement(module, names[module]) for module in names]


def _statement(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) > 100:
        line = f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)"
    return line
