"""The documentation is true: its Python and its commands run, and its links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, MutableMapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pha.cli import main
from pha.model import BRANCHES
from pha.ops import OPS
from pha.tasks import TASKS
from pha.train.keys import recipe_keys
from scripts.include_source import QUOTE, included
from tests.conftest import synthetic_text

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), *TUTORIALS])
EXTENDING = DOCS / "extending.md"
FULL_RUN = ROOT / "scripts" / "wikitext103.sh"

# The shell of these pages is run. By how a command begins: what is appended, so that it takes a
# second.
SHELL_PAGES = [ROOT / "README.md", EXTENDING]
TINY = (
    "--run.epochs null --run.steps 2 --run.global_batch 2 --run.evaluations 1 "
    "--run.evaluate_tokens 500 --run.sample_tokens 4 --run.precision fp32 "
    "--model.hidden_size 32 --model.num_hidden_layers 1 --model.state_size 32 "
    "--model.head_dim 8 --data.sequence_length 64"
)
APPENDED = {
    "pha train pha-tiny.text": TINY,
    "pha train pha-125m.wikitext103": "--data STORE --dry-run",
    "pha train pha-tiny.mqar": f"{TINY} --data.task_options '{{pairs: [8]}}' "
    "--data.tests '{8: {length: 32, rows: 8}}'",
    "pha probe": "--max-tokens 2000",
    "pha inspect": "--tokens 512",
    "pha generate runs/mine --load-state": "--max-new-tokens 4",
    "pha sweep": f"--data STORE --dry-run {TINY}",
    "pha study branches": f"--dry-run {TINY}",
    "pha compare": "--block 256",
    "pha --import average train": f"--data STORE {TINY}",
    "pha --import echo train": TINY,
    "pha study windows.yaml": TINY,
}
# The same where the test is marked slow: these then train.
SLOW = {
    "make demo": "pha demo --steps 2 --out runs/first",
    "pha sweep": f"pha sweep pha-tiny.wikitext103 --data STORE --seeds 2 --out runs/table-2 {TINY}",
    "pha study branches": f"pha study branches --data STORE --seeds 1 {TINY}",
}
# And why the others are not run.
NOT_RUN = {
    "git clone": "needs a network",
    "cd": "belongs to `git clone`",
    "make demo": "takes minutes; run where the test is marked slow",
    "make test": "runs this test",
    "pip install": "needs a network and changes the environment",
    "pha serve": "waits for requests; tests/sharing asks it",
    "torchrun": "needs eight GPUs; tests/train runs two processes on the CPU",
}


@pytest.fixture(autouse=True)
def same_tables() -> Iterator[None]:
    """Branches, ops and tasks that a page adds are gone after it."""
    tables: list[MutableMapping[str, Any]] = [BRANCHES, OPS, TASKS]
    before = [dict(table) for table in tables]
    yield
    for table, known in zip(tables, before, strict=True):
        table.clear()
        table.update(known)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The page's code in a language, but what it quotes from the source."""
    return re.findall(rf"^```{language}\n(.*?)^```", QUOTE.sub("", read(page)), re.S | re.M)


def _lines(script: str) -> list[str]:
    return script.replace("\\\n", " ").splitlines()


def commands(script: str) -> list[list[str]]:
    """The words of each command of a piece of shell."""
    words = [shlex.split(line, comments=True) for line in _lines(script)]
    return [part for each in words for part in _split(each) if part]


def _split(words: list[str]) -> Iterator[list[str]]:
    """The commands of a line that `&&` joins, without the folder that a program lies in."""
    while "&&" in words:
        end = words.index("&&")
        yield words[:end]
        words = words[end + 1 :]
    yield [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


SHELL = [(page, commands(text)) for page in SHELL_PAGES for text in blocks(page, "sh")]


def entry(table: dict[str, str], command: list[str]) -> str | None:
    """What a table has for a command."""
    return next((v for k, v in table.items() if command[: len(k.split())] == k.split()), None)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' code reads, and the files that they show."""
    folder = tmp_path_factory.mktemp("docs")
    for name, content in re.findall(
        r"^```\w+\n# (\w+\.\w+)\n(.*?)^```", read(EXTENDING), re.S | re.M
    ):
        (folder / name).write_text(content, encoding="utf-8")
    texts = folder / "my-texts"
    texts.mkdir()
    numbers = " ".join(f"{i * 7919 % 100003:05d}" for i in range(12000))  # for 8,192 BPE entries
    for seed, split in enumerate(("train", "valid", "test")):
        text = synthetic_text(400, seed) + (numbers if split == "train" else "")
        (texts / f"{split}.txt").write_text(text, encoding="utf-8")
    (folder / "book.txt").write_text(synthetic_text(50, 3), encoding="utf-8")
    # The corpus that docs/data.md speaks of; its own test compares what is printed.
    (folder / "corpus.jsonl").write_text('{"text": "one document"}\n', encoding="utf-8")
    with contextlib.chdir(folder):
        main(["prepare", "my-texts", "--tokenizer", "bytes", "--out", "STORE"])
        main(["train", "pha-tiny.text", "--data", "STORE", "--out", "runs/a", *TINY.split()])
        for store in ("stores/wikitext103", "stores/texts"):
            shutil.copytree("STORE", store)
        for run in ("runs/b", "runs/demo/pha-tiny"):
            shutil.copytree("runs/a", run)
    return folder


def run(command: list[str], folder: Path) -> None:
    try:
        with contextlib.chdir(folder):
            main(command[1:])
    except SystemExit as end:
        if end.code:
            raise


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=f"{page.name}-{block[0][1]}") for page, block in SHELL]
)
def test_shell_blocks_run(block: list[list[str]], workplace: Path) -> None:
    for command in block:
        if entry(NOT_RUN, command) is None:
            assert command[0] == "pha", f"{shlex.join(command)}: neither run nor in NOT_RUN"
            run(command + shlex.split(entry(APPENDED, command) or ""), workplace)


