"""A scored document as a page: its words, coloured by how much they surprised the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from pha.evals.score import Score, Surprisal
from pha.report import plots
from pha.report.page import environment
from pha.utils.files import write_text
from pha.utils.text import memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerFast

SHADES = 6
BITS_PER_SHADE = 3.0  # a shade darker for every three bits; the last from 15 bits up


@dataclass(frozen=True)
class Word:
    """White space and what follows it up to the next."""

    space: str  # before it, as it stands
    text: str  # the word
    bits: float | None  # the sum over its tokens; None where no token was scored

    @property
    def shade(self) -> int:
        """How dark the word is shown."""
        return 0 if self.bits is None else min(SHADES - 1, int(self.bits / BITS_PER_SHADE))


@dataclass
class Collector:
    """Takes pieces as they are scored and keeps what the page and the JSON need."""

    shown: int = 20_000  # so many tokens of the beginning are shown as text
    ids: list[int] = field(default_factory=list)  # of those
    # float32, of every token; 4 bytes a token are all that grows with the document
    nats: list[np.ndarray] = field(default_factory=list)

    def __call__(self, piece: Surprisal) -> None:
        """Take the next piece."""
        self.nats.append(piece.nats.astype(np.float32))
        room = self.shown - len(self.ids)
        if room > 0:
            self.ids += piece.ids[:room].tolist()

    def all_nats(self) -> np.ndarray:
        """(tokens,) float32, the first one not a number."""
        return np.concatenate(self.nats)


def words(
    ids: Sequence[int], nats: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Word]:
    """Tokens of a byte-level tokenizer grouped into words of the text, each with its bits."""
    start = 0
    pieces = [tokenizer.decode([token]) for token in ids]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (pieces[end][:1].isspace() and not pieces[end - 1].isspace()):
            text = tokenizer.decode(list(ids[start:end]))
            word = text.lstrip()
            known = nats[start:end][np.isfinite(nats[start:end])]
            bits = float(known.sum()) / math.log(2) if len(known) else None
            yield Word(text[: len(text) - len(word)], word, bits)
            start = end


@plots.styled()
def _curve(nats: np.ndarray) -> Figure:
    """Mean bits per token along a document, in up to 200 stretches of equal length."""
    known = nats[np.isfinite(nats)]
    parts = np.array_split(known, min(200, len(known)))
    ends = np.cumsum([len(part) for part in parts])
    figure, axes = plots.new_figure(2.1)
    means = [float(part.mean()) / math.log(2) for part in parts]
    axes.plot(ends, means, color=plots.series_color(0), linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, int(ends[-1]))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    plots.label_axes(axes, "tokens into the document", "bits per token")
    return figure


def write_page(
    path: Path, model: str, score: Score, collected: Collector, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Write one self-contained HTML page on a document that was scored."""
    nats = collected.all_nats()
    shown = list(words(collected.ids, nats, tokenizer))
    scored = sorted((w for w in shown if w.bits is not None), key=lambda w: -(w.bits or 0))
    title = f"{score.name}, read by {model}"
    facts = [
        ("tokens", f"{score.tokens:,}"),
        ("perplexity per token", f"{score.perplexity:,.2f}"),
        ("perplexity per word and line end", f"{score.word_perplexity:,.1f}"),
        ("perplexity per byte", f"{score.byte_perplexity:.4f}"),
        ("bits per byte", f"{score.bits_per_byte:.4f}"),
        ("top prediction right", f"{score.accuracy:.1%}"),
        ("tokens per second", f"{score.tokens_per_second:,.0f}"),
        ("most memory", memory(score.memory_end)),
        ("attention window", str(score.protocol["attention_window"] or "all tokens")),
        ("precision", str(score.protocol["precision"])),
    ]
    curve = plots.to_svg(_curve(nats), f"bits per token along {score.name}")
    html = (
        environment()
        .get_template("surprise.html.j2")
        .render(
            title=title,
            facts=facts,
            curve=Markup(curve),
            words=shown,
            top=scored[:20],
            shades=[(i, i * BITS_PER_SHADE) for i in range(SHADES)],
            shown=len(collected.ids),
            total=len(nats),
        )
    )
    write_text(path, html)
    return path
