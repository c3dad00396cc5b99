"""What the state spaces of complex modes share, whether channels share the modes or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pha.ops.precision import accumulation_type, narrow
from pha.ops.visible import VisibleFirst
from pha.utils.errors import PHAError

Run = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]
"""Of v (B, T, H), starts (B, T) and how many (B,) steps of each row there are: y and h."""


def run_visible(
    run: Run, v: Tensor, starts: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Run over the visible steps, outside of autocast: y (B, T, H), the state (B, H, N, 2)."""
    with torch.autocast(v.device.type, enabled=False):
        if mask is None:
            return run(v, starts, None)
        visible = VisibleFirst(mask)
        front = None if starts is None else visible.front_starts(starts)
        y, last = run(visible.front(v), front, visible.count)
        if last is not None and starts is not None:
            last = last.masked_fill(visible.ends_empty(starts).view(-1, 1, 1, 1), 0.0)
        return visible.back(y), last


def step_by_step(
    v: Tensor,
    decay: Tensor,
    C: Tensor,
    D: Tensor,
    h0: Tensor | None,
    starts: Tensor | None,
    last_state: bool,
    count: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """h_t = decay h_{t-1} + v_t and y_t = Re(sum_n C_n h_{t,n}) + D v_t as written.

    decay is (N,) or (H, N), and C (H, N), both complex. The state stays after the first `count`
    (B,) steps of each row.
    """
    dtype = accumulation_type(v)
    h = C.new_zeros(v.shape[0], *C.shape) if h0 is None else as_complex(h0, dtype)
    outputs = []
    for t in range(v.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], 0.0, h)
        v_t = v[:, t].to(dtype)
        step = decay * h + v_t.unsqueeze(-1)
        h = step if count is None else torch.where((t < count).view(-1, 1, 1), step, h)
        outputs.append((C * h).sum(-1).real + D.to(dtype) * v_t)
    y = torch.stack(outputs, dim=1) if outputs else v
    return y.to(v.dtype), torch.view_as_real(h) if last_state else None


def as_complex(h: Tensor, dtype: torch.dtype) -> Tensor:
    """Real and imaginary parts (..., 2), in `dtype`, as complex numbers (...)."""
    return torch.view_as_complex(h.to(dtype).contiguous())


def one_length(op: str, T: int) -> None:
    """Refuse a number of steps that is not known.

    Raises:
        PHAError: T is symbolic.
    """
    if isinstance(T, torch.SymInt):
        raise PHAError(f"{op}: the form of its Fourier transform is of one length; export that one")


def last_document(v: Tensor, starts: Tensor | None, count: Tensor | None) -> Tensor:
    """v (B, T, H) with zeros for all before the last document of each row.

    Of the first `count` (B,) steps of each row where that is given; they then come last.
    """
    if starts is not None:
        from_here_on = starts.flip(1).cumsum(1).flip(1)
        ended = (from_here_on - starts.to(from_here_on.dtype)) > 0
        v = v.masked_fill(ended.unsqueeze(-1), 0.0)
    if count is not None:
        T = v.shape[1]
        place = torch.arange(T, device=v.device) - (T - count)[:, None]
        v = v.take_along_dim(place.clamp(min=0).unsqueeze(-1), 1)
        v = v.masked_fill((place < 0).unsqueeze(-1), 0.0)
    return v


def carried_to_the_end(
    h0: Tensor, Lambda: Tensor, T: int, starts: Tensor | None, count: Tensor | None
) -> Tensor:
    """exp(Lambda T) h0, (B, H, N, 2); Lambda complex128 and `count` (B,) in place of T if given."""
    B, state = h0.shape[0], as_complex(h0, h0.dtype)
    steps = torch.full((B,), T, device=Lambda.device) if count is None else count.to(Lambda.device)
    decay = narrow((Lambda * steps.view(-1, 1, 1)).exp(), state)
    carried = torch.view_as_real(decay * state)
    return carried if starts is None else carried.masked_fill(starts.any(1).view(B, 1, 1, 1), 0.0)
