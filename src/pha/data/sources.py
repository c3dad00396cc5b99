"""Where text comes from: a name, a path, a pattern or a data set of the Hugging Face Hub.

A source yields documents with their splits. Which split a text belongs to depends on the source
and its options alone, never on the tokenizer.
"""

from __future__ import annotations

import atexit
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pha.data.documents import Source, SourceOptions, joined
from pha.data.files import (
    open_file,
    open_folder,
    open_pattern,
    open_remote,
    split_by_path,
    text_files,
)
from pha.data.hub import open_hub
from pha.data.readers import Meter, read_text
from pha.utils.errors import PHAError
from pha.utils.files import user_path

SHORT_NAMES = {
    "wikitext-103": "hf:Salesforce/wikitext:wikitext-103-raw-v1",
    "wikitext-2": "hf:Salesforce/wikitext:wikitext-2-raw-v1",
    "openwebtext": "hf:Skylion007/openwebtext",
}
"""Names for data sets of the Hub."""

_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


def open_source(spec: str, options: SourceOptions | None = None) -> Source:
    """Open a corpus.

    Args:
        spec: `stdlib`, `-` for standard input, a file, a folder, a pattern, a URL,
            `hf:OWNER/NAME[:CONFIG]`, `hf:FOLDER:CONFIG` or a name of `SHORT_NAMES`; a path of such
            a name comes first.
            docs/data.md says which files are read, and how each is split.
        options: text field and split, where the source leaves them open.

    Raises:
        PHAError: nothing there, no text in it, or a split without text.
    """
    options = options or SourceOptions()
    if spec == "stdlib":
        return _standard_library(options)
    if spec == "-":
        return open_file(_keep_standard_input(), options)
    if "://" in spec:
        return open_remote(spec, options)
    path = user_path(spec)
    if spec and path.is_dir():
        return open_folder(path, options)
    if path.is_file():
        return open_file(path, options)
    hub_spec = SHORT_NAMES.get(spec, spec)
    if hub_spec.startswith("hf:"):
        return open_hub(hub_spec.removeprefix("hf:"), options)
    if any(character in spec for character in "*?["):
        return open_pattern(str(path), options)
    names = ", ".join(["stdlib", *SHORT_NAMES])
    raise PHAError(
        f"no file or folder {spec!r}: give the path of some text, a quoted pattern, "
        f"hf:OWNER/NAME, or one of {names}"
    )


def open_sources(specs: Sequence[str], options: SourceOptions | None = None) -> Source:
    """Open several corpora as one; see `open_source`.

    Raises:
        PHAError: as there, or they are split by different rules.
    """
    sources = [open_source(spec, options) for spec in specs]
    if len(sources) == 1:
        return sources[0]
    return joined(sources, "; ".join(source.description for source in sources))


def _keep_standard_input() -> Path:
    """A file with what comes through the pipe, for as long as this process lives."""
    if sys.stdin is None:
        raise PHAError("standard input is closed: give a text through a pipe, or name a file")
    folder = Path(tempfile.mkdtemp(prefix="pha-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    begin = sys.stdin.buffer.read(1)
    path = folder / ("stdin.jsonl" if begin == b"{" else "stdin.txt")
    with path.open("wb") as file:
        file.write(begin)
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path


def _standard_library(options: SourceOptions) -> Source:
    """The running Python's own source text, without tests and third-party packages."""
    root = Path(sysconfig.get_path("stdlib"))
    version = f"{platform.python_implementation()} {platform.python_version()}"
    files = []
    if root.is_dir():
        # Links lead to what a system adds.
        found = text_files(
            root, lambda path: path.suffix == ".py" and not path.is_symlink(), _is_library_part
        )
        files = [path for path in found if _is_utf8(path)]
    if not files:
        raise PHAError(
            f"the standard library of {version} has no .py files in {root} (it may be zipped): "
            "give a text file or folder instead of stdlib"
        )
    description = f"standard library of {version}, {len(files)} files"
    return split_by_path(root, files, description, options)


def _is_library_part(name: str) -> bool:
    """Leave out tests, installed packages and what the build generated for this machine."""
    return name not in _NOT_LIBRARY and not name.startswith(("config-", "_sysconfigdata"))


def _is_utf8(path: Path) -> bool:
    try:
        return all(True for _ in read_text(path, Meter()))
    except PHAError:
        return False
