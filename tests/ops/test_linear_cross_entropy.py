"""Head and loss in one op: values, gradients, chunks, and what is never held in memory."""

from __future__ import annotations

import importlib
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pha.ops import OPS, linear_cross_entropy, token_statistics
from pha.utils.errors import PHAError
from tests.ops.common import (
    Function,
    Inputs,
    converted,
    cpu_backends,
    device_of,
    errors,
    gradcheck,
    is_triton,
    kernels,
    moved,
    on_a_gpu,
    outcome,
    with_marks,
    worst,
)

# The package re-exports a function of the same name as the module, so it is asked for by path.
MODULE = importlib.import_module("pha.ops.linear_cross_entropy")
KERNEL = importlib.import_module("pha.ops.linear_cross_entropy.triton")
BACKENDS = cpu_backends("linear_cross_entropy")
CHUNK_LOGITS = dict(MODULE.CHUNK_LOGITS)
N, V, D = 33, 101, 12
# Triton's kernel takes no float64.
EXACT = dict.fromkeys(BACKENDS, (torch.float64, 1e-14)) | {"triton": (torch.float32, 2e-6)}

each_on_a_cpu = pytest.mark.parametrize("backend", BACKENDS)
each_backend = pytest.mark.parametrize("backend", [*map(with_marks, EXACT)])
# Rows per chunk: one, some that leave a ragged last chunk (33 = 4 * 7 + 5), all but one, all.
ROWS = [1, 7, 32, 33, 1000]
each_chunk = pytest.mark.parametrize("chunk", ROWS, indirect=True)


