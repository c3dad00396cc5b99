"""What a model is without a branch, with one that looks back less far, or with a past cut off.

All of it is done by hooks and options of modules, for the time of a `with`. So whatever computes in
place of modules sees it and steps aside (`pha.utils.plain`). It is for whole sequences: a cache
from before, or one to go on with, would hold what the model was not given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pha.model.attention import GroupedQueryAttention
from pha.model.backbone import Backbone
from pha.model.block import ParallelBlock
from pha.model.branches import Branch, Context
from pha.model.gss import GatedStateSpace
from pha.ops import gated_scan
from pha.ops.attention import attention_mask
from pha.ops.precision import accumulation_type
from pha.utils.errors import PHAError

Place = tuple[int, str]
"""A layer, counted from 0, and the name of one of its branches."""

MODES = ("mean", "resample", "zero", "renormalised")

_TOKENS = 1 << 16  # that a branch reads at a time where each token has a window to itself


def branches_of(backbone: Backbone) -> dict[Place, Branch]:
    """Every branch of every layer, in order."""
    return {
        (index, name): branch
        for index, layer in enumerate(backbone.layers)
        for name, branch in layer.branches.items()  # type: ignore[union-attr, operator]
    }


def remembers(branch: Branch) -> bool:
    """Whether a branch lets tokens see others: it keeps keys or states."""
    return branch.keeps_keys or bool(branch.states)


@contextmanager
def silenced(
    backbone: Backbone,
    places: Collection[Place],
    mode: str,
    means: Mapping[Place, Tensor] | None = None,
) -> Iterator[None]:
    """Replace what branches add to the mix, w_i RMSNorm_i(y_i); in sequential blocks their output.

    Behind the norm, since before it whatever is small is blown up to full size.

    Args:
        backbone: the model's.
        places: of the branches.
        mode: `mean` puts the vector of `means` there; `resample` what the branch says at the same
            place of another sequence of the batch; `zero` nothing; `renormalised` nothing, with the
            other weights divided by 1 - w_i, so that the mix is that of a model without it.
        means: from `averages`.

    Raises:
        PHAError: no such mode, a batch of one to resample, or nothing left to renormalise.
    """
    if mode not in MODES:
        raise PHAError(f"a branch is silenced by {', '.join(MODES)}, not by {mode!r}")
    with ExitStack() as hooks:
        for layer, name in places:
            mean = None if means is None else means[layer, name]
            _hook(hooks, _last_module(backbone, (layer, name)), _replacement(mode, mean))
        for layer in {layer for layer, _ in places} if mode == "renormalised" else ():
            block = backbone.layers[layer]
            gone = [name for index, name in places if index == layer]
            if not isinstance(block, ParallelBlock) or len(gone) == len(block.branches):
                raise PHAError(f"layer {layer} mixes nothing else that could be renormalised")
            shares = dict(zip(block.mixing.names, block.mixing.weights().tolist(), strict=True))
            rest = 1 - sum(shares[name] for name in gone)
            _hook(hooks, block.mixing, lambda _, __, y, rest=rest: y / rest)
        yield


@contextmanager
def averages(backbone: Backbone, places: Collection[Place]) -> Iterator[dict[Place, Tensor]]:
    """Mean vectors (d,) of what these branches add, over all tokens that go through meanwhile.

    Yields a mapping that is filled at the end.
    """
    sums: dict[Place, tuple[Tensor, int]] = {}
    means: dict[Place, Tensor] = {}

    def add(place: Place) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, y: Tensor) -> None:
            total, count = sums.get(place, (torch.zeros(y.shape[-1], dtype=torch.float64), 0))
            part = y.detach().sum((0, 1), dtype=torch.promote_types(y.dtype, torch.float32))
            sums[place] = total + part.cpu(), count + y.shape[0] * y.shape[1]

        return hook

    with ExitStack() as hooks:
        for place in places:
            _hook(hooks, _last_module(backbone, place), add(place))
        yield means
    means |= {place: total / count for place, (total, count) in sums.items()}


@contextmanager
def horizon(backbone: Backbone, name: str, window: int) -> Iterator[None]:
    """Let each token see itself and `window` - 1 before it through the branches of that name.

    All else stays, and the branch stays a layer on each token. Attention narrows its window, and
    Eq. 2 takes back what is older, h_t - a^w h_{t-w}. Any other branch reads the last w tokens of
    each token anew, w times the work.

    Raises:
        PHAError: a window below 1, no such branch, or one that sees single tokens anyway.
    """
    chosen = [b for (_, n), b in branches_of(backbone).items() if n == name and remembers(b)]
    if window < 1 or not chosen:
        raise PHAError(f"a horizon of {window} for branch {name}: there is no such, or below 1")

    def shortened(branch: Branch, arguments: tuple[Tensor, Context], y: Tensor) -> Tensor:
        z, context = arguments
        if context.cache is not None or context.token_mask is not None:
            raise PHAError("a horizon is for whole sequences, without a cache or padding")
        if window >= z.shape[1]:
            return y
        # Of their kinds exactly: what inherits from them computes something else.
        if type(branch) is GatedStateSpace:
            return _subtract(branch, z, context, window)
        return _read_windows(branch, z, context, window)

    with ExitStack() as hooks:
        for branch in chosen:
            if type(branch) is GroupedQueryAttention:
                hooks.callback(setattr, branch, "window", branch.window)
                branch.window = min(window, branch.window or window)
            else:
                _hook(hooks, branch, shortened)
        yield


@contextmanager
def cut(backbone: Backbone, names: Collection[str], place: int) -> Iterator[None]:
    """Let nothing from before token number `place` through the branches of these names.

    For the tokens from there on, that is to drop keys or state from a cache; positions stay.
    """

    def without_past(
        branch: Branch, arguments: tuple[Tensor, Context]
    ) -> tuple[Tensor, Context] | None:
        z, context = arguments
        T = z.shape[1]
        if place >= T:
            return None
        starts = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
        starts[:, place] = True
        if context.document_starts is not None:
            starts |= context.document_starts
        if branch.keeps_keys:
            tokens = torch.arange(T, device=z.device)
            mask = attention_mask(tokens, tokens, starts)
            return z, replace(context, attention_mask=mask, blocks=None)
        return z, replace(context, document_starts=starts)

    with ExitStack() as hooks:
        for (_, name), branch in branches_of(backbone).items():
            if name in names:
                hooks.callback(branch.register_forward_pre_hook(without_past).remove)
        yield


def _hook(hooks: ExitStack, module: nn.Module, hook: Callable[..., Any]) -> None:
    hooks.callback(module.register_forward_hook(hook).remove)


def _last_module(backbone: Backbone, place: Place) -> nn.Module:
    """The one whose output is added to the others, or in sequential blocks to the residual."""
    layer, name = place
    block = backbone.layers[layer]
    if isinstance(block, ParallelBlock):
        return block.mixing.norms[name]
    return branches_of(backbone)[place]


def _replacement(mode: str, mean: Tensor | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        if mode == "mean":
            assert mean is not None
            return mean.to(y).expand_as(y)
        if mode == "resample":
            if len(y) < 2:
                raise PHAError("a batch of one has no other sequence to resample from")
            return y.roll(1, 0)
        return torch.zeros_like(y)

    return hook


def _subtract(branch: GatedStateSpace, z: Tensor, context: Context, window: int) -> Tensor:
    """Eq. 2 over the last w tokens: what it sums up is linear, and its decay constant."""
    a, b = branch.decay_and_scale()
    dtype = accumulation_type(z)  # what is taken away may be nearly all
    gate, value = branch.W_g(z).to(dtype), branch.W_B(z).to(dtype)
    h, _ = gated_scan(gate, value, a, b, None, context.document_starts, last_state=False)
    older = F.pad(h, (0, 0, window, 0))[:, : z.shape[1]] * a.to(dtype) ** window
    inside = (context.positions >= window).unsqueeze(-1)  # of the same document
    return branch.W_C(torch.where(inside, h - older, h).to(z.dtype))


def _read_windows(branch: Branch, z: Tensor, context: Context, window: int) -> Tensor:
    """What a branch says of each token when it reads the last w up to it, and no more."""
    B, T, _ = z.shape
    outputs = []
    for tokens in torch.arange(T, device=z.device).split(max(1, _TOKENS // (B * window))):
        places = tokens[:, None] + torch.arange(1 - window, 1, device=z.device)
        # What is before the sequence is its first token, after which the state is reset.
        before, places = places <= 0, places.clamp(min=0)

        def take(x: Tensor, places: Tensor = places) -> Tensor:
            return x.expand(B, *x.shape[1:])[:, places].flatten(0, 1)

        starts = before.repeat(B, 1)
        if context.document_starts is not None:
            starts |= take(context.document_starts)
        inner = Context(
            rotary=(take(context.rotary[0]), take(context.rotary[1])),
            positions=take(context.positions),
            document_starts=starts if bool(starts.any()) else None,
        )
        y = type(branch).forward(branch, take(z), inner)  # past the hook that asks for it
        outputs.append(y[:, -1].unflatten(0, (B, -1)))
    return torch.cat(outputs, 1)
