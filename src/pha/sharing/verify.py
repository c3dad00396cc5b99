"""An exported model against its own card: the same scores, measured again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from pha.data.store import TokenStore
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.loading import load_model
from pha.utils.errors import PHAError
from pha.utils.hardware import default_device

# Of a score: machines and batches round differently, and bf16 has eight bits.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


@dataclass(frozen=True)
class Check:
    """One score of the card."""

    split: str
    name: str  # of the score
    values: tuple[float, float]  # on the card, measured
    tolerance: float  # relative

    @property
    def same(self) -> bool:
        """Whether they agree."""
        said, found = self.values
        return abs(found - said) <= self.tolerance * abs(said)


def verify_export(
    folder: Path, data: Path, progress: Callable[[str, int, int], None] | None = None
) -> list[Check]:
    """Evaluate an export on the splits and by the protocols that its card names.

    Args:
        folder: the export.
        data: the token store.
        progress: called with a split, how much of it is done, and how much there is.

    Raises:
        PHAError: no card or no scores of a text on it, another store or tokenizer.
    """
    card = folder / "README.md"
    if not card.is_file():
        raise PHAError(f"{folder} has no card, README.md; give a folder of `pha export`")
    text = card.read_text(encoding="utf-8")
    try:
        claims: list[EvalResult] = getattr(ModelCard(text).data, "eval_results", None) or []
    except (ValueError, TypeError, KeyError) as error:
        raise PHAError(f"{card} is damaged: {error}") from error
    if not claims:
        raise PHAError(f"{card} gives no scores; export a finished run")
    store = TokenStore.open(data)
    if store.sha256 not in text:
        raise PHAError(f"{data} is not the data of {card}, which names the hash of its own")
    device = default_device()
    loaded = load_model(folder, device)
    store.require_tokenizer(loaded.tokenizer)
    checks = []
    for (split, words), scores in groupby(claims, _of):
        protocol, tokens, precision = _read_protocol(words)
        found = evaluate(
            *(loaded.model, store, split, protocol),
            max_tokens=tokens,
            precision=precision,
            progress=None if progress is None else partial(progress, split),
        )
        kept = "bf16" if "| weights | bf16 |" in text else precision
        for score in scores:
            name, claimed = score.metric_type, float(score.metric_value)
            values = claimed, float(getattr(found, name))
            checks.append(Check(split, name, values, TOLERANCE[kept]))
    return checks


def _of(claim: EvalResult) -> tuple[str, str]:
    """Split and protocol of a score."""
    return str(claim.dataset_split), str(claim.metric_name).partition("; ")[2]


def _read_protocol(words: str) -> tuple[Protocol, int | None, str]:
    """Protocol, tokens to score (None: all) and precision, from the words of a card.

    Raises:
        PHAError: not such words.
    """
    length = re.search(r"windows of (\d+) tokens", words)
    scored = re.search(r"([\d,]+) tokens scored", words)
    precision = words.rpartition(", ")[2]
    if length is None or scored is None or precision not in TOLERANCE:
        raise PHAError(f"the card says {words!r}, which is no protocol of a text")
    advance = re.search(r"advancing by (\d+)", words)
    packed = "reset at document starts" in words
    stride = int((advance or length)[1])
    tokens = int(scored[1].replace(",", "")) if "part of the split" in words else None
    return Protocol(int(length[1]), stride, packed), tokens, precision