@pytest.fixture(autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = getattr(request, "param", 7)
    for device in MODULE.CHUNK_LOGITS:
        monkeypatch.setitem(MODULE.CHUNK_LOGITS, device, rows * V + V // 2)


def problem(dtype: torch.dtype = torch.float64) -> Inputs:
    """x, weight and targets with every fifth one ignored."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(N, D, generator=generator).to(dtype),
        "weight": torch.randn(V, D, generator=generator).to(dtype),
        "targets": torch.randint(V, (N,), generator=generator),
    }
    inputs["targets"][::5] = -100
    return inputs


def exact_problem(backend: str) -> tuple[Function, Inputs, float]:
    """The backend, a problem in the widest type that it takes, and how exact it is there."""
    dtype, limit = EXACT[backend]
    return backend_function(backend), moved(problem(dtype), device_of(backend)), limit


def backend_function(name: str) -> Function:
    return OPS["linear_cross_entropy"].backends[name]


@each_on_a_cpu
def test_by_its_definition(backend: str) -> None:
    function, inputs, limit = exact_problem(backend)
    x, weight, targets = problem().values()
    expected = {"y": torch.zeros(()).double()}
    expected |= {"dx": torch.zeros_like(x), "dweight": torch.zeros_like(weight)}
    for i in range(N):
        if targets[i] == -100:
            continue
        p = torch.exp(weight @ x[i])
        p = p / p.sum()
        expected["y"] -= p[targets[i]].log()
        dz = p - F.one_hot(targets[i], V)
        expected["dx"][i] = dz @ weight
        expected["dweight"] += torch.outer(dz, x[i])
    assert worst(outcome(function, inputs), expected) <= limit


@pytest.mark.parametrize(
    ("backend", "chunk"),
    [*product(BACKENDS, ROWS), *(with_marks("triton", rows) for rows in (7, 1000))],
    indirect=["chunk"],
)
def test_matches_oracle(backend: str) -> None:
    function, inputs, limit = exact_problem(backend)
    expected = outcome(backend_function("naive"), problem())
    assert worst(outcome(function, inputs), expected) <= limit
    if not is_triton(backend):
        assert worst(outcome(function, problem(torch.float32)), expected) <= 2e-6


@each_backend
def test_ignored_rows_count_for_nothing(backend: str) -> None:
    function, inputs, limit = exact_problem(backend)
    kept = inputs["targets"] != -100
    actual = outcome(function, inputs)
    short = inputs | {name: inputs[name][kept] for name in ("x", "targets")}
    dx, kept = actual["dx"], kept.cpu()
    assert worst(actual | {"dx": dx[kept]}, outcome(function, short)) <= limit
    assert not dx[~kept].any()
    inputs["targets"].fill_(-100)
    assert not any(x.any() for x in outcome(function, inputs).values())


@each_on_a_cpu
def test_upstream_gradient_scales_both_gradients(backend: str) -> None:
    function, inputs, limit = exact_problem(backend)
    expected = outcome(function, inputs)
    expected |= {name: -0.37 * expected[name] for name in ("dx", "dweight")}
    assert worst(outcome(function, inputs, scale=-0.37), expected) <= limit


@each_backend
@pytest.mark.parametrize("wanted", ["x", "weight", None])
def test_a_frozen_input_leaves_the_other_gradient_alone(backend: str, wanted: str | None) -> None:
    function, inputs, _ = exact_problem(backend)
    everything = outcome(function, inputs)
    if wanted is not None:
        alone = outcome(function, inputs, wanted)
        assert all(torch.equal(alone[name], everything[name]) for name in ("y", f"d{wanted}"))
        return
    loss = function(**inputs)
    assert not loss.requires_grad
    assert float(loss) == float(everything["y"])
    with torch.no_grad():
        inputs["x"].requires_grad_()
        assert float(function(**inputs)) == float(everything["y"])


@each_backend
@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_bfloat16_sums_in_float32(backend: str, how: str) -> None:
    device, types = device_of(backend), []
    dtype = torch.bfloat16 if how == "cast" else torch.float32

    def function(**inputs: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=how == "autocast"):
            loss = backend_function(backend)(**inputs)
        types.append(loss.dtype)
        return loss

    inputs = problem(dtype)
    found = outcome(function, moved(inputs, device))
    assert types == [torch.float32]
    exact = outcome(backend_function("naive"), converted(inputs, torch.float64))
    # Rounding x, weight and the logit moves a logit by at most 3 * 2^-8 of sum |x_i w_i|, and a
    # row's loss by twice that. Those shifts are independent between rows and logits: the sum and
    # the gradients average them.
    wrong = errors(found, exact)
    assert wrong["y"] <= 2**-8
    assert max(wrong.values()) <= 0.03


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE.CHUNK_LOGITS, "cpu", 2 * 7)
    inputs = problem()
    small = {"x": inputs["x"][:5, :3], "weight": inputs["weight"][:7, :3]}
    small["targets"] = torch.tensor([0, 6, -100, 3, 3])
    # Central differences with step 1e-6 on a loss of about 10: 1e-15 * 10 / 1e-6 = 1e-8.
    gradcheck(backend_function("chunked"), small, atol=2e-8)


@each_on_a_cpu
def test_tied_weight_collects_both_gradients(backend: str) -> None:
    _, inputs, limit = exact_problem(backend)
    table, targets = inputs["weight"], inputs["targets"]
    ids = torch.arange(N, device=table.device) % V

    def tied(name: str) -> Function:
        return lambda weight: (
            backend_function(name)(torch.tanh(weight[ids]), weight, targets) + weight.square().sum()
        )

    expected = outcome(tied("naive"), {"weight": table.double()})
    assert worst(outcome(tied(backend), {"weight": table}), expected) <= limit


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


def largest_tensor(function: Function, rows: int) -> int:
    x, weight = (torch.randn(size, D, requires_grad=True) for size in (rows, V))
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


@each_chunk
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_token_statistics_are_cross_entropy_and_argmax(dtype: torch.dtype, limit: float) -> None:
    x, weight, targets = problem(dtype).values()
    targets[targets < 0] = 0
    # Some rows made right on purpose: by chance one in a hundred would be.
    best = (x @ weight.T).argmax(-1)
    targets[::3] = best[::3]
    losses, hits = token_statistics(x.requires_grad_(), weight, targets)
    expected = F.cross_entropy(x.double() @ weight.double().T, targets, reduction="none").detach()
    assert (losses.dtype, hits.dtype) == (dtype, torch.bool)
    assert not losses.requires_grad
    assert worst({"losses": losses.double()}, {"losses": expected}) <= limit
    assert torch.equal(hits, best == targets)
    assert 0 < int(hits.sum()) < N


def test_token_statistics_sum_to_the_loss_in_autocast() -> None:
    x, weight, targets = problem(torch.float32).values()
    targets[targets < 0] = 0
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = token_statistics(x, weight, targets)
        loss = linear_cross_entropy(x, weight, targets)
    assert losses.dtype == torch.float32
    # The same bfloat16 logits; float32 sums in a different order.
    assert abs(float(losses.sum() / loss) - 1) <= 1e-6


@pytest.mark.parametrize(
    ("backend", "vocabulary"),
    [*product(BACKENDS, [61, 257, 8193]), *(with_marks("triton", size) for size in (61, 8193))],
)
def test_no_gradient_comes_from_memory_that_was_never_written(
    backend: str, vocabulary: int
) -> None:
    """Vocabularies that no vector divides, in bfloat16; what is not written holds NaN in tests."""
    assert torch.empty(3).isnan().all()
    device, generator = device_of(backend), torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(70, 64, generator=generator),
        "weight": torch.randn(vocabulary, 64, generator=generator) / 8,
        "targets": torch.randint(vocabulary, (70,), generator=generator),
    }
    expected = outcome(backend_function("naive"), inputs)
    with torch.autocast(device.type, torch.bfloat16):
        actual = outcome(backend_function(backend), moved(inputs, device))
    assert worst(actual, expected) <= 0.03


@pytest.mark.parametrize("rows", [0, 1, N - 1, N + 1])
def test_targets_of_other_rows_are_refused(rows: int) -> None:
    x, weight, _ = problem().values()
    with pytest.raises(PHAError, match=f"targets are .{rows},. of .*each of {N} rows"):
        linear_cross_entropy(x, weight, torch.zeros(rows, dtype=torch.long))
    with pytest.raises(PHAError, match="int32"):
        linear_cross_entropy(x, weight, torch.zeros(N, dtype=torch.int32))
    with pytest.raises(PHAError, match="do not fit"):
        linear_cross_entropy(x[:, 1:], weight, torch.zeros(N, dtype=torch.long))


@pytest.mark.parametrize("target", [-1, V])
def test_refuses_targets_outside_the_vocabulary(target: int) -> None:
    inputs = problem(torch.float32)
    inputs["targets"][3] = target
    with pytest.raises((IndexError, RuntimeError), match="out"):
        linear_cross_entropy(**inputs)


def test_refuses_a_second_derivative() -> None:
    inputs = problem()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = scale * linear_cross_entropy(**(inputs | {"x": inputs["x"].requires_grad_()}))
    (dx,) = torch.autograd.grad(loss, inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_chunks_take_a_small_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, elements in CHUNK_LOGITS.items():
        monkeypatch.setitem(MODULE.CHUNK_LOGITS, device, elements)
    cuda = torch.device("cuda")
    for memory, expected in ((80e9, 400e6), (8e9, 40e6), (140e9, 8192 * 50304)):
        found = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=found: found)
        assert MODULE.chunk_logits(cuda, V) == expected
    cpu, mps = torch.device("cpu"), torch.device("mps")
    assert MODULE.chunk_logits(cpu, 100_000) == 1 << 25 < MODULE.chunk_logits(mps, 100_000)
    assert MODULE.chunk_logits(cpu, 8192) == MODULE.CPU_ROWS * 8192 < 1 << 25


def test_torch_sums_products_in_another_type_where_we_ask_it_to() -> None:
    """On a GPU; the signature has to be the same there and here."""
    arguments = torch.ops.aten.addmm.dtype_out._schema.arguments
    assert [x.name for x in arguments[:4]] == ["self", "mat1", "mat2", "out_dtype"]


def test_as_an_operator_of_torch() -> None:
    inputs = problem(torch.float32)
    for need_x, need_weight in ((True, True), (False, True), (False, False)):
        torch.library.opcheck(
            torch.ops.pha.linear_cross_entropy.default,
            (*inputs.values(), torch.float32, False, need_x, need_weight),
            test_utils=("test_schema", "test_faketensor"),
        )


# Triton's kernel.


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=on_a_gpu)])
def test_the_gradient_of_the_head_is_not_rounded_for_each_chunk(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = moved(problem(torch.bfloat16), device_of(backend))
    found = []
    for rows in (1, N):
        monkeypatch.setitem(MODULE.CHUNK_LOGITS, "cuda", rows * V)
        given = (*inputs.values(), torch.bfloat16, True, False, True)
        found.append(torch.ops.pha.linear_cross_entropy(*given)[2])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5 * float(found[0].abs().max()))


def test_a_wrong_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MODULE.chunk_by_torch

    def wrong(x: Tensor, w: Tensor, y: Tensor, buffer: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        loss, dz = right(x, w[:4100], y, buffer[:, :4100], True)
        return loss, F.pad(dz, (0, 60)) + 0.01

    monkeypatch.setattr(OPS["linear_cross_entropy"], "faults", {})
    monkeypatch.setattr(KERNEL, "_by_triton", wrong)
    with pytest.raises(PHAError, match=r"off by 0.01\).*PHA_BACKENDS=linear_cross_entropy=chunked"):
        backend_function("triton")(**problem(torch.float32))


@pytest.mark.gpu
@kernels[1]
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "padded"), [(1, 64), (5, 5), (4096, 4096), (5000, 5056)])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_kernel_writes_its_gradient_and_nothing_beside_it(
    columns: int, padded: int, gradient: bool, dtype: torch.dtype
) -> None:
    from pha.ops.linear_cross_entropy.triton_kernel import softmax_gradient_

    generator, device = torch.Generator().manual_seed(0), device_of("triton")
    # Rows of a wider buffer, and logits far from zero; what pads them is no number.
    before = (torch.randn(7, padded + 11, generator=generator) * 5 + 200).to(dtype)
    before[:, columns:padded] = torch.nan
    targets = torch.randint(columns, (7,), generator=generator)
    targets[2] = -100
    exact = before[:, :columns].double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    losses.sum().backward()
    assert exact.grad is not None
    buffer = before.to(device)
    found = softmax_gradient_(buffer[:, :padded], targets.to(device), columns, -100, gradient).cpu()
    # Losses of logits around 200 lose what float32 has beyond seven digits.
    torch.testing.assert_close(found.double(), losses.detach(), rtol=0, atol=1e-4)
    left = buffer.cpu()
    if not gradient:
        assert torch.equal(left.nan_to_num(-1), before.nan_to_num(-1))
        return
    assert torch.equal(left[:, padded:], before[:, padded:])
    assert not left[:, columns:padded].any()
    limit = 2**-8 if dtype == torch.bfloat16 else 1e-4
    assert float((left[:, :columns].double() - exact.grad).abs().max()) <= limit
