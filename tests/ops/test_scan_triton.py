"""The scans in Triton: on a GPU, or interpreted on the CPU; and compiled without a GPU."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pha.ops import OPS
from pha.ops.gated_scan import triton as triton_scan
from pha.ops.gated_scan import triton_runtime
from pha.ops.testing import relative_error

FORMS = ("triton-sequential", "triton-chunked")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TINY = [(1, 1, 1), (3, 2, 19), (1, 31, 19), (1, 19, 130)]
REAL = [(3, 130, 130), (1, 1, 1), (2, 1025, 1000), (1, 8192, 768), (300, 64, 1030)]
SHAPES = TINY if INTERPRETED else REAL


def kernels(test: Callable[..., None]) -> Callable[..., None]:
    """For tests that run kernels: on a GPU, or interpreted."""
    absent = not torch.cuda.is_available() and not INTERPRETED
    skip = pytest.mark.skipif(absent, reason="needs a CUDA device or Triton's interpreter")
    return pytest.mark.gpu(skip(test))


def several_chunks(B: int) -> tuple[int, int, int]:
    """A shape of which the last of four chunks is not full."""
    return B, 3 * triton_scan.SHORTEST + 2, 19


def problem(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """gate, value, a, b, h0."""
    B, T, n = shape
    generator = torch.Generator().manual_seed(B * T + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    a = torch.rand(n, generator=generator).to(device)
    return [normal(B, T, n).to(dtype), normal(B, T, n).to(dtype), a, normal(n), normal(B, n)]


def some(shape: tuple[int, int, int], device: torch.device, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(shape[:2], generator=generator) < share).to(device)


def places_of_starts(shape: tuple[int, int, int], device: torch.device) -> dict[str, Tensor | None]:
    B, T, n = shape
    borders, first = torch.zeros(2, B, T, dtype=torch.bool, device=device)
    length = triton_scan.chunk_length(B, T, n, 1, "chunked")
    borders[:, length::length] = True
    borders[:, length - 1 :: length] = True
    first[:, 0] = True
    everywhere = torch.ones(B, T, dtype=torch.bool, device=device)
    return {
        "nowhere": None,
        "somewhere": some(shape, device, 0.05),
        "first": first,
        "borders": borders,
        "everywhere": everywhere,
    }


def gradients(function: Callable[..., Any], inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    h, h_last = function(*leaves, *rest)
    total = (h.float() * h.detach().float().sin()).sum() + h_last.sin().sum()
    return [h.detach(), h_last.detach(), *torch.autograd.grad(total, leaves)]


@pytest.fixture(autouse=True)
def without_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "scans run", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few steps, which are slow in the interpreter, make several chunks."""
    if INTERPRETED:
        monkeypatch.setattr(triton_scan, "SHORTEST", 8)
        monkeypatch.setattr(triton_scan, "UNROLL", 4)


@kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_gated_scan(form: str, shape: tuple[int, int, int], device: torch.device) -> None:
    backends, inputs = OPS["gated_scan"].backends, problem(shape, device)
    rest = some(shape, device, 0.05), some(shape, device, 0.8)
    error = relative_error(
        lambda *x: backends[form](*x, *rest), lambda *x: backends["naive"](*x, *rest), *inputs
    )
    assert error < 1e-5


@kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["nowhere", "first", "borders", "everywhere"])
def test_places_of_starts(place: str, form: str, device: torch.device) -> None:
    shape = several_chunks(2)
    starts = places_of_starts(shape, device)[place]
    backends, (gate, value, a, b, h0) = OPS["gated_scan"].backends, problem(shape, device)
    for state in (None, h0):
        error = relative_error(
            lambda *x, state=state: backends[form](*x, state, starts),
            lambda *x, state=state: backends["naive"](
                *x, None if state is None else state.double(), starts
            ),
            gate,
            value,
            a,
            b,
        )
        assert error < 1e-5


