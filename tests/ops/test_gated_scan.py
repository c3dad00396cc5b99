"""The scan with its gated input: every backend against the equation, values and all gradients."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.ops import OPS, gated_scan
from pha.ops.gated_scan import trial
from pha.ops.gated_scan import triton as triton_scan
from pha.ops.gated_scan.operator import gated_scan_operator
from pha.ops.gated_scan.sizes import Sizes
from pha.utils.errors import PHAError
from tests.ops.common import (
    INTERPRETED,
    Function,
    Inputs,
    converted,
    cpu_backends,
    device_of,
    errors,
    gradcheck,
    in_pieces,
    is_rounded_once,
    is_triton,
    kernels,
    magnitudes,
    moved,
    on_a_gpu,
    outcome,
    starts_of,
    with_marks,
    worst,
)

OP = OPS["gated_scan"]
BACKENDS = cpu_backends("gated_scan")
FORMS = ["triton-sequential", "triton-chunked"]
SHAPES = [(1, 1, 1), (2, 63, 17), (4, 7, 33), (3, 500, 5)]
# The interpreter takes milliseconds a step and block of states: chunks are of four steps there.
SIZES = Sizes(unroll=2, shortest=4) if INTERPRETED else Sizes()
TRITON_SHAPES = (
    [(1, 1, 1), (3, 2, 19), (1, 13, 19), (1, 7, 130)]
    if INTERPRETED
    else [(3, 130, 130), (1, 1, 1), (2, 1025, 1000), (1, 8192, 768), (300, 64, 1030)]
)
CHUNKS = (2, 2 * SIZES.shortest + 2, 19)  # of which the last is not full
# Of the largest magnitude, in float32. Interpreted bfloat16 is cut off, not rounded.
TRITON_LIMIT = 1e-5

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fast_backend = pytest.mark.parametrize("backend", BACKENDS[1:])
each_backend_and_triton = pytest.mark.parametrize(
    "backend", [*map(with_marks, [*BACKENDS, "triton-chunked"])]
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (triton_scan, trial):
        monkeypatch.setattr(module, "sizes_of", lambda _: SIZES)
    if INTERPRETED:  # `test_a_wrong_kernel_is_found` does the trial of the first use
        monkeypatch.setitem(OP.faults, ("triton", torch.device("cpu")), None)


def backend_function(name: str) -> Function:
    if name in FORMS:
        return functools.partial(gated_scan_operator, form=name.removeprefix("triton-"))
    return OP.backends[name]


def problem(
    B: int,
    T: int,
    n: int,
    flags: str = "nowhere",
    with_h0: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Inputs by name: numbers of float32 (gate and value of `dtype`, if that is narrower)."""
    generator = torch.Generator().manual_seed(1000 * B + 10 * T + n)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    a = 0.1 + 0.899 * torch.rand(n, generator=generator)
    a[-1] = 0.999
    inputs = {
        "gate": (3 * torch.randn(B, T, n, generator=generator)).to(dtype),
        "value": torch.randn(B, T, n, generator=generator).to(dtype),
        "a": a.to(state),
        "b": (1 - a.double() ** 2).sqrt().float().to(state),
        "h0": torch.randn(B, n, generator=generator).to(state),
    }
    if not with_h0:
        del inputs["h0"]
    if flags != "nowhere":
        inputs["starts"] = starts(flags, B, T, n)
    return inputs


def starts(where: str, B: int, T: int, n: int) -> Tensor:
    if where == "everywhere":
        return torch.ones(B, T, dtype=torch.bool)
    marks = torch.zeros(B, T, dtype=torch.bool)
    if where == "first":
        marks[:, 0] = True
    elif where == "borders":  # of the chunks: their first steps, and their last ones
        length = triton_scan.chunk_length(B, T, n, 1, "chunked", SIZES)
        marks[:, length::length] = marks[:, length - 1 :: length] = True
    else:
        marks = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.2
        marks[0, 2:5] = True  # side by side
    return marks


