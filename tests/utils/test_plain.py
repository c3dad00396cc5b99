"""Whether modules do what their classes say and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from pha.utils.plain import Plain, is_plain_linear, nothing_intercepts

FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Sequential, nn.Linear, nn.Dropout)
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout(0.5))


def no_longer(linear: nn.Linear) -> nn.Linear:
    class Louder(nn.Linear):
        pass

    linear.__class__ = Louder
    return linear


def replaced(linear: nn.Linear) -> nn.Linear:
    original = linear.forward
    linear.forward = lambda input: 2 * original(input)  # type: ignore[method-assign]
    return linear


def quantised(linear: nn.Linear) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(
        nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8
    )[0]


class Scaled(torch.Tensor):
    """A subclass, as quantised weights are."""


def subclass(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Scaled))
    return linear


def hooked(linear: nn.Linear, name: str) -> nn.Linear:
    getattr(linear, f"register_{name}")(lambda *_: None)
    return linear


OBSTACLES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "subclass": no_longer,
    "forward": replaced,
    "forward hook": lambda x: hooked(x, "forward_hook"),
    "forward pre-hook": lambda x: hooked(x, "forward_pre_hook"),
    "backward hook": lambda x: hooked(x, "full_backward_hook"),
    "backward pre-hook": lambda x: hooked(x, "full_backward_pre_hook"),
    "offloaded": lambda x: cpu_offload(x, execution_device=torch.device("cpu")),
    "quantised": quantised,
    "quantised weight": subclass,
    "weight norm": lambda x: parametrizations.weight_norm(x),
    "pruned": lambda x: prune.l1_unstructured(x, "weight", 1),
    "elsewhere": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_stands_in_between_is_seen(what: str) -> None:
    model = network()
    watched = Plain([model], FORWARDS, {})
    assert watched.holds()
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    assert is_plain_linear(linear)
    model[0] = OBSTACLES[what](linear)
    assert not is_plain_linear(model[0])
    assert not watched.holds()
    assert not Plain([model], FORWARDS, {}).holds()


@pytest.fixture
def anyones_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@pytest.mark.usefixtures("anyones_hook")
def test_a_hook_on_all_modules_is_seen() -> None:
    assert not is_plain_linear(network()[0])
    assert not Plain([network()], FORWARDS, {}).holds()


def test_a_forward_that_is_replaced_for_all_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert not is_plain_linear(network()[0])
    assert not Plain([network()], FORWARDS, {}).holds()


@pytest.mark.parametrize("how", ["module", "parameter", "data", "setting", "removed"])
def test_what_was_exchanged_is_seen(how: str) -> None:
    model = network()
    watched = Plain([model], FORWARDS, {nn.Dropout: ("p",)})
    if how == "module":
        model[0] = nn.Linear(3, 3, bias=False)
    elif how == "parameter":
        model[0].weight = nn.Parameter(torch.ones(3, 3))
    elif how == "data":
        model[0].weight.data = torch.ones(3, 3)
    elif how == "setting":
        dropout = model[1]
        assert isinstance(dropout, nn.Dropout)
        dropout.p = 0.25
    else:
        del model[1]
    assert not watched.holds()


def test_modes_and_transforms_that_look_at_tensors_are_seen() -> None:
    assert nothing_intercepts()
    with FlopCounterMode(display=False):
        assert not nothing_intercepts()
    torch.vmap(lambda x: (torch.testing.assert_close(nothing_intercepts(), False), x)[1])(
        torch.ones(2)
    )