@kernels
@pytest.mark.parametrize("form", FORMS)
def test_an_infinite_state_ends_with_its_document(form: str, device: torch.device) -> None:
    shape = several_chunks(1)
    first = triton_scan.SHORTEST + 3
    gate, value, a, b, h0 = problem(shape, device)
    starts = some(shape, device, 0.0)
    starts[:, first] = True
    h, h_last = OPS["gated_scan"].backends[form](gate, value, a, b, h0 / 0.0, starts)
    expected, last = OPS["gated_scan"].backends["naive"](gate, value, a, b, h0, starts)
    assert not h[:, :first].isfinite().any()
    torch.testing.assert_close(h[:, first:], expected[:, first:])
    torch.testing.assert_close(h_last, last)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_rounds_once(form: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = several_chunks(2)
    inputs, rest = problem(shape, device, dtype), (some(shape, device, 0.05), None)
    results = gradients(OPS["gated_scan"].backends[form], inputs, *rest)
    exact = gradients(OPS["gated_scan"].backends["naive"], [x.double() for x in inputs], *rest)
    unit = torch.finfo(dtype).eps
    # Triton's interpreter cuts bfloat16 off; what is compiled rounds (see the test of PTX).
    rounding = unit if INTERPRETED and dtype == torch.bfloat16 else unit / 2
    assert [x.dtype for x in results[:4]] == [dtype, torch.float32, dtype, dtype]
    for result, expected in zip(results[:2], exact[:2], strict=True):
        limit = rounding * 1.01 if result.dtype == dtype else 1e-5
        assert (result - expected).abs().max() <= limit * expected.abs().max()
    for result, expected in zip(results[2:], exact[2:], strict=True):
        assert (result - expected).abs().max() <= 2 * unit * expected.abs().max()


@kernels
@pytest.mark.parametrize("form", FORMS)
def test_slices_of_a_packed_projection(form: str, device: torch.device) -> None:
    gate, value, a, b, h0 = problem(several_chunks(2), device)
    packed = torch.cat([gate, value, gate], dim=-1)
    views = [packed[..., :19], packed[..., 19:38], a, b, h0]
    swapped = [value.transpose(0, 1).contiguous().transpose(0, 1), gate.mT.contiguous().mT, a, b]
    function = OPS["gated_scan"].backends[form]
    expected = gradients(function, [gate, value, a, b, h0])
    assert all(map(torch.equal, gradients(function, views), expected))
    expected = gradients(function, [value, gate, a, b])
    assert all(map(torch.equal, gradients(function, swapped), expected))


@kernels
@pytest.mark.parametrize("form", FORMS)
def test_strided_gradients(form: str, device: torch.device) -> None:
    shape = several_chunks(2)
    inputs = [x.requires_grad_() for x in problem(shape, device)]
    h, h_last = OPS["gated_scan"].backends[form](*inputs)
    packed = torch.randn(*shape[:2], 57, device=device)
    strided = packed[..., 19:38], torch.randn(1, 19, device=device).expand(2, 19)
    one = torch.ones((), device=device)
    for dh, dh_last in (strided, (one.expand(h.shape), one.expand(h_last.shape))):
        results = [
            torch.autograd.grad((h, h_last), inputs, x, retain_graph=True)
            for x in ((dh, dh_last), (dh.contiguous(), dh_last.contiguous()))
        ]
        assert all(map(torch.equal, *results))


@kernels
@pytest.mark.parametrize("form", FORMS)
def test_the_same_twice(form: str, device: torch.device) -> None:
    inputs, rest = problem(SHAPES[2], device), (some(SHAPES[2], device, 0.05),)
    results = [gradients(OPS["gated_scan"].backends[form], inputs, *rest) for _ in range(2)]
    assert all(map(torch.equal, *results))


@kernels
def test_empty(device: torch.device) -> None:
    _, _, a, b, h0 = problem((2, 3, 19), device)
    for shape in ((2, 0, 19), (0, 3, 19)):
        x = torch.zeros(shape, device=device, requires_grad=True)
        h, h_last = OPS["gated_scan"].backends["triton"](x, x, a, b, h0[: shape[0]])
        assert h.shape == shape
        assert torch.equal(h_last, h0[: shape[0]])
        (h.sum() + h_last.sum()).backward()


@kernels
def test_the_table_has_it_and_its_check_passes(device: torch.device) -> None:
    for backend in ("triton", *FORMS):
        assert OPS["gated_scan"].self_check(backend, device.type) < 1e-5
        assert not OPS["gated_scan"].runs_on(backend, "cpu")


@kernels
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_in_a_compiled_graph(form: str, device: torch.device) -> None:
    inputs = problem((2, 1025, 1000), device, torch.bfloat16)
    function = OPS["gated_scan"].backends[form]

    def step(gate: Tensor, value: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch.cat([gate, value], dim=-1)
        return function(packed[..., :1000], packed[..., 1000:], *rest)

    compiled = torch.compile(step, fullgraph=True)
    assert all(map(torch.equal, gradients(compiled, inputs), gradients(step, inputs)))


@kernels
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_in_a_cuda_graph(form: str, device: torch.device) -> None:
    inputs, other = problem((2, 300, 130), device), problem((2, 301, 130), device)
    other = [x[:, :300].contiguous() if x.dim() == 3 else x for x in other]
    function = OPS["gated_scan"].backends[form]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients(function, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = gradients(function, inputs)
    for x, y in zip(inputs, other, strict=True):
        x.copy_(y)
    graph.replay()
    assert all(map(torch.equal, results, gradients(function, other)))


def test_the_form_by_size() -> None:
    many, few = (256, 1024, 1024), (1, 8192, 768)
    assert triton_scan.chunk_length(*many, 132) == 1024
    assert triton_scan.chunk_length(*few, 132, "sequential") == 8192
    length = triton_scan.chunk_length(*few, 132)
    assert length % triton_scan.UNROLL == 0
    assert 7 * 132 <= 12 * -(-8192 // length) <= 8 * 132
    assert triton_scan.chunk_length(1, 40, 768, 132) == 40
    assert triton_scan.chunk_length(*many, 132, "chunked") == 512


def test_where_it_cannot_run_torch_takes_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_runtime, "_FAULTS", {})
    monkeypatch.setattr(triton_runtime, "_fault", lambda device: "broken")
    triton_runtime._warn.cache_clear()
    inputs = problem((2, 37, 19), torch.device("cpu"))
    rest = some((2, 37, 19), torch.device("cpu"), 0.1), some((2, 37, 19), torch.device("cpu"), 0.9)
    with pytest.warns(RuntimeWarning, match=r"Triton cannot be used \(broken\)") as caught:
        results = gradients(OPS["gated_scan"].backends["triton"], inputs, *rest)
    assert len(caught) == 1
    expected = gradients(OPS["gated_scan"].backends["naive"], inputs, *rest)
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@kernels
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    right = triton_scan.scan_forward
    assert triton_runtime._fault(device) is None
    monkeypatch.setattr(triton_scan, "scan_forward", lambda *x: tuple(1.001 * y for y in right(*x)))
    assert "off by" in str(triton_runtime._fault(device))


def _triton_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return (0,)


@pytest.mark.skipif(
    INTERPRETED or _triton_version() < (3, 7), reason="needs the interpreter of Triton 3.7"
)
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider"]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PHA_GPU_TESTS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*command, __file__],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


COMPILED = """
import subprocess
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pha.ops.gated_scan import triton as triton_scan
from pha.ops.gated_scan import triton_kernels

ELEMENTS = ("gate", "value", "h", "dh", "dgate", "dvalue")
walk = {"BLOCK": triton_scan.BLOCK, "UNROLL": triton_scan.UNROLL, "STAGES": triton_scan.STAGES}
whole = {"HAS_STARTS": True, "HAS_MASK": True}
cases = [
    ("forward", {**walk, **whole, "HAS_INITIAL": True, "SUMMARY": False}, 2),
    ("forward", {**walk, **whole, "HAS_INITIAL": False, "SUMMARY": True}, 2),
    ("forward", {**walk, **dict.fromkeys(whole, False), "HAS_INITIAL": False, "SUMMARY": False}, 2),
    ("backward", {**walk, **whole, "HAS_H0": True}, 4),
    ("backward_summary", {**walk, "HAS_STARTS": True}, 1),
    ("combine", {"BLOCK": 64, "UNROLL": 8, "HAS_INITIAL": True, "REVERSE": True}, 0),
]
for name, constants, streams in cases:
    kernel, types, attributes = getattr(triton_kernels, name), {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            types[argument] = "constexpr"
            continue
        size = argument in ("T", "n", "chunks", "length") or argument[-2:] in ("_B", "_T")
        pointer = "*" + (sys.argv[1] if argument in ELEMENTS else "fp32")
        flag = argument in ("starts", "mask")
        types[argument] = "i32" if size else "*u8" if flag else pointer
        if argument not in ("T", "chunks", "length"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, types, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 1},
    )
    ptx = compiled.asm["ptx"]
    assert ptx.count("cp.async.c") >= streams * triton_scan.UNROLL, name
    if sys.argv[1] == "bf16" and name in ("forward", "backward") and not constants.get("SUMMARY"):
        assert "cvt.rn.bf16" in ptx, name
    tool = triton.__path__[0] + "/backends/nvidia/bin/cuobjdump"
    with open(sys.argv[2], "wb") as file:
        file.write(compiled.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", sys.argv[2]], capture_output=True, text=True)
    assert " STACK:0 " in usage.stdout and " LOCAL:0 " in usage.stdout, usage.stdout
print("all compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    INTERPRETED or _triton_version() < (3, 6) or not sys.platform.startswith("linux"),
    reason="needs Triton 3.6",
)
@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_compiles_for_an_h200_without_spills(element: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, element, str(tmp_path / "kernel.cubin")],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "all compiled\n", done.stderr[-2000:]
