"""The kernels of flash-linear-attention: how they are called, and their values on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pha.ops import OPS
from pha.ops.linear_attention import fla
from pha.ops.linear_attention.chunked import linear_attention_chunked
from pha.ops.linear_attention.naive import linear_attention_naive
from pha.utils.errors import PHAError


def stand_in(takes_decay: bool, takes_strength: bool) -> Callable[..., Any]:
    """A kernel of the package by its documented contract: one sequence after the other."""

    def kernel(
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float,
        initial_state: Tensor,
        output_final_state: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert (beta is not None) == takes_strength
        assert g is None or takes_decay
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert q.shape[2] == v.shape[2]
        assert (scale, output_final_state) == (1.0, True)
        if cu_seqlens is None:
            return linear_attention_naive(q, k, v, g, beta, initial_state)
        assert q.shape[0] == 1
        bounds = cu_seqlens.tolist()
        assert len(initial_state) == len(bounds) - 1
        outputs, lasts = [], []
        for number, (a, b) in enumerate(pairwise(bounds)):
            decay, strength = (None if x is None else x[:, a:b] for x in (g, beta))
            rows, state = (q[:, a:b], k[:, a:b], v[:, a:b]), initial_state[number : number + 1]
            y, last = linear_attention_naive(*rows, decay, strength, state)
            outputs.append(y)
            lasts.append(last)
        return torch.cat(outputs, 1), torch.cat(lasts)

    return kernel


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, decay, strength in (
        ("simple_gla", "chunk_simple_gla", True, False),
        ("gla", "chunk_gla", True, False),
        ("delta_rule", "chunk_delta_rule", False, True),
        ("gated_delta_rule", "chunk_gated_delta_rule", True, True),
    ):
        made = ModuleType(f"fla.ops.{module}")
        setattr(made, name, stand_in(decay, strength))
        monkeypatch.setitem(sys.modules, f"fla.ops.{module}", made)
    for parent in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setattr(OPS["linear_attention"], "faults", {})
    monkeypatch.setitem(OPS["linear_attention"].trials, "fla", fla.TRIAL)


def problem(decay: str, strength: bool, documents: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(len(decay) + 10 * strength)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    B, T, G, H, K, P = 3, 41, 2, 4, 8, 5
    q, k = normal(B, T, G, K), F.normalize(normal(B, T, G, K), dim=-1)
    g = {"none": None, "head": normal(B, T, H), "channel": normal(B, T, H, K)}[decay]
    starts = torch.rand(B, T, generator=generator) < 0.1
    starts[:, 0] = torch.tensor([True, False, False])
    return (
        *(x.bfloat16() for x in (q, k, normal(B, T, H, P))),
        None if g is None else F.logsigmoid(g),
        normal(B, T, H).sigmoid().bfloat16() if strength else None,
        normal(B, H, K, P),
        starts if documents else None,
    )


FORMS = [("none", False), ("head", False), ("channel", False), ("none", True), ("head", True)]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("decay", "strength"), FORMS)
@pytest.mark.parametrize("documents", [False, True])
def test_rows_documents_and_states_reach_the_kernels(
    decay: str, strength: bool, documents: bool
) -> None:
    inputs = problem(decay, strength, documents)
    y, last = fla.linear_attention_fla(*inputs)
    expected, last_expected = linear_attention_chunked(*inputs)
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(last, last_expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("package")
def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sys.modules["fla.ops.gla"].chunk_gla

    def wrong(**inputs: Any) -> tuple[Tensor, Tensor]:
        y, last = right(**inputs)
        return 1.1 * y, last

    monkeypatch.setattr(sys.modules["fla.ops.gla"], "chunk_gla", wrong)
    inputs = problem("channel", False, False)
    with pytest.raises(PHAError, match=r"fla fails on cpu .*PHA_BACKENDS=linear_attention=chunked"):
        fla.linear_attention_fla(*inputs)


@pytest.mark.parametrize("form", ["float32", "a decay per channel in the delta rule"])
def test_what_the_kernels_do_not_take_goes_through_torch(form: str) -> None:
    q, k, v, g, beta, *rest = problem("channel", form != "float32", True)
    if form == "float32":
        q, k, v = q.float(), k.float(), v.float()
    y, _ = fla.linear_attention_fla(q, k, v, g, beta, *rest)
    assert torch.equal(y, linear_attention_chunked(q, k, v, g, beta, *rest)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not fla.is_installed(), reason="needs flash-linear-attention")
def test_the_kernels_agree_on_a_gpu() -> None:
    assert OPS["linear_attention"].fault("fla", "cuda") is None
