"""On Apple's MPS, which has no float64, what needs it is computed on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pha.modeling import PHAConfig, PHAForCausalLM
from pha.ops import OPS

DOUBLE = (torch.float64, torch.complex128)
ANGLES = importlib.import_module("pha.model.backbone")
OPS_OF_MODES = ("dss", "diagonal_ssm")
MODELS = ("mehta-gss-only-tiny", "s4d-tiny", "hyena-tiny", "h3-tiny")


class NoDouble(TorchDispatchMode):
    """An error where float64 comes from anything but `wide`, or meets what could be on MPS."""

    opened = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        kinds = {x.dtype in DOUBLE for x in given if x.is_floating_point() or x.is_complex()}
        made = any(x.dtype in DOUBLE for x in tree_leaves(output) if isinstance(x, Tensor))
        if made and not self.opened:
            assert kinds == {True}, f"{func} makes float64"
        assert kinds != {True, False}, f"{func} mixes types"
        return output


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoDouble]:
    mode = NoDouble()

    def opening(function: Callable[..., Any]) -> Callable[..., Any]:
        def opened(*given: Any) -> Any:
            mode.opened = True
            try:
                return function(*given)
            finally:
                mode.opened = False

        return opened

    # The angles of attention are computed on the CPU too.
    monkeypatch.setattr(ANGLES, "rotary_angles", opening(ANGLES.rotary_angles))
    for name in ("ops.dss", "ops.diagonal_ssm", "mixers.common", "mixers.h3", "mixers.s4d"):
        monkeypatch.setattr(
            importlib.import_module(f"pha.{name}"), "wide", opening(torch.Tensor.double)
        )
    with mode, torch.no_grad():
        yield mode


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("backend", ["naive", "fft"])
@pytest.mark.parametrize("op", OPS_OF_MODES)
def test_state_spaces_make_float64_in_one_place(
    op: str, backend: str, length: int, watched: NoDouble
) -> None:
    B, C, N = 2, 3, 4
    modes = (N,) if op == "dss" else (C, N)
    inputs = [torch.rand(B, length, C), -torch.rand(modes), torch.rand(modes)]
    inputs += [torch.rand(C, N), torch.rand(C, N), torch.rand(C), torch.rand(B, C, N, 2)]
    starts = torch.zeros(B, length, dtype=torch.bool)
    y, h = OPS[op].backends[backend](*inputs, starts, True, torch.full((B,), length))
    assert y.dtype == h.dtype == torch.float32


@pytest.mark.parametrize("preset", MODELS)
def test_models_of_state_spaces_make_float64_in_one_place(preset: str, watched: NoDouble) -> None:
    fields = {"vocab_size": 17, "num_hidden_layers": 1}
    model = PHAForCausalLM(PHAConfig.from_preset(preset, **fields)).eval()
    cache = model(torch.arange(9).view(1, -1)).past_key_values
    model(torch.arange(1).view(1, -1), past_key_values=cache)


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs Apple's MPS")
@pytest.mark.parametrize("preset", ["pha-tiny", "retnet-tiny", "gated-deltanet-tiny", *MODELS])
def test_the_model_on_mps_is_that_of_a_cpu(preset: str) -> None:
    ids, results = torch.arange(40).view(2, -1) % 17, []
    for device in ("cpu", "mps"):
        torch.manual_seed(0)
        fields = {"vocab_size": 17, "num_hidden_layers": 2}
        model = PHAForCausalLM(PHAConfig.from_preset(preset, **fields)).to(device)
        x = ids.to(device)
        loss = model(x, labels=x).loss
        loss.backward()
        gradients = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach().cpu(), gradients))
    (a, da), (b, db) = results
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    for x, y in zip(da, db, strict=True):
        assert (x - y).abs().max() <= 2e-3 * x.abs().max() + 1e-6
