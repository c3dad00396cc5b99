"""What a call of transformers' kind says of its tokens: which exist, and where documents begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pha.utils.errors import PHAError


def check_rows(name: str, rows: Tensor | None, batch: int, tokens: int | None) -> None:
    """Refuse an argument that is not (B, S), over the tokens in the cache and the new ones.

    Args:
        name: of the argument.
        rows: its value, if any.
        batch: B.
        tokens: S, or None where only the device knows it.

    Raises:
        PHAError: another shape.
    """
    if rows is None or torch.compiler.is_compiling():
        return
    if rows.dim() != 2 or rows.shape[0] != batch or tokens not in (None, rows.shape[1]):
        raise PHAError(
            f"{name} is {tuple(rows.shape)}; it must be ({batch}, {tokens or 'tokens'}), with the "
            "tokens in the cache and the new ones"
        )


def token_mask(
    attention_mask: Tensor | None, with_cache: bool, with_window: Callable[[], bool]
) -> Tensor | None:
    """(B, S) bool with false where there is no token, or None where that makes no difference.

    Padding on the right comes after all that sees it; only a cache would go on from there.

    Raises:
        PHAError: padding between tokens, which would fill a window of attention; or values that
            are neither 0 nor 1, as masks to be added have them, and those that number documents.
    """
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    if torch.compiler.is_compiling():  # a graph cannot depend on what is in the mask
        return mask
    if bool((attention_mask == 1).all()):
        return None
    if bool((attention_mask != mask).any()):
        raise PHAError(
            "attention_mask holds more than 0 and 1; give 1 where there is a token, and mark "
            "packed documents by document_starts"
        )
    if not with_cache and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return None
    if with_window() and bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise PHAError("a model with a window of attention takes padding on the left only")
    return mask


def packed_starts(
    positions: Tensor | None, mask: Tensor | None, past: int | Tensor, others: Mapping[str, Any]
) -> Tensor | None:
    """Where documents begin in rows that are packed by position_ids, as collators do it.

    Args:
        positions: (B or 1, T). A document begins where they do not grow.
        mask: (B, S), 0 at padding, whose positions say nothing.
        past: tokens in the cache.
        others: further arguments of the call.

    Returns:
        (B, T) bool, or None where a row is one document.

    Raises:
        PHAError: rows packed in another way, or after tokens in a cache.
    """
    if positions is None or positions.dim() != 2:
        if packed := [name for name in ("seq_idx", "cu_seq_lens_q") if name in others]:
            raise PHAError(f"rows are packed by {packed[0]}; give position_ids or document_starts")
        return None
    if positions.shape[1] < 2 or not isinstance(past, int):
        return None
    if mask is None:
        starts = positions.diff(prepend=positions[:, :1] - 1) <= 0
    else:
        mask = mask[:, -positions.shape[1] :].bool()
        places = torch.arange(positions.shape[1], device=mask.device)
        seen = torch.where(mask, places, -1).cummax(-1).values
        before = seen.roll(1, -1)
        before[:, 0] = -1
        positions = positions.expand_as(mask)
        starts = mask & (before >= 0) & (positions <= positions.gather(1, before.clamp(min=0)))
    if torch.compiler.is_compiling():
        return None if past else starts
    if not bool(starts.any()):
        return None
    if past:
        raise PHAError(
            "position_ids start anew after tokens in a cache; give document_starts over all of them"
        )
    return starts