@pytest.mark.slow
@pytest.mark.parametrize("instead", SLOW.values(), ids=SLOW)
def test_long_commands_run(instead: str, workplace: Path) -> None:
    run(instead.split(), workplace)


@pytest.mark.parametrize("table", [APPENDED, SLOW, NOT_RUN], ids=["appended", "slow", "not run"])
def test_tables_name_commands_of_the_pages(table: dict[str, str]) -> None:
    for key in table:
        assert any(entry({key: ""}, c) is not None for _, block in SHELL for c in block), key


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if blocks(p, "python") and p not in TUTORIALS],
    ids=lambda p: p.name,
)
def test_python_blocks_run(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec", dont_inherit=True), namespace)


def documented(page: Path) -> list[list[str]]:
    """The `pha` commands of a page: in its shell, at its prompts and in its sentences."""
    text = read(page)
    if page.suffix == ".sh":
        shell = [text]
    else:
        shell = blocks(page, "sh") + re.findall(r"^\$ (pha .*)", text, re.M)
        # Backticks open and close sentences' code outside of blocks.
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        shell += [" ".join(code.split()) for code in re.findall(r"`(pha [a-z][^`]*)`", prose)]
    lines = [line for script in shell for line in _lines(script)]
    calls = [re.match(r"(?:.*(?:-m|\|\|) )?(?:\.venv/bin/)?(pha .*)", line) for line in lines]
    return [words for call in calls if call for words in commands(call[1])]


@cache
def help_of(verb: str) -> str:
    """The help of a verb; of "" that of `pha`, of "keys" the keys of recipes."""
    if verb == "keys":
        return "\n".join(f"--{key}" for key in recipe_keys())
    words = ["--help"] if verb == "" else [verb, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(words)
    return out.getvalue()


@pytest.mark.parametrize(
    "page", [p for p in [*PAGES, FULL_RUN] if documented(p)], ids=lambda p: p.name
)
def test_documented_commands_exist(page: Path) -> None:
    for command in documented(page):
        while command[1] == "--import":
            command = ["pha", *command[3:]]
        verb, line = command[1], shlex.join(command)
        if verb.startswith("--"):
            continue
        # The options of `pha harness` are those of lm-eval.
        options = [word.partition("=")[0] for word in command[2:] if verb != "harness"]
        assert re.search(rf"^ +{re.escape(verb)}\b", help_of(""), re.M), f"no verb in `{line}`"
        for option in (word for word in options if word.startswith("--")):
            known = help_of("keys" if "." in option else verb)
            assert re.search(rf"{re.escape(option)}(?![\w.-])", known), f"no {option} in `{line}`"


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda p: p.stem)
def test_tutorials_run(page: Path, tmp_path: Path) -> None:
    for package in ("jupytext", "nbclient", "ipykernel", "lm_eval"):
        pytest.importorskip(package)
    from scripts.run_tutorials import run_tutorial

    run_tutorial(page, tmp_path / "notebook.ipynb")
    assert (tmp_path / "notebook.ipynb").stat().st_size > 1000


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), *TUTORIALS], ids=lambda p: p.name)
def test_every_page_has_a_place_in_the_order(page: Path) -> None:
    order = read(DOCS / "README.md")
    assert page.name == "README.md" or f"]({page.relative_to(DOCS).as_posix()})" in order


def test_full_run_is_shell() -> None:
    subprocess.run(["bash", "-n", FULL_RUN], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_quotations_are_the_source(page: Path) -> None:
    assert included(read(page)) == read(page), "run `python scripts/include_source.py`"


def test_every_equation_is_quoted() -> None:
    assert len(QUOTE.findall(read(DOCS / "how-pha-works.md"))) >= 10


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)", re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M), re.M
    )
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", read(page)):
        to = page.parent / target if target else page
        assert to.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(to), f"{page.name} links to {target}#{anchor}"
