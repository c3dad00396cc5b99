"""The linear scan in Triton, on a GPU or interpreted: both forms against the oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, linear_scan
from pha.ops.gated_scan import triton as cut
from pha.ops.gated_scan.sizes import Sizes
from pha.ops.linear_scan import linear_scan_naive, linear_scan_operator
from pha.ops.linear_scan import triton as triton_scan
from pha.utils.errors import PHAError
from tests.ops.common import INTERPRETED, Inputs, converted, device_of, errors, moved, outcome
from tests.ops.common import kernels as marks

pytestmark = marks
OP, DEVICE = OPS["linear_scan"], device_of("triton")
SIZES = Sizes(unroll=2, shortest=4) if INTERPRETED else Sizes()
SHAPES = (
    [(1, 1, 1), (3, 2, 19), (2, 13, 19), (1, 9, 130)]
    if INTERPRETED
    else [(1, 1, 1), (3, 130, 130), (2, 1025, 1000), (1, 8192, 768), (300, 64, 1030)]
)
each_form = pytest.mark.parametrize("form", ["sequential", "chunked"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cut, triton_scan):
        monkeypatch.setattr(module, "sizes_of", lambda _: SIZES)
    if INTERPRETED:  # `test_a_wrong_kernel_is_found` does the trial of the first use
        monkeypatch.setitem(OP.faults, ("triton", torch.device("cpu")), None)


def problem(B: int, T: int, n: int, share: float = 0.1, h0: bool = True) -> Inputs:
    """In float32; every ninth decay is 0, as what forgets all has it, and some are negative."""
    generator = torch.Generator().manual_seed(100 * T + n)
    a = (3 * torch.randn(B, T, n, generator=generator)).sigmoid()
    a.view(-1)[::5] *= -1
    a.view(-1)[::9] = 0
    inputs: Inputs = {"u": torch.randn(B, T, n, generator=generator), "a": a}
    if h0:
        inputs["h0"] = torch.randn(B, n, generator=generator)
    if share:
        inputs["starts"] = torch.rand(B, T, generator=generator) < share
    return inputs


def exact(inputs: Inputs) -> dict[str, Tensor]:
    return outcome(linear_scan_naive, converted(inputs, torch.float64))


@each_form
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("share", "h0"), [(0.0, False), (0.0, True), (0.1, True), (1.0, False)])
def test_values_and_gradients(
    form: str, shape: tuple[int, int, int], share: float, h0: bool
) -> None:
    inputs = problem(*shape, share, h0)
    found = outcome(functools.partial(linear_scan_operator, form=form), moved(inputs, DEVICE))
    sizes = {"da": 1.0} if shape[1] == 1 else {}  # of one step without h0 there is none
    assert max(errors(found, exact(inputs), sizes).values()) <= 1e-5


@each_form
def test_half_precision_rounds_once(form: str) -> None:
    """Decays stay in float32, as mixers have them; states are rounded where they are stored."""
    inputs = problem(2, 13, 38)
    inputs["u"] = inputs["u"].bfloat16()
    found = outcome(functools.partial(linear_scan_operator, form=form), moved(inputs, DEVICE))
    # The gradient of the decays has the states before, as they were rounded.
    wrong = errors(found, exact(inputs))
    assert wrong.pop("last") <= 1e-5
    assert wrong.pop("dh0") <= 1e-5
    assert max(wrong.values()) <= (2 if INTERPRETED else 1) * 2**-7  # it cuts off


@each_form
def test_any_layout(form: str) -> None:
    inputs = problem(2, 13, 22)
    function = functools.partial(linear_scan_operator, form=form)
    plain = outcome(function, moved(inputs, DEVICE))
    wide = torch.cat([inputs["u"], inputs["a"]], -1)
    for name, view in (
        ("u", wide[..., :22]),
        ("a", wide[..., 22:]),
        ("u", inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)),
        ("a", inputs["a"].transpose(0, 1).contiguous().transpose(0, 1)),
    ):
        found = outcome(function, moved(inputs | {name: view}, DEVICE))
        assert max(errors(found, plain).values()) == 0


@each_form
def test_nothing_crosses_a_start(form: str) -> None:
    """Neither a number nor what is none, whichever chunk it is in."""
    inputs = problem(1, 13, 19, 0.0)
    starts = torch.zeros(1, 13, dtype=torch.bool)
    starts[:, 9] = True
    function = functools.partial(linear_scan_operator, form=form, starts=starts.to(DEVICE))
    given = moved(inputs, DEVICE)
    h, last = function(given["u"], given["a"], given["h0"])
    for name in ("u", "a"):
        broken = given | {name: given[name].clone()}
        broken[name][:, 2] = torch.nan
        h_broken, last_broken = function(broken["u"], broken["a"], broken["h0"])
        assert torch.equal(h_broken[:, 9:], h[:, 9:])
        assert torch.equal(last_broken, last)
        assert h_broken[:, 2:9].isnan().all()


@each_form
@pytest.mark.parametrize("B", [1, 2])
def test_negative_decays_after_a_start(form: str, B: int) -> None:
    """A chunk that holds a start keeps nothing of what comes in, whatever follows."""
    inputs = problem(B, 21, 5, 0.0)
    inputs["a"] = -inputs["a"]
    inputs["starts"] = torch.zeros(B, 21, dtype=torch.bool)
    inputs["starts"][0, 5] = True
    found = outcome(functools.partial(linear_scan_operator, form=form), moved(inputs, DEVICE))
    assert max(errors(found, exact(inputs)).values()) <= 1e-5


def test_it_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given = moved(problem(2, 13, 19), DEVICE)
    assert OP.choice("cuda") == "torch"

    def fail(*_: object) -> None:
        raise RuntimeError("it ran")

    monkeypatch.setitem(OP.kernels, "forward", fail)
    linear_scan(**given)
    with OP.force("triton"), pytest.raises(RuntimeError, match="it ran"):
        linear_scan(**given)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP, "faults", {})
    assert OP.fault("triton", DEVICE) is None
    right = triton_scan.scan_backward
    wrong = lambda *x: tuple(1.001 * y for y in right(*x))  # noqa: E731
    monkeypatch.setattr(triton_scan, "scan_backward", wrong)
    monkeypatch.setattr(OP, "faults", {})
    assert OP.fault("triton", DEVICE) == "it is off by 0.001"
    with OP.force("triton"), pytest.raises(PHAError, match="linear_scan=torch to compute it"):
        linear_scan(**moved(problem(2, 13, 19), DEVICE))
