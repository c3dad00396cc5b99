"""Linear attention by the Triton kernels of flash-linear-attention, where that is installed.

They multiply in bf16 or fp16 and accumulate in float32. Float32 inputs stay with the chunked form:
the kernels would round them to TF32 (sums), or refuse them (the delta rule). They run where
`PHA_BACKENDS=linear_attention=fla` asks for them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops.backends import OPS, Trial
from pha.ops.linear_attention.chunked import linear_attention_chunked
from pha.ops.testing import random_numbers, relative_error

LARGEST_KEY = 256  # channels that one program holds


def is_installed() -> bool:
    """Whether the package is there; it is an extra."""
    return find_spec("fla") is not None


def linear_attention_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels where they apply, the chunked form elsewhere; see `pha.ops.linear_attention`."""
    by_channel = g is not None and g.dim() == 4
    fits = v.dtype in (torch.bfloat16, torch.float16) and q.shape[3] <= LARGEST_KEY
    if not fits or (by_channel and beta is not None):
        return linear_attention_chunked(q, k, v, g, beta, h0, starts)
    OPS["linear_attention"].require("fla", v)
    return _run(q, k, v, g, beta, h0, starts)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels themselves; documents go through them as one row with boundaries."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    (B, T, H, P), K = v.shape, k.shape[3]
    q, k = (x.to(v.dtype).repeat_interleave(H // x.shape[2], 2) for x in (q, k))
    inputs = {"q": q, "k": k, "v": v}
    if g is not None:
        inputs["g"] = g.float()
    if beta is not None:
        inputs["beta"] = beta.to(v.dtype)
    kernel = chunk_gla if g is not None and g.dim() == 4 else chunk_simple_gla
    if beta is not None:
        kernel = chunk_delta_rule if g is None else chunk_gated_delta_rule
    h0 = v.new_zeros(B, H, K, P, dtype=torch.float32) if h0 is None else h0.float()
    options = {"scale": 1.0, "output_final_state": True}
    if starts is None:
        y, last = kernel(**inputs, initial_state=h0, **options)
        return y, last
    # A row is a sequence too. Its first document goes on from h0, unless it begins in this row.
    begins = starts.clone()
    begins[:, 0] = True
    first = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=B * T)
    rows = first[:-1] // T
    goes_on = (first[:-1] % T == 0) & ~starts[:, 0][rows]
    state = torch.where(goes_on[:, None, None, None], h0[rows], 0)
    flat = {name: x.flatten(0, 1).unsqueeze(0) for name, x in inputs.items()}
    y, last = kernel(**flat, initial_state=state, cu_seqlens=first, **options)
    return y.view(B, T, H, P), last[begins.sum(1).cumsum(0) - 1]


def _largest_error(device: torch.device) -> float:
    """Of all four kernels, with and without documents, against the chunked form in float64."""
    normal, uniform = random_numbers(device)
    B, T, H, K, P = 2, 100, 2, 32, 64
    rounded = [
        x.bfloat16().float()
        for x in (normal(B, T, H, K) / K**0.5, F.normalize(normal(B, T, H, K), dim=-1))
    ]
    v, h0 = normal(B, T, H, P).bfloat16().float(), normal(B, H, K, P)
    starts = uniform(B, T) < 0.05
    head, channel = F.logsigmoid(normal(B, T, H)), F.logsigmoid(normal(B, T, H, K))
    strength = normal(B, T, H).sigmoid().bfloat16().float()

    def error(g: Tensor | None, beta: Tensor | None, where: Tensor | None) -> float:
        given = {name: x for name, x in (("g", g), ("beta", beta)) if x is not None}

        def kernels(q: Tensor, k: Tensor, v: Tensor, h0: Tensor, *rest: Tensor) -> Any:
            others = dict(zip(given, rest, strict=True))
            q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
            return _run(q, k, v, **others, h0=h0, starts=where)

        def chunked(q: Tensor, k: Tensor, v: Tensor, h0: Tensor, *rest: Tensor) -> Any:
            others = dict(zip(given, rest, strict=True))
            return linear_attention_chunked(q, k, v, **others, h0=h0, starts=where)

        return relative_error(kernels, chunked, *rounded, v, h0, *given.values())

    cases = [(None, None), (head, None), (channel, None), (None, strength), (head, strength)]
    return max(error(*case, where) for case in cases for where in (None, starts))


TRIAL = Trial(_largest_error, 3e-2)  # of the largest magnitude, in bf16 against float64
if is_installed():
    _LIMITS = "chunked for float32, and for the delta rule with a decay per channel"
    # Not by itself: on an H200 processes that were to try it took minutes, and three ended in an
    # illegal access. See docs/gpu.md, also for what is not known.
    OPS["linear_attention"].add("fla", linear_attention_fla, "cuda", TRIAL, _LIMITS, if_asked=True)
