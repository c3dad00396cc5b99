"""Put today's source into the pages that quote it.

A page says `<!-- source: pha.model.block:ParallelBlock.forward -->` before a block of Python, which
becomes the source of that name. A test fails where a page is out of date: then run
`python scripts/include_source.py`.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUOTE = re.compile(r"(<!-- source: (\S+) -->\n```python\n).*?(```)", re.DOTALL)


def source(name: str) -> str:
    """The source of a class, function or method by its full name."""
    module, _, rest = name.partition(":")
    found = importlib.import_module(module)
    for part in rest.split("."):
        found = getattr(found, part)
    return textwrap.dedent(inspect.getsource(found))


def included(text: str) -> str:
    """The page with every quotation as the source has it now."""
    return QUOTE.sub(lambda match: match[1] + source(match[2]) + match[3], text)


def main() -> None:
    """Rewrite every page that quotes."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if (new := included(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    main()
