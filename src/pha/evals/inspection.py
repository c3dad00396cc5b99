"""What flows through which branch of a model: how far it remembers, and what it is needed for.

Three questions, three answers that need not agree. *Share*: what the mixing weights say. *Need*:
what the loss rises by when a branch is silenced behind its norm (`pha.model.silence`); the mean
vector in its place is the figure, nothing and a renormalised mix are its brackets. *Use*: what the
loss is when each token sees only its last w tokens through the branch (its horizon).
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pha.data.store import TokenStore
from pha.evals.compare import Interval, block_sums, mean_interval
from pha.evals.probes.branches import Windows, horizons_below
from pha.evals.probes.reading import Progress, Question
from pha.loading import LoadedModel
from pha.model import Backbone, Branch, GatedStateSpace, GroupedQueryAttention, ParallelBlock
from pha.model.silence import Place, branches_of, cut, horizon, remembers, silenced
from pha.modeling import PHAForCausalLM

CONTROLS = 5  # draws of a random branch in every layer
LOOKED_AT = 4096  # tokens for decays and for the entropy of attention
LONGEST = 1024  # tokens of a window for the latter
QUANTILES = (0.1, 0.5, 0.9)
LONG = (32, 128, 512)  # tokens; shares of the states that remember longer are told


@dataclass(frozen=True)
class Memory:
    """Half-lives of the states of a branch, in tokens.

    Those of Eq. 2 are ln 2 / (dt (k + 1)), weighted by the norms of W_C's columns; of other
    branches ln 2 / -ln(decay), of all their states and tokens alike.

    Attributes:
        quantiles: one tenth, one half and nine tenths of the weight are below.
        longest: of all.
        above: tokens -> share of the weight with a longer half-life.
    """

    quantiles: list[float]
    longest: float
    above: dict[str, float]


@dataclass(frozen=True)
class BranchReport:
    """A branch of a layer, as far as it shows without an intervention.

    Attributes:
        weight: in the mix, Eq. 4; None in sequential blocks.
        share: the weight with the gain of the norm counted.
        before: its memory at the start of training, where that is known.
        memory: its memory now, where it has decays.
        temperatures: of its heads, where it has any.
        entropy: of its attention weights in nats, mean over heads and the last half of queries,
            in windows of at most 1,024 tokens.
    """

    layer: int
    branch: str
    weight: float | None
    share: float | None
    before: Memory | None
    memory: Memory | None
    temperatures: list[float] | None
    entropy: float | None


@dataclass(frozen=True)
class Need:
    """What the loss rises by without a branch, by the way it is silenced; `layer` None: in all."""

    layer: int | None
    branch: str
    nats: dict[str, Interval]


@dataclass(frozen=True)
class Horizon:
    """What the loss rises by when tokens see the last `window` tokens alone through a branch."""

    branch: str
    window: int
    nats: Interval


@dataclass(frozen=True)
class HandOff:
    """Loss after a prefix of which only some branches keep what they know.

    Attributes:
        tokens: which are scored: `all`, those `seen` in the prefix, or those `new`.
        count: how many.
        whole: loss with the prefix.
        deleted: loss without it.
        dropped: branch -> loss where its keys or its state of the prefix are dropped.
        rho: branch -> 1 - (dropped - whole) / (deleted - whole), the part of what the prefix is
            worth that is left; None where it is worth nothing.
    """

    tokens: str
    count: int
    whole: float
    deleted: float
    dropped: dict[str, float]
    rho: dict[str, float | None]


@dataclass(frozen=True)
class Inspection:
    """Everything that was found.

    Attributes:
        branches: of every layer.
        loss: of the whole model on the text, nats per token; with all below None without a text.
        need: by layer and in all.
        control: what the loss rises by with the mean in the place of one branch, drawn at random,
            of every layer; one for each draw.
        agreement: Kendall's tau of effective share and need over layers and branches, and its p
            value; None where no shares differ.
        horizons: over windows.
        hand_off: by kind of token.
        protocol: how all this was measured.
    """

    branches: list[BranchReport]
    loss: float | None = None
    need: list[Need] = field(default_factory=list)
    control: list[Interval] = field(default_factory=list)
    agreement: tuple[float, float] | None = None
    horizons: list[Horizon] = field(default_factory=list)
    hand_off: list[HandOff] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)


def inspect_weights(
    model: PHAForCausalLM, start: PHAForCausalLM | None = None, ids: Tensor | None = None
) -> list[BranchReport]:
    """What branches show of themselves.

    Args:
        model: as it is now.
        start: as its training began.
        ids: (B, T) text for what depends on it; without it inputs are zero and entropies unknown.
    """
    now, before = _memories(model, ids), {} if start is None else _memories(start, ids)
    entropies = {} if ids is None else _entropies(model, ids)
    mixing = model.model.mixing_weights()
    reports = []
    for (layer, name), branch in branches_of(model.model).items():
        shown = branch.diagnostics(torch.zeros(1, 1, model.config.hidden_size, device=model.device))
        parallel = isinstance(model.model.layers[layer], ParallelBlock) and mixing
        reports.append(
            BranchReport(
                layer,
                name,
                mixing[layer]["weights"][name] if parallel else None,
                mixing[layer]["effective"][name] if parallel else None,
                before.get((layer, name)),
                now.get((layer, name)),
                None if shown.temperatures is None else shown.temperatures.tolist(),
                entropies.get(layer) if isinstance(branch, GroupedQueryAttention) else None,
            )
        )
    return reports


@torch.inference_mode()
def _memories(model: PHAForCausalLM, ids: Tensor | None) -> dict[Place, Memory]:
    """Of every branch that has decays, at what enters it."""
    entered: dict[Branch, Tensor] = {}
    branches, device = branches_of(model.model), model.device
    if ids is not None:
        with ExitStack() as hooks:
            for branch in branches.values():
                hook = branch.register_forward_pre_hook(lambda b, x: entered.update({b: x[0]}))
                hooks.enter_context(hook)
            model.model(ids.to(device))
    nothing = torch.zeros(1, 1, model.config.hidden_size, device=device)
    found = {}
    for place, branch in branches.items():
        decays = branch.diagnostics(entered.get(branch, nothing)).decays
        if decays is None:
            continue
        weights = torch.ones_like(decays)
        if isinstance(branch, GatedStateSpace):
            weights = torch.linalg.vector_norm(branch.W_C.weight, dim=0)
        found[place] = _memory(decays.flatten().cpu().double(), weights.flatten().cpu().double())
    return found


def _memory(decays: Tensor, weights: Tensor) -> Memory:
    # The decay next to 1 in float32 is the slowest there is; 1 itself would never forget.
    half_lives, order = (-math.log(2) / decays.clamp(1e-30, 1 - 2**-24).log()).sort()
    weights = weights[order] / weights.sum()
    places = torch.searchsorted(weights.cumsum(0), torch.tensor(QUANTILES, dtype=weights.dtype))
    return Memory(
        half_lives[places.clamp(max=len(half_lives) - 1)].tolist(),
        float(half_lives[-1]),
        {str(tokens): float(weights[half_lives > tokens].sum()) for tokens in LONG},
    )


@torch.inference_mode()
def _entropies(model: PHAForCausalLM, ids: Tensor) -> dict[int, float]:
    """Layer -> entropy of its attention weights in nats, over the last half of the queries."""
    every = branches_of(model.model).items()
    layers = [i for (i, _), branch in every if isinstance(branch, GroupedQueryAttention)]
    if not layers:
        return {}
    sums = dict.fromkeys(layers, 0.0)
    for row in ids[:, :LONGEST].to(model.device):  # one at a time: weights of all layers are large
        weights = model.model(row[None], output_attentions=True).attentions
        for layer, A in zip(layers, weights, strict=True):
            half = A[:, :, len(row) // 2 :].float()
            sums[layer] += float(torch.special.entr(half).sum(-1).mean())
    return {layer: total / len(ids) for layer, total in sums.items()}


def inspect_model(
    loaded: LoadedModel,
    store: TokenStore,
    split: str,
    *,
    length: int,
    tokens: int,
    start: PHAForCausalLM | None = None,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Inspection:
    """Inspect a model with a text.

    Args:
        loaded: a PHA model.
        store: tokens made by its tokenizer.
        split: that is scored; mean vectors are those of 65,536 tokens of the training split.
        length: T, tokens of a window; its first half is the prefix of the hand-off.
        tokens: about how many are scored, in whole windows.
        start: the model as its training began.
        precision: fp32, or bf16 for autocast.
        progress: called with (passes done, passes in all).

    Raises:
        PHAError: another model, or fewer than two windows.
    """
    question = Question(store, split, length, max_tokens=tokens, precision=precision)
    asked = Windows(loaded, question, progress)
    model, body, score = asked.model, asked.model.model, asked.losses
    branches, count, blocks = asked.branches, asked.count, asked.blocks
    names = list(dict.fromkeys(name for _, name in branches))
    with_past = list(
        dict.fromkeys(name for (_, name), branch in branches.items() if remembers(branch))
    )
    far = horizons_below(length)
    sets = _silenced_sets(body, list(branches), names)
    asked.steps = 1 + len(sets) + len(with_past) * (len(far) + 1) + 1
    whole, means = score(nullcontext()), asked.means()

    def rise(losses: np.ndarray) -> Interval:
        return mean_interval(*block_sums(losses - whole, blocks))

    found: dict[tuple[int | None, str], dict[str, Interval]] = {}
    control = []
    for key, mode, places in sets:
        nats = rise(score(silenced(body, places, mode, means)))
        if key[1]:
            found.setdefault(key, {})[mode] = nats
        else:
            control.append(nats)
    horizons = [
        Horizon(name, w, rise(score(horizon(body, name, w)))) for name in with_past for w in far
    ]
    half = length // 2
    deleted = score(cut(body, with_past, half))
    dropped = {name: score(cut(body, [name], half)) for name in with_past}
    ids = np.asarray(store.tokens(split)[: count + 1]).astype(np.int64)
    shown = torch.from_numpy(ids[: max(1, min(count, LOOKED_AT) // length) * length])
    reports = inspect_weights(model, start, shown.view(-1, length))
    need = [Need(*key, nats) for key, nats in found.items()]
    return Inspection(
        reports,
        float(whole.mean()),
        need,
        control,
        _agreement(reports, need),
        horizons,
        _hand_off(ids, length, whole, deleted, dropped),
        asked.protocol() | {"intervals": "95%, over windows", "prefix": half},
    )


def _silenced_sets(
    body: Backbone, every: Sequence[Place], names: Sequence[str]
) -> list[tuple[tuple[int | None, str], str, Collection[Place]]]:
    """What is silenced: (layer or None for all, branch or "" for a random one), mode, places."""
    mixed = all(isinstance(b, ParallelBlock) and len(b.branches) > 1 for b in body.layers)
    modes = ("mean", "zero", *(["renormalised"] if mixed else []))
    sets: list[tuple[tuple[int | None, str], str, Collection[Place]]] = []
    for name in names:
        places = [place for place in every if place[1] == name]
        sets += (((None, name), mode, places) for mode in (*modes, "resample"))
        sets += (((layer, name), mode, [(layer, name)]) for layer, _ in places for mode in modes)
    drawn = random.Random(0)
    layers = [[place for place in every if place[0] == i] for i in range(len(body.layers))]
    for _ in range(CONTROLS if len(names) > 1 else 0):
        sets.append(((None, ""), "mean", [drawn.choice(places) for places in layers]))
    return sets


def _agreement(reports: Sequence[BranchReport], need: Sequence[Need]) -> tuple[float, float] | None:
    """Kendall's tau of share and need, and its p value; None without shares that differ."""
    from scipy import stats

    shares = {(r.layer, r.branch): r.share for r in reports}
    pairs = [
        (share, each.nats["mean"].mean)
        for each in need
        if each.layer is not None and (share := shares[each.layer, each.branch]) is not None
    ]
    if len({share for share, _ in pairs}) < 2:
        return None
    found = stats.kendalltau(*zip(*pairs, strict=True))
    return float(found.statistic), float(found.pvalue)


def _hand_off(
    ids: np.ndarray,
    length: int,
    whole: np.ndarray,
    deleted: np.ndarray,
    dropped: dict[str, np.ndarray],
) -> list[HandOff]:
    """By whether the token stands in the prefix of its window."""
    half = length // 2
    rows, targets = ids[:-1].reshape(-1, length), ids[1:].reshape(-1, length)
    after = np.zeros(rows.shape, dtype=bool)
    after[:, half:] = True
    seen = np.stack([np.isin(t, row[:half]) for t, row in zip(targets, rows, strict=True)])
    found = []
    for kind, chosen in (("all", after), ("seen", after & seen), ("new", after & ~seen)):
        here = chosen.ravel()
        if not here.any():
            continue
        full, without = float(whole[here].mean()), float(deleted[here].mean())
        left = {name: float(losses[here].mean()) for name, losses in dropped.items()}
        worth = without - full
        rho = {n: 1 - (loss - full) / worth if worth > 0 else None for n, loss in left.items()}
        found.append(HandOff(kind, int(here.sum()), full, without, left, rho))
    return found
