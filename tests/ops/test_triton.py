"""Triton's kernels without a GPU: run in Triton's interpreter, and compiled ahead for one."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pha.ops.gated_scan.sizes import Sizes
from tests.ops.common import INTERPRETED


def has_triton(*version: int) -> bool:
    try:
        found = importlib.metadata.version("triton").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in found[:2]) >= version


pytestmark = pytest.mark.skipif(INTERPRETED, reason="asks for a process that interprets nothing")


# Triton decides when a kernel is defined whether to interpret it: a process of its own does.
@pytest.mark.slow
@pytest.mark.skipif(not has_triton(3, 7), reason="needs the interpreter of Triton 3.7")
def test_in_the_interpreter() -> None:
    names = ("gated_scan", "linear_scan_triton", "linear_cross_entropy", "tuning")
    files = [Path(__file__).with_name(f"test_{name}.py") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", *files],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "PHA_GPU_TESTS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert done.stdout.startswith("."), "nothing ran"


def compile_ahead(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: set[str],
    warps: int,
    architecture: int = 90,
) -> Any:
    """A kernel as a data-centre GPU would run it. Arguments `aligned` are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    attributes = {places[name]: [["tt.divisibility", 16]] for name in aligned}
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    values = {places[name]: value for name, value in constants.items()}
    source = ASTSource(kernel, types, values, attributes)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


def assert_no_spills(compiled: Any, folder: Path) -> None:
    import triton

    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    assert " STACK:0 " in usage
    assert " LOCAL:0 " in usage


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


linux = pytest.mark.skipif(
    not has_triton(3, 6) or not sys.platform.startswith("linux"), reason="needs Triton 3.6"
)
FLAGS = {"HAS_STARTS": True}
PLAIN = dict.fromkeys(FLAGS, False)
GATED, LINEAR = {"GATED": True}, {"GATED": False}
# The kernels of the scans: their constants, and how many streams of loads they keep under way.
SCANS: list[tuple[str, dict[str, Any], int]] = [
    ("forward", {**FLAGS, **GATED, "HAS_INITIAL": True, "SUMMARY": False}, 2),
    ("forward", {**FLAGS, **GATED, "HAS_INITIAL": False, "SUMMARY": True}, 2),
    ("forward", {**PLAIN, **GATED, "HAS_INITIAL": False, "SUMMARY": False}, 2),
    ("forward", {**FLAGS, **LINEAR, "HAS_INITIAL": True, "SUMMARY": False}, 2),
    ("forward", {**FLAGS, **LINEAR, "HAS_INITIAL": False, "SUMMARY": True}, 2),
    ("forward", {**PLAIN, **LINEAR, "HAS_INITIAL": False, "SUMMARY": False}, 2),
    ("backward", {**FLAGS, **GATED, "HAS_H0": True}, 4),
    ("backward", {**FLAGS, **LINEAR, "HAS_H0": True}, 3),
    ("backward_summary", {**FLAGS, **GATED}, 1),
    ("backward_summary", {**FLAGS, **LINEAR}, 2),
    ("combine", {"HAS_INITIAL": True, "REVERSE": True}, 0),
]


def compile_scan(
    name: str, constants: dict[str, Any], element: str, paired: bool, architecture: int
) -> Any:
    """A kernel of a scan. With `paired` rows, no number or pointer of theirs is aligned.

    Decays, which the linear one has a row of for each step, are float32.
    """
    from pha.ops.gated_scan import triton_kernels

    kernel, sizes = getattr(triton_kernels, name), Sizes()
    walk = {"BLOCK": sizes.block, "UNROLL": sizes.unroll, "STAGES": sizes.stages, "PAIRED": paired}
    constants = constants | {x: value for x, value in walk.items() if x in kernel.arg_names}
    rows = ("x", "h", "dh", "dx", *(("y", "dy") if constants.get("GATED") else ()))
    kinds = dict.fromkeys(rows, f"*{element}") | {"starts": "*u8"}
    kinds |= dict.fromkeys(("T", "n", "chunks", "length"), "i32")
    signature = {
        x: kinds.get(x, "i32" if x.endswith(("_B", "_T")) else "*fp32")
        for x in kernel.arg_names
        if x not in constants
    }
    aligned = set(signature) - {"T", "chunks", "length"}
    if paired:
        aligned = {x for x in aligned if signature[x] != "i32" and x not in rows}
    return compile_ahead(kernel, signature, constants, aligned, 1, architecture)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("name", "constants", "streams"), SCANS)
@pytest.mark.parametrize(
    ("element", "paired", "architecture"),
    [("fp32", False, 90), ("bf16", False, 90), *(("bf16", True, x) for x in (80, 90, 100))],
)
def test_the_scan_compiles_without_spills(
    name: str,
    constants: dict[str, Any],
    streams: int,
    element: str,
    paired: bool,
    architecture: int,
    fresh_cache: Path,
) -> None:
    """Its loads are under way several groups of steps ahead, whatever the width."""
    compiled = compile_scan(name, constants, element, paired, architecture)
    code = compiled.asm["ptx"]
    assert code.count("cp.async.c") >= streams * Sizes().unroll * Sizes().stages
    if element == "bf16" and name in ("forward", "backward") and not constants.get("SUMMARY"):
        assert "cvt.rn.bf16" in code
    assert_no_spills(compiled, fresh_cache)


@linux
def test_pairs_are_loaded_ahead_where_nothing_is_aligned(fresh_cache: Path) -> None:
    name, constants, streams = SCANS[2]
    code = compile_scan(name, constants, "bf16", True, 90).asm["ptx"]
    assert code.count("cp.async.c") >= streams * Sizes().unroll * Sizes().stages


@linux
@pytest.mark.parametrize(
    ("element", "columns"), [("bf16", 50257), ("fp32", 50257), ("bf16", 49152)]
)
def test_the_loss_compiles_without_spills(element: str, columns: int, fresh_cache: Path) -> None:
    """With aligned rows whole blocks are loaded and stored in vectors of 16 bytes."""
    from pha.ops.linear_cross_entropy.triton_kernel import BLOCK, softmax_gradient

    constants = {
        "IGNORED": -100,
        "COLUMNS": columns,
        "PADDED": -(-columns // 64) * 64,
        "BLOCK": BLOCK,
        "GRADIENT": True,
    }
    signature = {"z_ptr": f"*{element}", "target_ptr": "*i64", "loss_ptr": "*fp32"}
    signature["row_stride"] = "i32"
    compiled = compile_ahead(softmax_gradient, signature, constants, set(signature), 8)
    code = compiled.asm["ptx"]
    assert "ld.global.v4" in code
    assert "st.global.v4" in code
    assert_no_spills(compiled, fresh_cache)