@functools.cache
def oracle(*case: Any, device: torch.device) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the equation says in float64, and the size against which errors are measured.

    The gradients of a and b are sums of terms of both signs: their size is that of the terms'.
    """
    inputs = converted(problem(*case), torch.float64)
    exact = outcome(backend_function("naive"), moved(inputs, device))
    g = exact["dvalue"] / (inputs["gate"].sigmoid() * inputs["b"])
    terms = {"da": g * exact["y"], "db": exact["dvalue"] * inputs["value"] / inputs["b"]}
    sizes = {name: float(x.abs().sum((0, 1)).max().clamp_min(1e-30)) for name, x in terms.items()}
    return exact, magnitudes(exact) | sizes


CASES = [
    (backend, shape, flags, with_h0)
    for backend in BACKENDS
    for shape in SHAPES
    for flags in ("nowhere", "somewhere")
    for with_h0 in (False, True)
]
CASES += [
    (backend, (2, 9, 5), flags, True) for backend in BACKENDS for flags in ("first", "everywhere")
]
CASES += [(form, shape, "somewhere", True) for form in FORMS for shape in TRITON_SHAPES]
CASES += [
    ("triton-chunked", CHUNKS, flags, with_h0)
    for flags, with_h0 in [
        *(("nowhere", False), ("first", True), ("borders", False), ("borders", True)),
        ("everywhere", True),
    ]
]
CASES += [("triton-sequential", CHUNKS, "nowhere", False)]


@pytest.mark.parametrize(
    ("backend", "shape", "flags", "with_h0"), [with_marks(*case) for case in CASES]
)
def test_matches_oracle(
    backend: str, shape: tuple[int, int, int], flags: str, with_h0: bool
) -> None:
    device = device_of(backend)
    case = (*shape, flags, with_h0, torch.float32)
    expected, sizes = oracle(*case, device=device)
    for dtype in (torch.float32,) if is_triton(backend) else (torch.float32, torch.float64):
        inputs = moved(converted(problem(*case), dtype), device)
        found = errors(outcome(backend_function(backend), inputs), expected, sizes)
        # T / 4 units for the recurrence, and some more for the gate.
        limit = torch.finfo(dtype).eps * (8 + shape[1] / 4)
        assert max(found.values()) <= (TRITON_LIMIT if is_triton(backend) else limit), found


@each_backend_and_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(backend: str, dtype: torch.dtype) -> None:
    shape = CHUNKS if is_triton(backend) else (2, 63, 17)
    case, device = (*shape, "somewhere", True, dtype), device_of(backend)
    expected, sizes = oracle(*case, device=device)
    types: list[torch.dtype] = []

    def function(**inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = backend_function(backend)(**inputs)
        types.extend(x.dtype for x in outputs)
        return outputs

    actual = outcome(function, moved(problem(*case), device))
    assert types == [dtype, torch.float32]
    found, unit = errors(actual, expected, sizes), torch.finfo(dtype).eps
    # Half a unit; Triton's interpreter cuts bfloat16 off.
    half = unit if INTERPRETED and dtype == torch.bfloat16 else unit / 2
    assert found["y"] <= 1.01 * half
    assert max(found.values()) <= (2 * unit if is_triton(backend) else unit / 2), found
    # What does not leave in half precision never was in it. (da multiplies by the rounded y.)
    exact = TRITON_LIMIT if is_triton(backend) else 2e-6
    wide = ("last",) if is_triton(backend) else ("last", "db", "dh0")
    assert max(found[name] for name in wide) <= exact, found
    if not is_triton(backend) and dtype == torch.bfloat16:
        assert all(is_rounded_once(actual[x], expected[x], 2e-6) for x in ("y", "dgate", "dvalue"))


@each_fast_backend
@pytest.mark.parametrize("flags", ["nowhere", "somewhere"])
def test_gradcheck(backend: str, flags: str) -> None:
    gradcheck(backend_function(backend), problem(2, 7, 3, flags))


@each_fast_backend
@pytest.mark.parametrize("wanted", ["gate", "value", "a", "b", "h0"])
def test_each_gradient_alone(backend: str, wanted: str) -> None:
    inputs = problem(2, 7, 3, "somewhere")
    everything = outcome(backend_function(backend), inputs)
    alone = outcome(backend_function(backend), inputs, wanted)
    assert torch.equal(alone[f"d{wanted}"], everything[f"d{wanted}"])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strided_inputs(backend: str, dtype: torch.dtype) -> None:
    function = backend_function(backend)
    inputs = moved(problem(*CHUNKS, "somewhere", True, dtype), device_of(backend))
    both = inputs["gate"], inputs["value"]
    expected = outcome(function, inputs)
    # Other strides may take another vector loop of torch, fused or not: a few roundings.
    limit = 2**-8 if dtype == torch.bfloat16 else 4 * torch.finfo(dtype).eps
    for gate, value in (
        torch.cat([*both, both[0]], -1).chunk(3, -1)[:2],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in both],
        [x.mT.contiguous().mT for x in both],
    ):
        assert not gate.is_contiguous()
        actual = outcome(function, inputs | {"gate": gate, "value": value})
        assert worst(actual, expected) <= limit


@each_backend_and_triton
def test_gradients_that_are_strided_or_absent(backend: str) -> None:
    device = device_of(backend)
    inputs = moved(problem(*CHUNKS, dtype=torch.float32), device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    y, last = backend_function(backend)(**inputs)
    packed, row = torch.randn(*CHUNKS[:2], 57, device=device), torch.randn(1, 19, device=device)
    strided = packed[..., 19:38], row.expand(2, 19)

    def gradients(outputs: Any, upstream: Any) -> list[Tensor]:
        found = torch.autograd.grad(
            outputs, leaves, upstream, retain_graph=True, materialize_grads=True
        )
        return [x.double() for x in found]

    limit = 0.0 if is_triton(backend) else 1e-6
    dense = gradients((y, last), [x.contiguous() for x in strided])
    for x, z in zip(gradients((y, last), strided), dense, strict=True):
        torch.testing.assert_close(x, z, rtol=0, atol=limit)
    if is_triton(backend):
        return
    # A sum hands back one expanded number, and nothing for the other output.
    both = gradients((y, last), [torch.ones_like(y), torch.ones_like(last)])
    apart = zip(gradients(y.sum(), None), gradients(last.sum(), None), both, strict=True)
    for of_y, of_last, together in apart:
        torch.testing.assert_close(of_y + of_last, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [*map(with_marks, [*BACKENDS[1:], "triton"])])
def test_empty(backend: str) -> None:
    inputs = moved(problem(2, 3, 19, dtype=torch.float32), device_of(backend))
    a, b, h0 = (inputs[name] for name in ("a", "b", "h0"))
    for shape in ((2, 0, 19), (0, 3, 19)):
        x = torch.zeros(shape, device=a.device, requires_grad=True)
        h, h_last = backend_function(backend)(x, x, a, b, h0[: shape[0]])
        assert h.shape == shape
        assert torch.equal(h_last, h0[: shape[0]])
        (h.sum() + h_last.sum()).backward()


@each_backend
def test_gates_far_open_and_far_closed(backend: str) -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 100.0, 1e4]).view(1, -1, 1)
    leaf = gate.clone().requires_grad_()
    # With a decay of zero each output is its own input.
    h, _ = backend_function(backend)(leaf, torch.ones_like(gate), torch.zeros(1), torch.ones(1))
    exact = gate.double().sigmoid()
    torch.testing.assert_close(h.double(), exact, rtol=4e-7, atol=1e-37)
    (dgate,) = torch.autograd.grad(h.sum(), leaf)
    # 1 - s has the absolute precision of s where the gate is open.
    torch.testing.assert_close(dgate.double(), exact * (1 - exact), rtol=4e-7, atol=1e-7)


@each_backend
def test_not_a_number_is_not_hidden(backend: str) -> None:
    inputs = problem(1, 4, 3, dtype=torch.bfloat16)
    inputs["gate"][0, 2, 1] = float("nan")
    h, h_last = backend_function(backend)(**inputs)
    assert torch.equal(h.isnan()[0, :, 1], torch.tensor([False, False, True, True]))
    assert not h.isnan()[..., [0, 2]].any()
    assert h_last.isnan().tolist() == [[False, True, False]]


@each_backend
@pytest.mark.parametrize("lengths", [[1, 62], [20, 20, 23], [1] * 63])
def test_pieces_with_carried_state_equal_the_whole(backend: str, lengths: list[int]) -> None:
    function, inputs = backend_function(backend), problem(2, 63, 17, "somewhere")
    carried = in_pieces(function, lengths, ("gate", "value", "starts"))
    _, sizes = oracle(2, 63, 17, "somewhere", True, torch.float64, device=device_of(backend))
    # Sums in another order: blocks of time are others in each piece.
    assert worst(outcome(carried, inputs), outcome(function, inputs), sizes) <= 1e-14


@each_backend
@pytest.mark.parametrize("lengths", [[5, 1, 1, 30, 26], [63], [1, 62]])
def test_packed_documents_equal_separate_ones(backend: str, lengths: list[int]) -> None:
    function, inputs = backend_function(backend), problem(1, 63, 17, with_h0=False)
    packed = outcome(function, inputs | {"starts": starts_of(lengths)})
    apart = outcome(in_pieces(function, lengths, ("gate", "value")), inputs)
    _, sizes = oracle(1, 63, 17, "nowhere", False, torch.float64, device=device_of(backend))
    assert worst(packed, apart, sizes) <= 1e-14


@pytest.mark.parametrize("T", [*range(2, 12), 24, 25, 26, 63, 64, 65])
@pytest.mark.parametrize("flags", ["nowhere", "somewhere"])
def test_blocks_of_time_of_any_number(T: int, flags: str) -> None:
    case = (2, T, 3, flags, True, torch.float64)
    expected = oracle(*case, device=device_of("torch"))
    assert worst(outcome(backend_function("torch"), problem(*case)), *expected) <= 1e-14


# With its gates wide open, the scan is the linear recurrence h_t = a h_{t-1} + u_t.


def recurrence(backend: str, u: Tensor, a: Tensor, *rest: Tensor | None) -> Any:
    return backend_function(backend)(torch.full_like(u, 1e4), u, a, torch.ones_like(a), *rest)


@each_backend
@pytest.mark.parametrize("flags", ["nowhere", "first", "somewhere"])
@pytest.mark.parametrize("with_h0", [False, True])
def test_equals_unrolled_sum(backend: str, flags: str, with_h0: bool) -> None:
    """h_t = sum over s of a^(t-s) u_s, over the steps of t's own document."""
    inputs = problem(2, 9, 5, flags, with_h0)
    u, a, h0, marks = inputs["value"], inputs["a"], inputs.get("h0"), inputs.get("starts")
    expected = torch.zeros_like(u)
    for b in range(2):
        for t in range(9):
            begins = [s for s in range(t + 1) if marks is not None and marks[b, s]]
            for s in range(begins[-1] if begins else 0, t + 1):
                expected[b, t] += a ** (t - s) * u[b, s]
            if h0 is not None and not begins:
                expected[b, t] += a ** (t + 1) * h0[b]
    h, h_last = recurrence(backend, u, a, h0, marks)
    # Nine terms of order one in float64: a few units in the last place.
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(h_last, expected[:, -1], rtol=0, atol=1e-14)


