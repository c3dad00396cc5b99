"""FlexAttention: which positions it visits, and when it is asked at all. Its kernels need a GPU."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor

from pha.ops import OPS
from pha.ops.attention import attention_mask
from pha.ops.attention import flex as attention_flex
from pha.ops.attention.flex import block_mask, flex, serves, usable

NAIVE = OPS["attention"].backends["naive"]
SHAPES = [(2, 4, 2, 160, 60), (1, 6, 2, 131, 20), (2, 2, 2, 257, 16), (1, 3, 1, 1, 24)]
BOUNDS = [(True, None), (False, 40), (True, 40), (True, 1)]


def inputs(
    shape: tuple[int, ...], device: torch.device, documents: bool
) -> tuple[list[Tensor], Tensor | None]:
    B, H, G, T, K = shape
    generator = torch.Generator().manual_seed(T)
    q, k, v = (
        (torch.randn(B, heads, T, K, generator=generator) * 0.4).to(device) for heads in (H, G, G)
    )
    starts = (torch.rand(B, T, generator=generator) < 0.04).to(device)
    return [q, k, v], attention_mask(T, T, device, starts) if documents else None


@pytest.fixture
def quiet() -> None:
    """Without compiling, torch warns that FlexAttention writes everything out."""
    warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("documents", "window"), BOUNDS)
def test_values_are_the_oracle_s(
    shape: tuple[int, ...], documents: bool, window: int | None
) -> None:
    qkv, mask = inputs(shape, torch.device("cpu"), documents)
    torch.testing.assert_close(flex(*qkv, mask, window), NAIVE(*qkv, mask, window))


@pytest.mark.usefixtures("quiet")
def test_the_last_queries_of_more_keys_look_where_they_should() -> None:
    (q, k, v), _ = inputs((2, 4, 2, 140, 20), torch.device("cpu"), False)
    q = q[:, :, -50:]
    torch.testing.assert_close(flex(q, k, v, None, 30), NAIVE(q, k, v, None, 30))


def test_blocks_out_of_reach_are_skipped() -> None:
    cpu = torch.device("cpu")
    counts = block_mask(None, 128, 1024, 1024, cpu).to_dense().sum((-1, -2))
    assert counts.item() == 8 + 7  # the diagonal of 128 x 128 blocks and the one below
    starts = torch.zeros(2, 1024, dtype=torch.bool)
    starts[1, 512] = True
    counts = block_mask(attention_mask(1024, 1024, cpu, starts), None, 1024, 1024, cpu).to_dense()
    assert counts.sum((-1, -2)).flatten().tolist() == [36, 20]


def test_the_blocks_of_a_mask_are_found_once_and_go_with_it() -> None:
    mask: Tensor | None = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
    assert mask is not None
    first = block_mask(mask, None, 256, 256, mask.device)
    assert block_mask(mask, None, 256, 256, mask.device) is first
    assert block_mask(mask, 9, 256, 256, mask.device) is not first
    kept = len(attention_flex._masks)
    mask = None
    gc.collect()
    assert len(attention_flex._masks) == kept - 1


def test_blocks_that_an_evaluation_found_serve_training() -> None:
    attention_flex._unmasked.cache_clear()
    with torch.inference_mode():
        blocks = attention_flex._unmasked(37, 150, 150, torch.device("cpu"))
    assert not blocks.kv_num_blocks.is_inference()


def test_on_a_cpu_it_is_not_asked() -> None:
    (q, k, _), mask = inputs(SHAPES[0], torch.device("cpu"), True)
    assert not serves(q, k, mask, None)


def test_where_it_does_not_work_it_is_left_alone_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(device: torch.device) -> float:
        raise ValueError("no compiler")

    for trial, reason in ((fail, "ValueError: no compiler"), (lambda _: 0.5, "error is 5.0e-01")):
        attention_flex.fault.cache_clear()
        monkeypatch.setattr(attention_flex, "_trial", trial)
        with pytest.warns(RuntimeWarning, match=reason):
            assert not usable()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not usable()
    attention_flex.fault.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize(("documents", "window"), BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_on_a_gpu(
    shape: tuple[int, ...],
    documents: bool,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if device.type != "cuda":
        pytest.skip("has no backward pass on a CPU")
    qkv, mask = inputs(shape, device, documents)
    assert serves(qkv[0], qkv[1], mask, window)
    results = []
    for function, kind in ((flex, dtype), (NAIVE, torch.float64)):
        leaves = [x.to(dtype).to(kind).requires_grad_() for x in qkv]
        y = function(*leaves, mask, window)
        weights = torch.linspace(-1, 1, y.numel(), device=device).view_as(y).to(kind)
        gradients = torch.autograd.grad((y * weights).sum(), leaves)
        results.append([x.detach().double() for x in (y, *gradients)])
    # FlexAttention multiplies float32 in TF32 where torch allows it, which it does not by default.
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for got, exact in zip(*results, strict=True):
        assert (got - exact).abs().max() <= limit * exact.abs().max()
