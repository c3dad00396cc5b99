"""Linear layers packed into one product against each on its own."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pha import PHAConfig, PHAForCausalLM
from pha.nn import projection
from pha.nn.projection import project

SIZES = (5, 1, 12)


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small integers: their products and sums are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).float()


def layers() -> list[nn.Linear]:
    linears = [nn.Linear(7, size, bias=False) for size in SIZES]
    for seed, linear in enumerate(linears):
        linear.weight.data = whole_numbers(*linear.weight.shape, seed=seed)
    return linears


def outcome(z: Tensor, outputs: list[Tensor], linears: list[nn.Linear]) -> list[Tensor]:
    """Outputs, then gradients of a sum with whole coefficients."""
    total = sum((y * whole_numbers(*y.shape, seed=9)).sum() for y in outputs)
    gradients = torch.autograd.grad(total, [z, *(linear.weight for linear in linears)])
    return [*outputs, *gradients]


@pytest.mark.parametrize("shape", [(300, 7), (2, 129, 7), (3, 100, 7)])
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_is_exactly_equal(shape: tuple[int, ...], autocast: bool) -> None:
    linears = layers()
    z = whole_numbers(*shape, seed=3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        packed = project(z, linears)
        alone = [linear(z) for linear in linears]
    assert packed[0]._base is not None, "the outputs are slices of one tensor"
    for a, b in zip(outcome(z, packed, linears), outcome(z, alone, linears), strict=True):
        assert a.dtype == b.dtype
        assert a.equal(b)


def test_gradients_of_some_weights_only() -> None:
    linears = layers()
    linears[1].weight.requires_grad_(False)
    z = whole_numbers(300, 7, seed=3)
    sum(y.sum() for y in project(z, linears)).backward()
    assert linears[1].weight.grad is None
    assert linears[0].weight.grad.equal(z.sum(0).expand(5, 7))


@pytest.mark.parametrize("how", ["rows", "bias", "hook", "subclass"])
def test_layers_that_cannot_be_packed_are_called(how: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    linears, z, called = layers(), whole_numbers(300, 7, seed=3), []
    if how == "rows":
        z = z[: projection.PACK_ROWS - 1]
    elif how == "bias":
        linears[0] = nn.Linear(7, 5, bias=True)
    elif how == "hook":
        linears[2].register_forward_hook(lambda *_: called.append(True))
    else:
        linears[1] = Doubled(7, 1, bias=False)
    outputs = project(z, linears)
    assert bool(called) == (how == "hook")
    for output, linear in zip(outputs, linears, strict=True):
        torch.testing.assert_close(output, linear(z))


@pytest.mark.parametrize("name", ["pha-tiny", "sequential-tiny", "pha-125m-mehta-tiny"])
def test_a_model_packs_without_changing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = PHAConfig.from_preset(
        name, vocab_size=53, hidden_size=48, num_hidden_layers=2, state_size=32
    )
    model = PHAForCausalLM(config).double()
    other = copy.deepcopy(model)
    ids = torch.randint(53, (2, 40))
    results = []
    for rows, each in ((1, model), (10**9, other)):
        monkeypatch.setattr(projection, "PACK_ROWS", rows)
        loss = each(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append(loss.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)
    for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=key)
