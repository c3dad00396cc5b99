"""Every backend that a GPU has, in float32 against its oracle, and the loss in bfloat16."""

from __future__ import annotations

import pytest
import torch

from pha.ops import OPS, linear_cross_entropy

pytestmark = pytest.mark.gpu

BACKENDS = [
    (op.name, name) for op in OPS.values() for name in op.backends if op.runs_on(name, "cuda")
]


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_a_backend_agrees_with_its_oracle(op: str, backend: str, device: torch.device) -> None:
    if not OPS[op].runs_on(backend, device.type):
        pytest.skip(f"{backend} is not made for {device.type}")
    assert OPS[op].self_check(backend, device.type) < 1e-5


@pytest.mark.parametrize("rows", [1, 333, 5000])
def test_the_loss_in_bfloat16_is_near_that_in_float32(rows: int, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, 96, device=device, generator=generator, requires_grad=True)
    weight = torch.randn(50257, 96, device=device, generator=generator) * 0.1
    weight.requires_grad_()
    targets = torch.arange(rows, device=device) * 7 % 50257
    targets[::5] = -100
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            loss = linear_cross_entropy(x, weight, targets)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, weight))))
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded).abs().max() <= 0.02 * exact.abs().max()


def test_the_loss_does_not_wait_for_the_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a CPU has nothing to wait for")
    x = torch.randn(5000, 96, device=device, requires_grad=True)
    weight = torch.randn(50257, 96, device=device, requires_grad=True)
    targets = torch.arange(5000, device=device)
    linear_cross_entropy(x, weight, targets)  # the first one tries the kernel, and waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(x, weight, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
