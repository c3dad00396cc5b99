"""Needles by likelihood: is a fact that stands far back in a text known when it is asked for?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pha.data.encoding import TextEncoder
from pha.data.store import TokenStore
from pha.evals.perplexity import BATCH_TOKENS
from pha.evals.probes.reading import Panel, Point, Progress, Question, Reading, stage
from pha.evals.where import reference_split
from pha.foreign.model import ForeignCache
from pha.loading import LoadedModel
from pha.utils.errors import PHAError
from pha.utils.hardware import autocast

CONTEXTS = 20
DEPTHS = 11  # from 0 to 1 in tenths
EXAMPLES = 2
ABSENT = 16
SEED = 0

_COMMONEST = 64  # words that are no keys or values: most of them function words
_TEXT = 32  # tokens of text among the needles at least
_FORM = (" The", " is", ".")  # key after the first, value after the second


class _Context(NamedTuple):
    """Words of a context, each a token, and the text that it lies in."""

    text: np.ndarray  # as much as the longest context has
    needles: np.ndarray  # (DEPTHS, 2) key and value at each depth
    others: np.ndarray  # (DEPTHS, 2) what stands in their places in the control
    examples: np.ndarray  # (EXAMPLES, 2)
    absent: np.ndarray  # (ABSENT,) values that are not in it


def needles(loaded: LoadedModel, question: Question, progress: Progress | None = None) -> Reading:
    """Facts of the form "The KEY is VALUE.", one at each tenth of a text, asked for at its end.

    Key and value are words of one token each that the text does not have. Two examples, stated and
    asked for, stand in front. Lengths are T, 4 T, 16 T, ... tokens. What is measured of the value
    after "The KEY is":

    - *needle gain*: its nats where other facts stand in the needles' places, less its nats here;
    - *binding*: whether it is likelier than the values of the other needles;
    - *presence*: whether it is likelier than `ABSENT` values that are not in the context.

    Every needle is asked for alone. A context with all of its needles is a block of the intervals.

    Raises:
        PHAError: too short a length or text, too few words, or a model whose state cannot be kept.
    """
    tokens = question.tokens()
    reach = question.reach(len(tokens) - 1)
    form = [TextEncoder(loaded.tokenizer).encode(part) for part in _FORM]
    least = (2 * EXAMPLES + DEPTHS + 1) * len(_fact(form, 0, 0)) + _TEXT
    lengths = [n for n in (question.trained << k for k in range(0, 64, 2)) if least <= n <= reach]
    if not lengths:
        raise PHAError(
            f"needles need a context of {least} tokens or more, in lengths of T, 4 T, ... with "
            f"T {question.trained:,}, and the longest one is of {reach:,}"
        )
    contexts = _contexts(question.store, question.split, tokens, lengths[-1])
    shape = (len(lengths), DEPTHS, CONTEXTS)
    gain, binding, presence = np.empty(shape), np.empty(shape), np.empty(shape)
    for i, length in enumerate(lengths):
        at_once, shown = max(1, BATCH_TOKENS // length), stage(progress, i, len(lengths))
        for start in range(0, CONTEXTS, at_once):
            group = contexts[start : start + at_once]
            here = slice(start, start + len(group))
            nats, control = (
                _ask(loaded, question, group, form, length, given) for given in (True, False)
            )
            gain[i, :, here] = control[..., 0] - nats[..., 0]
            binding[i, :, here] = nats[..., 0] < nats[..., 1:DEPTHS].min(-1)
            presence[i, :, here] = nats[..., 0] < nats[..., DEPTHS:].min(-1)
            if shown is not None:
                shown(start + len(group), CONTEXTS)
    measures = [
        ("needle gain", "nats", gain, 0.0),
        ("binding: the right one of the needles", "accuracy", binding, 1 / DEPTHS),
        (f"presence: before {ABSENT} absent values", "accuracy", presence, 1 / (1 + ABSENT)),
    ]
    axis, panels = "length (tokens)", []
    for title, unit, values, chance in measures:
        points = [_mean(f"{n:,}", v, n) for n, v in zip(lengths, values, strict=True)]
        panels.append(Panel(title, unit, points, axis, chance=chance))
    cells = [
        _mean(f"{length:,} at {depth / (DEPTHS - 1):.1f}", gain[i, depth], length, depth / 10)
        for i, length in enumerate(lengths)
        for depth in range(DEPTHS)
    ]
    panels.append(Panel("needle gain by depth", "nats", cells, axis, "depth"))
    return Reading("needles", question.protocol(lengths=lengths, contexts=CONTEXTS), panels)


def _mean(label: str, values: np.ndarray, x: float, y: float | None = None) -> Point:
    """Over the contexts, the last axis of `values`."""
    values = values.reshape(-1, CONTEXTS)
    weights = [float(len(values))] * CONTEXTS
    return Point(label, values.size, values.sum(0).tolist(), weights, x, y)


def _contexts(store: TokenStore, split: str, tokens: np.ndarray, longest: int) -> list[_Context]:
    """Texts evenly spread over the split, each with words that it does not have."""
    words = _words(store, split)
    begin = np.linspace(0, len(tokens) - longest, CONTEXTS).astype(np.int64)
    needed = 2 * (2 * DEPTHS + EXAMPLES) + ABSENT
    found = []
    for number, start in enumerate(begin.tolist()):
        text = tokens[start : start + longest].astype(np.int64)
        free = words[~np.isin(words, text)]
        if len(free) < needed:
            raise PHAError(
                f"needles need {needed} frequent words of one token that a text of {longest:,} "
                f"tokens does not have, and {store.path} has {len(free)}; ask for a shorter "
                "length, or prepare a store with a larger vocabulary"
            )
        bits = np.random.PCG64(np.random.SeedSequence([SEED, number]))
        # Of the commoner half, if that is enough, so that the model has learned them.
        free = free[: max(needed, len(free) // 2)]
        drawn = free[np.argsort(bits.random_raw(len(free)), kind="stable")[:needed]]
        pairs = drawn[ABSENT:].reshape(-1, 2)
        facts, others, examples = np.split(pairs, [DEPTHS, 2 * DEPTHS])
        found.append(_Context(text, facts, others, examples, drawn[:ABSENT]))
    return found


def _words(store: TokenStore, split: str) -> np.ndarray:
    """Ids of words with a blank before them, commonest in training first, the very first left out.

    Words are of at least three letters, as byte-level and sentencepiece tokenizers spell them.
    """
    counts = store.frequencies(reference_split(store, split))
    spelled = store.tokenizer().convert_ids_to_tokens(list(range(store.vocab_size)))
    ids = [
        number
        for number in np.argsort(-counts, kind="stable").tolist()
        if counts[number]
        and (word := spelled[number] or "")[:1] in ("Ġ", "▁")
        and len(word) > 3
        and word[1:].isascii()
        and word[1:].isalpha()
    ]
    return np.array(ids[_COMMONEST:], dtype=np.int64)


def _fact(form: Sequence[np.ndarray], key: int, value: int) -> list[int]:
    return [*form[0], key, *form[1], value, *form[2]]


def _prompt(context: _Context, form: Sequence[np.ndarray], length: int, given: bool) -> list[int]:
    """The context of a question: with it, which has no value, `length` tokens."""
    front = 2 * [token for pair in context.examples for token in _fact(form, *pair)]
    facts = [_fact(form, *pair) for pair in (context.needles if given else context.others)]
    asked = len(form[0]) + 1 + len(form[1])
    room = length - len(front) - sum(map(len, facts)) - asked
    text, ids = context.text[:room].tolist(), front
    places = [room * depth // (DEPTHS - 1) for depth in range(DEPTHS)]
    for fact, begin, end in zip(facts, [0, *places[:-1]], places, strict=True):
        ids = ids + text[begin:end] + fact
    return ids


@torch.inference_mode()
def _ask(
    loaded: LoadedModel,
    question: Question,
    contexts: Sequence[_Context],
    form: Sequence[np.ndarray],
    length: int,
    given: bool,
) -> np.ndarray:
    """(DEPTHS, contexts, DEPTHS + ABSENT) nats: the right value, the other needles', absent ones.

    Contexts are read once, in pieces; every question goes on from a copy of the state.
    """
    model, device = loaded.model, loaded.model.device
    rows = torch.tensor([_prompt(each, form, length, given) for each in contexts], device=device)
    values = np.stack([each.needles[:, 1] for each in contexts])
    absent = np.stack([each.absent for each in contexts])
    found = []
    with autocast(device.type, question.precision):
        cache = model.new_cache()
        for piece in rows.split(question.piece, dim=1):
            model.states(piece, cache=cache)
        if isinstance(cache, ForeignCache) and not cache.arguments:
            raise PHAError(
                f"a {model.config.model_type} keeps its state where it cannot be copied, so that "
                "needles cannot be asked for one by one; leave this probe out"
            )
        for depth in range(DEPTHS):
            asked = [[*form[0], each.needles[depth, 0], *form[1]] for each in contexts]
            x = model.states(torch.tensor(asked, device=device), cache=copy.deepcopy(cache))[:, -1]
            candidates = np.concatenate(
                [values[:, [depth]], np.delete(values, depth, axis=1), absent], axis=1
            )
            targets = torch.from_numpy(candidates).to(device)
            nats, _ = model.token_statistics(
                x.repeat_interleave(candidates.shape[1], 0), targets.flatten()
            )
            found.append(nats.view(candidates.shape).float().cpu().numpy())
    return np.stack(found)