@each_backend
def test_long_bfloat16_scan_is_not_accumulated_in_bfloat16(backend: str) -> None:
    T, decay = 4096, 0.999
    u = (torch.randn(1, T, 3, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16()
    a = torch.full((3,), decay)
    exact = torch.zeros(1, 3, dtype=torch.float64)
    rough = torch.zeros(1, 3, dtype=torch.bfloat16)
    for t in range(T):
        exact = float(a[0]) * exact + u[:, t].double()
        rough = a.bfloat16() * rough + u[:, t]

    def error(x: Tensor) -> float:
        return float(((x.double() - exact) / exact).abs().max())

    h, h_last = recurrence(backend, u, a)
    # A state that remembers 1000 steps averages float32 rounding.
    assert error(h_last) <= 1e-5
    assert error(h[:, -1]) <= 2**-8
    # The control: in bfloat16, 0.999 itself is 1.0 and the sum stalls.
    assert error(rough) > 0.1


@pytest.mark.parametrize("name", ["gate", "a", "b", "h0", "starts", "mask"])
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    inputs = problem(2, 7, 5, "somewhere") | {"mask": torch.ones(2, 7, dtype=torch.bool)}
    inputs[name] = inputs[name][:1] if name in ("h0", "starts", "mask") else inputs[name][..., :4]
    with pytest.raises(PHAError, match=f"{name} is "):
        gated_scan(**inputs)


def test_as_an_operator_of_torch() -> None:
    inputs = [x.requires_grad_() for x in problem(2, 7, 3, dtype=torch.float32).values()]
    torch.library.opcheck(
        torch.ops.pha.gated_scan.default, (*inputs, starts_of([3, 4]).expand(2, 7), "torch")
    )


# What only Triton's kernels have.


@pytest.mark.parametrize("form", [with_marks(form) for form in FORMS])
def test_an_infinite_state_ends_with_its_document(form: str) -> None:
    inputs = moved(problem(1, *CHUNKS[1:], "nowhere", True, torch.float32), device_of(form))
    first = SIZES.shortest + 3
    inputs["starts"] = starts_of([first, CHUNKS[1] - first]).to(device_of(form))
    inputs["starts"][:, 0] = False
    h, h_last = backend_function(form)(**(inputs | {"h0": inputs["h0"] / 0.0}))
    expected, last = backend_function("naive")(**inputs)
    assert not h[:, :first].isfinite().any()
    torch.testing.assert_close(h[:, first:], expected[:, first:])
    torch.testing.assert_close(h_last, last)


@pytest.mark.parametrize("form", [with_marks(form) for form in FORMS])
def test_what_is_no_number_outlives_decays_that_underflow(form: str) -> None:
    device = device_of(form)
    inputs = moved(problem(*CHUNKS, dtype=torch.float32), device) | {
        "a": torch.full((19,), 1e-30, device=device),
        "starts": torch.zeros(CHUNKS[:2], dtype=torch.bool, device=device),
    }
    inputs["h0"][:, 3] = torch.nan
    inputs["starts"][1, 1] = True  # of the second sequence, which so forgets it
    h, h_last = backend_function(form)(**inputs)
    assert h.isnan()[0].sum(0).tolist() == [CHUNKS[1] * (state == 3) for state in range(19)]
    assert h.isnan()[1].sum() == 1
    assert h_last.isnan().nonzero().tolist() == [[0, 3]]


@pytest.mark.gpu
@kernels[1]
def test_strided_inputs_of_the_kernels() -> None:
    """Rows of 22 states that are read in pairs, and such that are copied."""
    device, n = device_of("triton"), 22
    inputs = moved(problem(2, CHUNKS[1], n, "nowhere", True, torch.bfloat16), device)
    packed = torch.empty(2, CHUNKS[1], 2 * n + 1, dtype=torch.bfloat16, device=device)
    time_first = packed[..., : 2 * n].transpose(0, 1).contiguous().transpose(0, 1)
    apart = torch.empty(2, 2 * n, CHUNKS[1], dtype=torch.bfloat16, device=device).mT
    found = [outcome(backend_function("triton-chunked"), inputs)]
    for both in (time_first, packed, apart):
        given = {"gate": both[..., :n], "value": both[..., -n:]}
        for name, x in given.items():
            x.copy_(inputs[name])
        found.append(outcome(backend_function("triton-chunked"), inputs | given))
    assert all(worst(each, found[0]) == 0.0 for each in found)


def test_which_rows_are_copied_and_which_are_read_in_pairs() -> None:
    packed = torch.zeros(2, 3, 65, dtype=torch.bfloat16)
    aligned, even, odd = packed[..., :32].contiguous(), packed[..., :22].contiguous(), packed
    for x in (aligned, even, odd[..., :21], aligned[..., 2:24], aligned[..., :16].expand(2, 3, 16)):
        assert triton_scan._rows(x) is x
    shifted = torch.zeros(133, dtype=torch.bfloat16)[1:].view(2, 3, 22)
    for x in (odd[..., :22], aligned[..., 1:23], even.transpose(1, 2), shifted):
        copied = triton_scan._rows(x)
        assert copied.is_contiguous()
        assert copied.data_ptr() % 16 == 0
        assert torch.equal(copied, x)
    assert not triton_scan._paired(aligned, aligned[..., 16:])
    assert not triton_scan._paired(odd[..., :21])
    assert triton_scan._paired(even, even)
    assert triton_scan._paired(aligned[..., :16], aligned[..., 4:20])


each_form_on_a_gpu = pytest.mark.parametrize(
    "form", [pytest.param(form, marks=on_a_gpu) for form in FORMS]
)


@each_form_on_a_gpu
def test_the_same_twice(form: str) -> None:
    inputs = moved(problem(2, 1025, 1000, "somewhere", True, torch.float32), device_of(form))
    first, second = (outcome(backend_function(form), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_form_on_a_gpu
def test_in_a_compiled_graph(form: str) -> None:
    inputs = moved(problem(2, 1025, 1000, dtype=torch.bfloat16), device_of(form))

    def step(gate: Tensor, value: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch.cat([gate, value], dim=-1)
        return backend_function(form)(packed[..., :1000], packed[..., 1000:], **rest)

    compiled = outcome(torch.compile(step, fullgraph=True), inputs)
    plain = outcome(step, inputs)
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)


@each_form_on_a_gpu
def test_in_a_cuda_graph(form: str) -> None:
    device = device_of(form)
    inputs, other = (
        list(moved(problem(2, 300, n, dtype=torch.float32), device).values()) for n in (130, 131)
    )
    other = [x[..., :130].contiguous() for x in other]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        h, h_last = backend_function(form)(*leaves)
        total = (h * h.detach().sin()).sum() + h_last.sin().sum()
        return [h.detach(), h_last.detach(), *torch.autograd.grad(total, leaves)]

    with torch.cuda.stream(torch.cuda.Stream()):
        run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(inputs)
    for x, y in zip(inputs, other, strict=True):
        x.copy_(y)
    graph.replay()
    assert all(map(torch.equal, results, run(other)))


def test_the_form_by_size() -> None:
    many, few, sizes = (256, 1024, 1024), (1, 8192, 768), Sizes()

    def length(shape: tuple[int, int, int], form: str = "auto") -> int:
        return triton_scan.chunk_length(*shape, 132, form, sizes)

    assert length(many) == 1024
    assert length(few, "sequential") == 8192
    assert length(few) % sizes.unroll == 0
    assert 7 * 132 <= 12 * -(-8192 // length(few)) <= 8 * 132
    assert length((1, 40, 768)) == 40
    assert length(many, "chunked") == 512


def test_a_kernel_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("no compiler")

    monkeypatch.setattr(OP, "faults", {})
    monkeypatch.setattr(triton_scan, "scan_forward", fail)
    with pytest.raises(
        PHAError, match=r"\(ValueError: no compiler\).*PHA_BACKENDS=gated_scan=torch"
    ):
        backend_function("triton")(**problem(2, 37, 19, "somewhere", True, torch.float32))


@pytest.mark.gpu
@kernels[1]
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    device, right = device_of("triton"), triton_scan.scan_forward
    monkeypatch.setattr(OP, "faults", {})
    monkeypatch.setattr(triton_scan, "scan_forward", lambda *x: tuple(1.001 * y for y in right(*x)))
    # By this and no more: what follows from h is right.
    assert OP.fault("triton", device) == "it is off by 0.001"
