"""Numbers and strings for people: in the terminal, on pages and in tables alike."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

DASH = "–"
"""Stands for a value that the run does not have, or that is no finite number."""

# Tab and newline lay out text; every other control character is invisible or breaks XML, so it
# is drawn as its Unicode control picture. Lone surrogates cannot be encoded at all.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

# What no file is called on Windows, whatever the ending.
_DEVICES = r"con|prn|aux|nul|(com|lpt)\d"


def printable(text: str) -> str:
    """`text` with control characters made visible, safe to encode and to put into XML."""
    return _UNPRINTABLE.sub(_picture, text)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean ...?` with the nearest of the known names; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def read_docstring(of: Any, section: str = "Args") -> tuple[str, dict[str, str]]:
    """What a docstring says of the whole, and of each name in a section of it."""
    text, _, listed = (inspect.getdoc(of) or "").partition(f"\n{section}:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
    return text.strip(), {name: " ".join(words.split()) for name, words in entries}


def split_commas(text: str) -> list[str]:
    """The parts of `text` between its commas, those in brackets left alone."""
    return [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text)]


def file_name(text: str) -> str:
    """`text` as the name of one file: what any system gives a meaning of its own is a dash."""
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]+|[. ]+$', "-", text)
    return f"_{name}" if re.fullmatch(_DEVICES, name.partition(".")[0], re.IGNORECASE) else name


def shorten(text: str, limit: int) -> str:
    """`text` on one line, cut in its middle to at most `limit` characters."""
    line = " ".join(printable(text).split())
    if len(line) <= limit:
        return line
    head = (limit - 1) // 2
    return f"{line[:head]}…{line[-(limit - 1 - head) :]}"


def perplexity(value: float | None) -> str:
    """Four significant figures while they are decimals: 2.314, 18.23, 164.9, 50,257."""
    if not _known(value):
        return DASH
    decimals = 3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:,.{decimals}f}"


def fixed(value: float | None, decimals: int) -> str:
    """A number with thousands separators and a fixed count of decimals."""
    return f"{value:,.{decimals}f}" if _known(value) else DASH


def percent(fraction: float | None, decimals: int = 1) -> str:
    """A fraction as a percentage: 0.074 is 7.4%."""
    return f"{100 * fraction:.{decimals}f}%" if _known(fraction) else DASH


def count(value: float | None) -> str:
    """Three significant figures with k, M, G, T, P or E: 812, 97.0k, 4.10M."""
    if not _known(value):
        return DASH
    for power, suffix in zip((18, 15, 12, 9, 6, 3), "EPTGMk", strict=True):
        factor = 10.0**power
        # 999.6k rounds to 1.00M, so the step up comes at half a unit of the third figure.
        if abs(value) >= 0.9995 * factor:
            return f"{_three_figures(value / factor)}{suffix}"
    return f"{value:,.0f}"


def flop(value: float) -> str:
    """Three significant figures and their unit: 812 FLOP, 31.6 GFLOP."""
    text = count(value)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def memory(value: float | None) -> str:
    """Bytes as GB or MB: 1.23 GB, 640 MB."""
    if not _known(value):
        return DASH
    return f"{value / 1e9:.2f} GB" if value >= 0.9995e9 else f"{value / 1e6:.0f} MB"


def duration(seconds: float | None) -> str:
    """Seconds as 8.2 s, 3 min 15 s, 2 h 04 min or 1 d 03 h."""
    if not _known(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    size, unit, part_size, part_unit = 60, "min", 1, "s"
    if whole >= 86400:
        size, unit, part_size, part_unit = 86400, "d", 3600, "h"
    elif whole >= 3600:
        size, unit, part_size, part_unit = 3600, "h", 60, "min"
    rest = whole % size // part_size
    return f"{whole // size} {unit} {rest:02d} {part_unit}"


def plain(value: Any) -> str:
    """A setting or a provenance value, as close to its source as a table cell allows."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or DASH
    return str(value) or DASH


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted key, value)` for the leaves of a nested mapping, in its order."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _three_figures(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"
