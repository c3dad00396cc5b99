"""Head and loss in one op: values, gradients, chunks, and what is never held in memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pha.ops import OPS, linear_cross_entropy, token_statistics
from pha.utils.errors import PHAError

# The package re-exports a function of the same name as the module, so it is asked for by path.
MODULE = importlib.import_module("pha.ops.linear_cross_entropy")
BACKENDS = sorted(OPS["linear_cross_entropy"].backends)
N, V, D = 33, 101, 12
# Rows per chunk: one, some that leave a ragged last chunk (33 = 4 * 7 + 5), all but one, all.
CHUNKS = [1, 7, 32, 33, 1000]

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(params=CHUNKS)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(MODULE.CHUNK_LOGITS, "cpu", request.param * V + V // 2)
    return request.param


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets with every fifth one ignored."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = -100
    return x, weight, targets


def backend_function(name: str) -> LossFunction:
    return OPS["linear_cross_entropy"].backends[name]


def loss_and_gradients(function: LossFunction, *inputs: Tensor, scale: float = 1.0) -> list[Tensor]:
    x, weight = (i.detach().clone().requires_grad_() for i in inputs[:2])
    loss = function(x, weight, inputs[2])
    return [loss.detach(), *torch.autograd.grad(scale * loss, (x, weight))]


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        float((x.double() - y.double()).abs().max() / y.abs().max())
        for x, y in zip(actual, expected, strict=True)
    )


@each_backend
def test_by_its_definition(backend: str) -> None:
    x, weight, targets = problem()
    loss, dx, dw = loss_and_gradients(backend_function(backend), x, weight, targets)
    total = torch.zeros((), dtype=torch.float64)
    dx_sum, dw_sum = torch.zeros_like(x), torch.zeros_like(weight)
    for i in range(N):
        if targets[i] == -100:
            continue
        p = torch.exp(weight @ x[i])
        p = p / p.sum()
        total -= p[targets[i]].log()
        dz = p - F.one_hot(targets[i], V)
        dx_sum[i] = dz @ weight
        dw_sum += torch.outer(dz, x[i])
    assert worst([loss, dx, dw], [total, dx_sum, dw_sum]) <= 1e-14


@each_backend
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_matches_oracle(backend: str, chunk: int, dtype: torch.dtype, limit: float) -> None:
    x, weight, targets = problem(dtype)
    actual = loss_and_gradients(backend_function(backend), x, weight, targets)
    expected = loss_and_gradients(
        OPS["linear_cross_entropy"].backends["naive"], x.double(), weight.double(), targets
    )
    assert [g.dtype for g in actual] == [dtype] * 3
    assert worst(actual, expected) <= limit


@each_backend
def test_ignored_rows_count_for_nothing(backend: str, chunk: int) -> None:
    x, weight, targets = problem()
    kept = targets != -100
    loss, dx, dw = loss_and_gradients(backend_function(backend), x, weight, targets)
    short = loss_and_gradients(backend_function(backend), x[kept], weight, targets[kept])
    assert worst([loss, dx[kept], dw], short) <= 1e-14
    assert torch.equal(dx[~kept], torch.zeros_like(dx[~kept]))


@each_backend
def test_all_rows_ignored(backend: str, chunk: int) -> None:
    x, weight, targets = problem()
    targets.fill_(-100)
    for result in loss_and_gradients(backend_function(backend), x, weight, targets):
        assert torch.equal(result, torch.zeros_like(result))


@each_backend
def test_upstream_gradient_scales_both_gradients(backend: str, chunk: int) -> None:
    inputs = problem()
    _, dx, dw = loss_and_gradients(backend_function(backend), *inputs)
    _, dx_scaled, dw_scaled = loss_and_gradients(backend_function(backend), *inputs, scale=-0.37)
    assert worst([dx_scaled, dw_scaled], [-0.37 * dx, -0.37 * dw]) <= 1e-14


@each_backend
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_input_leaves_the_other_gradient_alone(
    backend: str, frozen: str, chunk: int
) -> None:
    x, weight, targets = problem()
    _, dx, dw = loss_and_gradients(backend_function(backend), x, weight, targets)
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    backend_function(backend)(x, weight, targets).backward()
    for leaf, expected in ((x, dx), (weight, dw)):
        if leaf.requires_grad:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, expected)
        else:
            assert leaf.grad is None


@each_backend
def test_value_without_gradients(backend: str, chunk: int) -> None:
    x, weight, targets = problem()
    expected, *_ = loss_and_gradients(backend_function(backend), x, weight, targets)
    loss = backend_function(backend)(x, weight, targets)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    with torch.no_grad():
        assert torch.equal(backend_function(backend)(x.requires_grad_(), weight, targets), expected)


@each_backend
def test_autocast_is_as_good_as_bfloat16_logits(backend: str, chunk: int) -> None:
    x, weight, targets = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, dx, dw = loss_and_gradients(backend_function(backend), x, weight, targets)
    assert (loss.dtype, dx.dtype, dw.dtype) == (torch.float32,) * 3
    exact, dx_exact, dw_exact = loss_and_gradients(
        OPS["linear_cross_entropy"].backends["naive"], x, weight, targets
    )
    # Rounding x, weight and the logit moves a logit by at most 3 * 2^-8 of sum |x_i w_i|, and a
    # row's loss by twice that.
    size = (x.abs() @ weight.abs().T).max()
    assert abs(float(loss - exact)) <= 6 * 2**-8 * float(size) * int((targets != -100).sum())
    # Those shifts are independent between rows and logits: the sum and the gradients average them.
    assert abs(float(loss / exact) - 1) <= 2**-8
    assert worst([dx, dw], [dx_exact, dw_exact]) <= 0.03


@each_backend
def test_bfloat16_weights_sum_in_float32(backend: str, chunk: int) -> None:
    x, weight, targets = problem(torch.bfloat16)
    loss, dx, dw = loss_and_gradients(backend_function(backend), x, weight, targets)
    assert (loss.dtype, dx.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    expected = loss_and_gradients(
        OPS["linear_cross_entropy"].backends["naive"], x.double(), weight.double(), targets
    )
    assert abs(float(loss / expected[0]) - 1) <= 2**-8
    assert worst([dx, dw], expected[1:]) <= 0.03


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "naive"])
def test_gradcheck(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE.CHUNK_LOGITS, "cpu", 2 * 7)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, -100, 3, 3])
    # Central differences with step 1e-6 on a loss of about 10: 1e-15 * 10 / 1e-6 = 1e-8.
    assert torch.autograd.gradcheck(
        lambda x, w: backend_function(backend)(x, w, targets),
        (x, weight),
        eps=1e-6,
        atol=2e-8,
        rtol=1e-7,
    )


@each_backend
def test_tied_weight_collects_both_gradients(backend: str, chunk: int) -> None:
    _, weight, targets = problem()
    ids = torch.arange(N) % V

    def gradient(name: str) -> Tensor:
        table = weight.clone().requires_grad_()
        loss = backend_function(name)(torch.tanh(table[ids]), table, targets)
        (loss + table.square().sum()).backward()
        assert table.grad is not None
        return table.grad

    assert worst([gradient(backend)], [gradient("naive")]) <= 1e-14


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def largest_tensor(function: Callable[..., Any], rows: int) -> int:
    x = torch.randn(rows, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    with LargestTensor() as largest:
        result = function(x, weight, torch.arange(rows) % V)
        if isinstance(result, Tensor):
            result.backward()
    return largest.numel


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, per_chunk = 500, 10
    # The recorder sees an operator as one operation; its inside is called here as a function.
    monkeypatch.setattr(MODULE, "_loss_and_gradients", MODULE._chunk_by_chunk)
    monkeypatch.setitem(MODULE.CHUNK_LOGITS, "cpu", per_chunk * V)
    allowed = max(per_chunk * V, V * D, rows * D)
    assert largest_tensor(backend_function("chunked"), rows) <= allowed
    assert largest_tensor(linear_cross_entropy, rows) <= allowed
    assert largest_tensor(token_statistics, rows) <= allowed
    # The control: chunks of all rows and the oracle do hold them, and the recorder sees it.
    monkeypatch.setitem(MODULE.CHUNK_LOGITS, "cpu", rows * V)
    assert largest_tensor(backend_function("chunked"), rows) == rows * V
    assert largest_tensor(backend_function("naive"), rows) == rows * V


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_token_statistics_are_cross_entropy_and_argmax(
    chunk: int, dtype: torch.dtype, limit: float
) -> None:
    x, weight, targets = problem(dtype)
    targets[targets < 0] = 0
    # Some rows made right on purpose: by chance one in a hundred would be.
    best = (x @ weight.T).argmax(-1)
    targets[::3] = best[::3]
    losses, hits = token_statistics(x.requires_grad_(), weight, targets)
    expected = F.cross_entropy(x.double() @ weight.double().T, targets, reduction="none")
    assert losses.dtype == dtype
    assert hits.dtype == torch.bool
    assert not losses.requires_grad
    assert worst([losses], [expected.detach()]) <= limit
    assert torch.equal(hits, best == targets)
    assert 0 < int(hits.sum()) < N


def test_token_statistics_sum_to_the_loss_in_autocast(chunk: int) -> None:
    x, weight, targets = problem(torch.float32)
    targets[targets < 0] = 0
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = token_statistics(x, weight, targets)
        loss = linear_cross_entropy(x, weight, targets)
    assert losses.dtype == torch.float32
    # The same bfloat16 logits; float32 sums in a different order.
    assert abs(float(losses.sum() / loss) - 1) <= 1e-6


@each_backend
@pytest.mark.parametrize("vocabulary", [61, 257, 8193])
def test_no_gradient_comes_from_memory_that_was_never_written(
    backend: str, vocabulary: int
) -> None:
    """Vocabularies that no vector divides, in bfloat16; what is not written holds NaN in tests."""
    assert torch.empty(3).isnan().all()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 64, generator=generator)
    weight = torch.randn(vocabulary, 64, generator=generator) / 8
    targets = torch.randint(vocabulary, (70,), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss_and_gradients(backend_function(backend), x, weight, targets)
    expected = loss_and_gradients(backend_function("naive"), x, weight, targets)
    assert worst(actual, expected) <= 0.03


@pytest.mark.parametrize("rows", [0, 1, N - 1, N + 1])
def test_targets_of_other_rows_are_refused(rows: int) -> None:
    x, weight, _ = problem()
    with pytest.raises(PHAError, match=f"targets are .{rows},. of .*each of {N} rows"):
        linear_cross_entropy(x, weight, torch.zeros(rows, dtype=torch.long))
    with pytest.raises(PHAError, match="int32"):
        linear_cross_entropy(x, weight, torch.zeros(N, dtype=torch.int32))
    with pytest.raises(PHAError, match="do not fit"):
        linear_cross_entropy(x[:, 1:], weight, torch.zeros(N, dtype=torch.long))


@pytest.mark.parametrize("target", [-1, V])
def test_refuses_targets_outside_the_vocabulary(target: int) -> None:
    x, weight, targets = problem(torch.float32)
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError), match="out"):
        linear_cross_entropy(x, weight, targets)


def test_refuses_a_second_derivative() -> None:
    x, weight, targets = problem()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = scale * linear_cross_entropy(x.requires_grad_(), weight, targets)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
