"""The table of ops: which backend runs, forcing one, and the self-check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pha.bench.doctor import _check
from pha.ops import (
    OPS,
    Op,
    attention,
    diagonal_ssm,
    dss,
    gated_scan,
    in_use,
    linear_attention,
    linear_cross_entropy,
    linear_scan,
    long_convolution,
    rms_norm,
    selective_scan,
    short_convolution,
    swiglu,
    unit_rotary,
    unusual,
)
from pha.ops.backends import CHOSEN, Trial
from pha.ops.testing import relative_error
from pha.utils.errors import PHAError

CPU_BACKENDS = [
    (name, backend)
    for name, op in sorted(OPS.items())
    for backend in sorted(op.backends)
    if op.runs_on(backend, "cpu")
]

u, a = torch.ones(1, 2, 3), torch.full((3,), 0.5)
q = torch.ones(1, 2, 3, 4)
CALLS: dict[str, Callable[[], Any]] = {
    "gated_scan": lambda: gated_scan(u, u, a, a),
    "attention": lambda: attention(q, q, q),
    "dss": lambda: dss(u, a, a, a.expand(3, 3), a.expand(3, 3), a),
    "diagonal_ssm": lambda: diagonal_ssm(u, -a[:, None], a[:, None], a[:, None], a[:, None], a),
    "linear_attention": lambda: linear_attention(q, q, q),
    "linear_cross_entropy": lambda: linear_cross_entropy(u[0], u[0], torch.zeros(2).long()),
    "rms_norm": lambda: rms_norm(u, a, 1e-6, u.dtype),
    "linear_scan": lambda: linear_scan(u, u),
    "selective_scan": lambda: selective_scan(u, u, a.expand(3, 3), u, u),
    "long_convolution": lambda: long_convolution(u, a.expand(2, 3), last_state=False),
    "short_convolution": lambda: short_convolution(u, a.expand(2, 3).T, last_state=False),
    "swiglu": lambda: swiglu(u, u),
    "unit_rotary": lambda: unit_rotary(q, None, *[torch.ones(1, 3, 2)] * 2),
}


def test_every_op_has_an_oracle_and_a_default() -> None:
    assert set(OPS) == set(CALLS)
    for op in OPS.values():
        assert "naive" in op.backends
        assert set(op.preferred.values()) <= set(op.backends)
        assert op.choice("a device nobody has heard of") == op.preferred["default"]
        assert op.choice("cpu") != "naive"


@pytest.mark.parametrize("name", sorted(CALLS))
def test_forced_backend_is_the_one_that_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def spy(*arguments: Any) -> Any:
        calls.append(arguments)
        return u, u

    monkeypatch.setitem(OPS[name].backends, "spy", spy)
    with OPS[name].force("spy"):
        assert OPS[name].choice("cpu") == OPS[name].choice("cuda") == "spy"
        CALLS[name]()
    assert len(calls) == 1
    CALLS[name]()
    assert len(calls) == 1


@pytest.mark.parametrize("name", sorted(OPS))
def test_force_restores_the_choice_before_it(name: str) -> None:
    op = OPS[name]
    default = op.choice("cpu")
    with op.force("naive"):
        with op.force(default):
            assert op.choice("cpu") == default
        assert op.choice("cpu") == "naive"
    assert op.choice("cpu") == default
    with pytest.raises(ZeroDivisionError), op.force("naive"):
        raise ZeroDivisionError
    assert op.choice("cpu") == default


@pytest.mark.parametrize("name", sorted(OPS))
def test_unknown_backend_is_refused_by_name(name: str) -> None:
    op = OPS[name]
    default = op.choice("cpu")
    with pytest.raises(PHAError, match=f"{name} has no backend 'fast'.*naive"), op.force("fast"):
        pass
    assert op.choice("cpu") == default


@pytest.mark.parametrize(("name", "backend"), CPU_BACKENDS)
def test_self_check_is_small(name: str, backend: str) -> None:
    # Float32 on at most 37 steps, keys or rows: some ten units of 1.2e-7.
    assert OPS[name].self_check(backend, "cpu") <= 2e-6


WRONG: dict[str, Callable[..., Any]] = {
    "gated_scan": lambda *x: OPS["gated_scan"].backends["naive"](*x[:-1], None),
    "attention": lambda q, k, v, mask=None, window=None: OPS["attention"].backends["naive"](
        q, k, v, mask
    ),
    "dss": lambda v, *rest: OPS["dss"].backends["naive"](v, *rest[:-1]),
    "diagonal_ssm": lambda u, *rest: OPS["diagonal_ssm"].backends["naive"](u, *rest[:-1]),
    "linear_attention": lambda q, k, v, *rest: OPS["linear_attention"].backends["naive"](
        k, q, v, *rest
    ),
    "linear_cross_entropy": lambda x, w, y: OPS["linear_cross_entropy"].backends["naive"](
        x, w, y.clamp(min=0)
    ),
    "rms_norm": lambda x, gain, *rest: OPS["rms_norm"].backends["naive"](x, gain.flip(0), *rest),
    "linear_scan": lambda *x: OPS["linear_scan"].backends["naive"](*x[:-1], None),
    "selective_scan": lambda *x: OPS["selective_scan"].backends["naive"](*x[:-1], None),
    "long_convolution": lambda x, kernel, starts, T: OPS["long_convolution"].backends["naive"](
        x, kernel, None, T
    ),
    "short_convolution": lambda x, *rest: OPS["short_convolution"].backends["naive"](
        x, *rest[:-1], None
    ),
    "swiglu": lambda gate, up: OPS["swiglu"].backends["naive"](up, gate),
    "unit_rotary": lambda x, scales, cos, sin: OPS["unit_rotary"].backends["naive"](
        x, scales, cos, -sin
    ),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_self_check_sees_a_wrong_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS[name].backends, "wrong", WRONG[name])
    assert OPS[name].self_check("wrong", "cpu") > 1e-2


def test_self_check_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(gate: torch.Tensor, value: torch.Tensor, a: torch.Tensor, *rest: Any) -> Any:
        return OPS["gated_scan"].backends["naive"](gate, value, a.detach() + 0 * a, *rest)

    monkeypatch.setitem(OPS["gated_scan"].backends, "wrong", detached)
    assert OPS["gated_scan"].self_check("wrong", "cpu") > 0.1


def test_a_backend_of_one_device_is_preferred_on_no_other() -> None:
    assert OPS["gated_scan"].runs_on("triton", "cuda")
    assert not OPS["gated_scan"].runs_on("triton", "cpu")
    assert OPS["gated_scan"].runs_on("torch", "cuda")
    for op in OPS.values():
        assert all(op.runs_on(op.choice(device), device) for device in ("cpu", "cuda", "mps"))


def test_a_new_op_enters_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Op("double", {"naive": lambda x: 2 * x}, {"default": "naive"}, lambda *_: 0.0)
    try:
        assert OPS["double"] is op
        assert op("cpu")(3) == 6
    finally:
        del OPS["double"]


def test_what_runs_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    said = in_use("cpu")
    assert set(said) == set(OPS)
    assert said["attention"] == "sdpa"
    assert said["linear_attention"] == "chunked (naive for one step)"
    with OPS["gated_scan"].force("naive"):
        assert in_use("cpu")["gated_scan"] == "naive"
        assert unusual("cpu") == "gated_scan naive, all others in plain torch"
    assert unusual("cpu") == "all in plain torch"
    monkeypatch.setitem(OPS["swiglu"].trials, "torch", Trial(lambda _: math.nan, 1.0))
    monkeypatch.setattr(OPS["swiglu"], "faults", {})
    assert in_use("cpu")["swiglu"] == "torch cannot run: it is off by nan"
    monkeypatch.setenv(CHOSEN, "swiglu=naive")
    assert in_use("cpu")["swiglu"] == "naive"


def test_the_environment_chooses_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOSEN, "gated_scan=naive, attention=naive")
    assert OPS["gated_scan"].choice("cpu") == OPS["attention"].choice("cuda") == "naive"
    assert OPS["rms_norm"].choice("cpu") == "torch"
    with OPS["gated_scan"].force("torch"):
        assert OPS["gated_scan"].choice("cpu") == "torch"
    monkeypatch.setenv(CHOSEN, "")
    assert OPS["gated_scan"].choice("cpu") == "torch"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("scan=torch", "there is no op 'scan'; .*gated_scan"),
        ("gated_scan=fast", "gated_scan has no backend 'fast'; it has naive, torch, triton"),
        ("gated_scan", "write OP=BACKEND"),
        ("gated_scan=torch,", "write OP=BACKEND"),
    ],
)
def test_what_the_environment_may_not_say(
    text: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHOSEN, text)
    with pytest.raises(PHAError, match=complaint):
        gated_scan(u, u, a, a)


def test_a_graph_of_the_compiler_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOSEN, "swiglu=naive")
    monkeypatch.setitem(OPS["swiglu"].backends, "naive", lambda gate, up: gate + up)
    compiled = torch.compile(lambda x: swiglu(x, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


def failing(error: Callable[[torch.device], float]) -> Op:
    """An op whose kernel is tried by `error`; not in the table of the others."""
    backends = {"naive": torch.sin, "torch": torch.sin, "triton": torch.sin}
    op = Op("sine", backends, {"default": "triton"}, lambda *_: 0.0)
    del OPS["sine"]
    op.trials["triton"] = Trial(error, 1e-5)
    return op


def test_a_kernel_is_tried_once_with_gradients_and_without_rounding() -> None:
    tried = []

    def error(device: torch.device) -> float:
        x = torch.ones(3, 3, device=device, requires_grad=True)
        (dx,) = torch.autograd.grad((x @ x).sum(), x)
        assert dx.dtype == (x @ x).dtype == torch.float32
        tried.append(device)
        return 0.0

    op = failing(error)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            op.require("triton", u)
    assert tried == [u.device]
    op.require("torch", u)  # which has no trial


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (lambda _: 1e-2, "it is off by 0.01"),
        (lambda _: math.nan, "it is off by nan"),
        (lambda _: __import__("no_triton"), "ModuleNotFoundError: No module named 'no_triton'"),
    ],
)
def test_a_kernel_that_fails_is_an_error_with_its_remedy(error: Any, reason: str) -> None:
    op = failing(error)
    remedy = "set PHA_BACKENDS=sine=torch to compute it in plain torch"
    for _ in range(2):
        with pytest.raises(PHAError) as raised:
            op.require("triton", u)
        said = f"sine: its kernel triton fails on cpu ({reason}); {remedy}"
        assert str(raised.value) == said
    assert op.describe("cpu") == f"triton cannot run: {reason}"


def test_a_device_that_a_trial_has_broken_is_not_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every later call would fail, with a message about something else."""

    def breaks(device: torch.device) -> float:
        def gone(*_: Any, **__: Any) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch, "zeros", gone)
        raise RuntimeError("CUDA error")

    with pytest.raises(
        PHAError, match=r"sine: .* triton has left cpu unusable .*PHA_BACKENDS=sine=torch"
    ):
        failing(breaks).require("triton", u)


