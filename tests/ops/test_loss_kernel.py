"""The kernel of the loss without a GPU: in Triton's interpreter, and compiled ahead for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

COLUMNS = (1, 5, 4096, 5000, 8192)

# Triton decides when a kernel is defined whether to interpret it: a process of its own does.
PROGRAM = """
import json
import torch
from pha.ops.linear_cross_entropy.triton_kernel import softmax_gradient_

torch.manual_seed(0)
found = []
for columns in json.loads(input()):
    for dtype in (torch.float32, torch.bfloat16):
        for gradient in (True, False):
            # Rows of a wider buffer, and logits far from zero.
            buffer = (torch.randn(7, columns + 11) * 5 + 200).to(dtype)
            z, before = buffer[:, :columns], buffer.clone()
            targets = torch.randint(columns, (7,))
            targets[2] = -100
            exact = z.double().clone().requires_grad_()
            losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
            losses.sum().backward()
            got = softmax_gradient_(z, targets, -100, gradient)
            left = exact.grad if gradient else before[:, :columns].double()
            differences = got - losses, z.double() - left, (buffer - before)[:, columns:]
            errors = [float(x.abs().max()) for x in differences]
            found.append([columns, str(dtype), gradient, *errors])
print(json.dumps(found))
"""


def interpret(program: str, *arguments: Any) -> Any:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="".join(f"{json.dumps(x)}\n" for x in arguments),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_losses_and_gradients_are_those_of_cross_entropy() -> None:
    found = interpret(PROGRAM, COLUMNS)
    assert len(found) == 4 * len(COLUMNS)
    for columns, dtype, gradient, loss, wrong, outside in found:
        # Losses of logits around 200 lose what float32 has beyond seven digits.
        assert loss <= 1e-4, (columns, dtype)
        limit = 2**-8 if dtype == "torch.bfloat16" else 1e-4
        assert wrong <= (limit if gradient else 0.0), (columns, dtype, gradient)
        assert outside == 0.0


# The whole op with the kernel, against the oracle, in chunks that do not divide the rows.
OP = """
import json, warnings
import torch
from pha.ops import OPS
from pha.ops import linear_cross_entropy as function
from pha.ops.linear_cross_entropy import CHUNK_LOGITS, _triton_fault

warnings.simplefilter("error")
CHUNK_LOGITS["cpu"] = 7 * 101
op = OPS["linear_cross_entropy"]
assert _triton_fault(torch.device("cpu")) is None
print(json.dumps(op.self_check("triton", "cpu")))
"""


def test_the_op_with_the_kernel_agrees_with_its_oracle() -> None:
    assert interpret(OP) < 2e-6


@pytest.mark.parametrize("element", ["*bf16", "*fp32"])
def test_it_compiles_for_a_data_centre_gpu_without_spilling(element: str) -> None:
    """With aligned rows whole blocks are loaded and stored in vectors of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pha.ops.linear_cross_entropy.triton_kernel import BLOCK, softmax_gradient

    constants = {"IGNORED": -100, "COLUMNS": 50257, "BLOCK": BLOCK, "GRADIENT": True}
    pointers = {"z_ptr": element, "target_ptr": "*i64", "loss_ptr": "*fp32", "row_stride": "i32"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))}
    source = ASTSource(
        fn=softmax_gradient,
        signature=pointers | dict.fromkeys(constants, "constexpr"),
        constexprs={(4 + i,): value for i, value in enumerate(constants.values())},
        attrs=aligned,
    )
    kernel = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    code = kernel.asm["ptx"]
    assert "ld.global.v4" in code
    assert "st.global.v4" in code
    assert "ld.local" not in code
    assert "st.local" not in code
    assert len(kernel.asm["cubin"]) > 0
