"""Put today's tables into docs/models.md: what every preset has and costs, and what was measured.

The page says `<!-- table: NAME -->` before each. A test fails where the page is out of date: then
run `python -m scripts.models_page`, which takes some minutes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pha import mixers as mixers  # which makes their presets known
from pha.costs import kept_bytes, training_flops
from pha.model.parameters import count_parameters
from pha.model.presets import PAPER_PARAMETERS, PRESETS, preset_config
from pha.results import RunResult
from pha.utils.formats import read_json
from pha.utils.text import count, fixed, perplexity

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n)((?:\|[^\n]*\n)*)")
LENGTH = 1024
NOT_SHOWN = {"studies", "batch-size"}  # a table of their own; a search for a recipe
STUDIES = ("branches", "composition", "scaling", "gss", "systems")

SIZES = (
    *("preset", "parameters", "in the paper", "besides the embedding", "state", "per token kept"),
    *("training", "trained by"),
)
MEASURED = (
    *("preset", "parameters", "text", "tokens seen", "seeds", "window", "perplexity"),
    *("bits per byte", "trained by", "files"),
)
STUDIED = ("preset", "variant", "parameters", "seeds", "perplexity", "trained by", "table")


def groups() -> dict[str, list[str]]:
    """Table -> its presets."""
    paper = list(PRESETS)[: list(PRESETS).index("pha-tiny")]
    small = [name for name in PRESETS if "-tiny" in name]
    return {
        "paper": paper,
        "others": [name for name in PRESETS if name not in {*paper, *small}],
        "tiny": small,
    }


def size_row(name: str) -> list[str]:
    """What a preset has and costs."""
    tiny = "-tiny" in name
    config = preset_config(name, vocab_size=8192 if tiny else 50257)
    parts = count_parameters(config)
    total, paper = sum(parts.values()), PAPER_PARAMETERS.get(name)
    state, keys = kept_bytes(config)
    protocol = "text" if tiny else "openwebtext" if "openwebtext" in name else "wikitext103"
    return [
        f"`{name}`",
        count(total),
        "" if paper is None else count(paper),
        count(total - parts["embedding"]),
        f"{state / 1e3:,.1f} kB",
        f"{keys / 1e3:,.1f} kB",
        f"{training_flops(config, LENGTH) / 1e6:,.0f} MFLOP",
        f"`pha train {name}.{protocol}{' --data STORE' * tiny}`",
    ]


def runs() -> Iterator[list[str]]:
    """What runs outside of studies came to on texts, those that differ by seed in one row."""
    groups: dict[tuple[str, ...], list[RunResult]] = {}
    for path in sorted((ROOT / "results").rglob("result.json")):
        result = RunResult.read(path)
        folder = path.parent
        if NOT_SHOWN & set(path.parts) or result.evaluation("test") is None:
            continue
        if folder.name.startswith("seed-"):
            folder = folder.parent
        command = short(result.provenance["command"])
        key = (folder.relative_to(ROOT).as_posix(), str(result.model.preset), command)
        groups.setdefault(key, []).append(result)
    for (place, preset, command), results in groups.items():
        tests = [test for result in results if (test := result.evaluation("test"))]
        data, found = results[0].data, [test.perplexity for test in tests]
        yield [
            f"`{preset}`",
            count(results[0].model.parameters.total),
            f"{data['description']}; {data['tokenizer']}",
            count(results[0].tokens_seen),
            str(len(results)),
            str(tests[0].protocol["sequence_length"]),
            spread(mean(found), stdev(found) if len(found) > 1 else None),
            fixed(mean(test.bits_per_byte for test in tests), 3),
            f"`{command}`",
            f"[{Path(place).name}](../{place})",
        ]


def short(command: str) -> str:
    """A command without what is of one machine or seed: where to write, where texts lie."""
    split = (word.split("=", 1) if word[:2] == "--" else [word] for word in shlex.split(command))
    words = [part for parts in split for part in parts]
    kept: list[str] = []
    while words:
        word = words.pop(0)
        if word in {"--out", "--run.seed"}:
            words.pop(0)
        elif word in {"--data", "--data.store"}:
            words.pop(0)
            kept += ["--data", "STORE"]
        elif word != "--quiet":
            kept.append(word)
    return shlex.join(kept)


def spread(average: float, deviation: float | None) -> str:
    """A perplexity over seeds."""
    return perplexity(average) + ("" if deviation is None else f" ± {fixed(deviation, 1)}")


def studied() -> Iterator[list[str]]:
    """What the variants of the studies came to, each once."""
    seen = set()
    for name in STUDIES:
        folder = f"results/studies/{name}"
        study = read_json(ROOT / folder / "study.json")
        for variant in study["variants"]:
            key = (variant["recipe"], *variant["settings"])
            measures: dict[str, Any] = variant["measures"]
            if key in seen:
                continue
            seen.add(key)
            test = measures["test"]
            yield [
                f"`{variant['recipe'].partition('.')[0]}`",
                variant["label"],
                count(measures["parameters"]["mean"]),
                str(test["n"]),
                spread(test["mean"], test["std"]),
                f"`pha study {name} --data STORE`",
                f"[{name}](../{folder}/table.md)",
            ]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _size_table(names: list[str]) -> str:
    return table(SIZES, map(size_row, names))


def tables() -> dict[str, Callable[[], str]]:
    """Name -> the table as it is today."""
    made: dict[str, Callable[[], str]] = {
        name: partial(_size_table, names) for name, names in groups().items()
    }
    return made | {
        "runs": lambda: table(MEASURED, runs()),
        "studies": lambda: table(STUDIED, studied()),
    }


def included(text: str) -> str:
    """The page with every table as it is today."""
    made = tables()
    return TABLE.sub(lambda match: match[1] + made[match[2]](), text)


if __name__ == "__main__":
    PAGE.write_text(included(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