def test_what_has_to_be_asked_for_is_neither_used_nor_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    op = failing(lambda _: 0.0)
    trial = Trial(lambda _: pytest.fail("is tried"), 1.0)
    op.add("theirs", torch.cos, "cpu", trial, "slowly", if_asked=True)
    assert op.choice("cpu") == "triton"
    assert not op.is_at_hand("theirs", "cpu")
    monkeypatch.setitem(OPS, "sine", op)
    assert _check(op, "theirs", "cpu")["reason"] == "not asked for: PHA_BACKENDS=sine=theirs"
    monkeypatch.setenv(CHOSEN, "sine=theirs")
    assert op.choice("cpu") == "theirs"
    assert op.is_at_hand("theirs", "cpu")


def test_no_trial_within_a_graph_of_the_compiler_or_on_tensors_without_values() -> None:
    op = failing(lambda _: 1.0)

    def step(x: torch.Tensor) -> torch.Tensor:
        op.require("triton", x)
        return x.sin()

    torch.compile(step, backend="eager", fullgraph=True)(torch.ones(3))
    with FakeTensorMode():
        step(torch.ones(3))
    assert not op.faults


def test_a_backend_that_writes_nan_is_not_right() -> None:
    def bad(x: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(5) == 3, torch.nan, x)

    x = torch.ones(5)
    assert math.isnan(relative_error(lambda x: (x, bad(x)), lambda x: (x, x), x))
    assert relative_error(lambda x: (x, x), lambda x: (x, x), x) < 1e-6
