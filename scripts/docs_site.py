"""What the site has besides docs/*.md: an order, reference pages, tutorials as they ran, files.

MkDocs calls the functions `on_...`. The order is that of the tables in docs/README.md. Public names
come from docstrings, commands from their help, keys from the configuration's docstrings. What pages
link to outside of docs/ is copied into repository/ of the site.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from pha.cli import VERBS, main
from pha.train.keys import SECTIONS, recipe_keys
from pha.utils.text import read_docstring

ROOT = Path(__file__).parents[1]
DOCS, PACKAGE, NOTEBOOKS = ROOT / "docs", ROOT / "src" / "pha", ROOT / "build" / "tutorials"
REPOSITORY = "repository/"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
REFERENCE = {"Commands": "reference/commands.md", "Keys": "reference/keys.md"}
SHELL = "%%sh\n"
PICTURES = {"image/svg+xml": "svg", "image/png": "png"}


def on_config(config: MkDocsConfig) -> None:
    """Take the order of the pages from docs/README.md."""
    nav: list[dict[str, Any]] = []
    for section in re.split(r"^## ", _read(DOCS / "README.md"), flags=re.M)[1:]:
        title, _, table = section.partition("\n")
        rows = re.findall(r"^\| \[(.+?)\]\((.+?)\)", table, re.M)
        nav.append({title: [{name: _place(_resolve(DOCS, target))} for name, target in rows]})
        if title == "Start":
            nav[-1][title].insert(0, "README.md")
        if title == "Reference":
            nav[-1][title] += [{name: place} for name, place in REFERENCE.items()]
            nav[-1][title].append({"Names": [{n: f"reference/{n}.md"} for n in _modules()]})
    config.nav = nav


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the reference, the pictures of the tutorials, and what pages link to."""
    pages = {REFERENCE["Commands"]: _commands(), REFERENCE["Keys"]: _keys()}
    pages |= {f"reference/{name}.md": _names(name) for name in _modules()}
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        for name, picture in render(notebook)[1].items():
            files.append(File.generated(config, f"tutorials/{name}", content=picture))
    queue, seen = [DOCS / f.src_uri for f in files.documentation_pages()], set[Path]()
    while queue:
        for target in _targets(queue.pop()) - seen:
            seen.add(target)
            if target.is_dir():
                files_below = (p for p in sorted(target.rglob("*")) if p.is_file())
                inside = [p for p in files_below if "__pycache__" not in p.parts]
                links = [f"- [{p.relative_to(target)}]({p.relative_to(target)})" for p in inside]
                text = f"# {target.relative_to(ROOT)}\n\n" + "\n".join(links) + "\n"
                files.append(File.generated(config, _place(target), content=text))
                queue += [p for p in inside if p.suffix == ".md"]
                added = [p for p in inside if p not in seen]
                seen.update(added)
            else:
                added = [target]
                queue += [target] if target.suffix == ".md" else []
            for path in added:
                files.append(File.generated(config, _place(path), abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Show a tutorial as it ran, and lead links to where the site has what they name."""
    place = page.file.src_uri
    source = _source(place)
    if source.parent == DOCS / "tutorials":
        notebook = NOTEBOOKS / f"{source.stem}.ipynb"
        if not notebook.exists():
            raise PluginError(f"{notebook} is not there; run `make tutorials`")
        markdown = render(notebook)[0]

    def lead(match: re.Match[str]) -> str:
        target = _resolve(source.parent, match[1])
        if not target.exists():
            return match[1]
        return os.path.relpath(_place(target), Path(place).parent)

    return LINK.sub(lead, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site with a dead link, or one that would load something from elsewhere."""
    site = Path(config.site_dir)
    pages = {path: _Links(path) for path in site.rglob("*.html")}
    wrong = []
    for path, links in pages.items():
        for link, loaded in links.found:
            parts = urlsplit(link)
            target = _resolve(path.parent, unquote(parts.path)) if parts.path else path
            if parts.scheme or parts.netloc:
                if loaded:
                    wrong.append(f"{path}: loads {link}")
            elif path.name != "404.html" and not target.is_file():
                wrong.append(f"{path}: {link} leads nowhere")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                wrong.append(f"{path}: {link} has no such anchor")
    if wrong:
        raise PluginError("\n".join(wrong))


def render(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook that has run, as Markdown, and its pictures by name."""
    parts, pictures = [], dict[str, bytes]()
    for cell in json.loads(_read(notebook))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        language = "sh" if source.startswith(SHELL) else "python"
        parts.append(f"```{language}\n{source.removeprefix(SHELL)}\n```")
        drawn = len(pictures)
        printed = ""
        for output in cell["outputs"]:
            if output.get("name") == "stderr":  # progress, and what libraries have to say
                continue
            data = output.get("data", {"text/plain": output.get("text", "")})
            kind = next((k for k in PICTURES if k in data), None)
            if kind is None:
                printed += "".join(data["text/plain"])
                continue
            name = f"{notebook.stem}-{len(pictures) + 1}.{PICTURES[kind]}"
            text = "".join(data[kind])
            pictures[name] = base64.b64decode(text) if kind == "image/png" else text.encode()
        shown = "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n")
        parts += [f"```text\n{shown}\n```"] if shown else []
        parts += [f"![What the code above draws]({name})" for name in list(pictures)[drawn:]]
    return "\n\n".join(parts) + "\n", pictures


def _commands() -> str:
    """Every command with its help."""
    parts = ["# Commands\n\nWhat `pha VERB --help` says."]
    for verb in VERBS:
        out = io.StringIO()
        with (
            mock.patch.dict(os.environ, COLUMNS="100"),
            contextlib.redirect_stdout(out),
            contextlib.suppress(SystemExit),
        ):
            main([verb, "--help"])
        parts.append(f"## pha {verb}\n\n```text\n{out.getvalue().strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _keys() -> str:
    """Every key of a recipe with its default and meaning."""
    parts = [
        "# Keys\n\nSet any of them as in `pha train RECIPE --model.dropout 0.1`, or in a recipe."
    ]
    for section, keys in groupby(recipe_keys().values(), lambda key: key.name.partition(".")[0]):
        about = read_docstring(SECTIONS[section], "Attributes")[0]
        rows = ["| key | default | meaning |", "|---|---|---|"]
        for key in keys:
            meaning = key.meaning.replace("|", r"\|")
            rows.append(f"| `{key.name}` | `{json.dumps(key.default)}` | {meaning} |")
        parts.append(f"## {section}\n\n{about}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _names(module: str) -> str:
    """The page of a module; `pha` itself is more than its own page can show."""
    options = f"{{heading_level: 1, show_submodules: {str(module != 'pha').lower()}}}"
    # A search finds the pages that explain before those that list.
    return f"---\nsearch: {{boost: 0.2}}\n---\n\n::: {module}\n    options: {options}\n"


def _modules() -> Iterator[str]:
    """What has a page in the reference: `pha`, its packages and its modules."""
    yield "pha"
    for path in sorted(PACKAGE.iterdir()):
        if (path / "__init__.py").exists() or (path.suffix == ".py" and path.name[0] != "_"):
            yield f"pha.{path.stem}"


def _source(place: str) -> Path:
    """The file of the repository that stands at a place of the site."""
    if place.startswith(REPOSITORY):
        return ROOT / place.removeprefix(REPOSITORY)
    return DOCS / place


def _place(path: Path) -> str:
    """Where the site has a file or folder of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return (
        REPOSITORY + (path / "contents.md" if path.is_dir() else path).relative_to(ROOT).as_posix()
    )


def _targets(page: Path) -> set[Path]:
    """What a page links to outside of docs/."""
    if not page.exists():
        return set()
    found = {_resolve(page.parent, link) for link in LINK.findall(_read(page))}
    return {
        p for p in found if p.is_relative_to(ROOT) and not p.is_relative_to(DOCS) and p.exists()
    }


def _resolve(folder: Path, link: str) -> Path:
    return Path(os.path.normpath(folder / link))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


class _Links(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {"", "__top"}
        self.found: list[tuple[str, bool]] = []  # link, loaded with the page
        self.feed(_read(page))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names and where it leads."""
        given = {name: value for name, value in attrs if value is not None}
        self.anchors.update(given[key] for key in ("id", "name") if key in given)
        if "src" in given:
            self.found.append((given["src"], True))
        if "href" in given:
            loaded = tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect")
            self.found.append((given["href"], loaded))
