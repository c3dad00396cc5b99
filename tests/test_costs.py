"""FLOPs and state sizes: against hand counts, counted products, and a cache that was filled."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pha import PHAConfig, PHAForCausalLM
from pha.costs import cache_bytes, kept_bytes, training_flops
from pha.mixers.mamba2 import Mamba2
from pha.model import Branch, GroupedQueryAttention
from pha.model.backbone import Backbone
from pha.model.parameters import count_parameters
from pha.model.presets import preset_config
from pha.ops.attention import causal_pairs
from pha.ops.attention.naive import attention_naive
from pha.ops.linear_attention.chunked import chunk_length, chunked_flops, linear_attention_chunked


def test_pairs_of_a_window() -> None:
    for length, window in ((1, 1), (7, 3), (7, 7), (12, 2)):
        seen = sum(
            max(0, q - window) < k <= q for q in range(1, length + 1) for k in range(1, q + 1)
        )
        assert causal_pairs(length, window) == seen


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("K", [16, 64])
def test_linear_attention_counts_its_products(K: int, delta: bool) -> None:
    C, H, P = chunk_length(K), 3, 24
    T = 4 * C
    q, k, v = torch.randn(1, T, H, K), torch.randn(1, T, H, K), torch.randn(1, T, H, P)
    beta = torch.rand(1, T, H) if delta else None
    with FlopCounterMode(display=False) as counter:
        linear_attention_chunked(q, k / 10, v, None, beta)
    # Whole squares are multiplied, of which half are pairs; the solver's products go uncounted.
    squares = H * (2 * C * (K + P + delta * K) + K * P * (4 + 2 * delta))
    assert counter.get_total_flops() == T * squares
    pairs = C + 1
    solved = delta * pairs * (K + P)
    expected = H * (pairs * (K + P + delta * K) + solved + K * P * (4 + 2 * delta))
    assert chunked_flops(H, H, K, P, T, delta) == expected


def test_attention_counts_its_pairs() -> None:
    config = preset_config("pha-tiny")
    branch, T = GroupedQueryAttention(config, 0), 33
    H, K = config.num_attention_heads, config.head_dim
    q, k = torch.randn(1, H, T, K), torch.randn(1, 1, T, K)
    with FlopCounterMode(display=False) as counter:
        attention_naive(q, k, k)
    assert branch.flops(T) * T == counter.get_total_flops() * (T + 1) / (2 * T)
    windowed = GroupedQueryAttention(preset_config("pha-tiny", attention_window=4), 0)
    assert windowed.flops(T) == 4 * H * K * causal_pairs(T, 4) / T
    assert GroupedQueryAttention(config, 0, window=4).flops(T) == windowed.flops(T)


def test_sizes_of_mamba2_at_125m() -> None:
    """H 24, P 64, N 128: 0.89M for linear attention in chunks of 64."""
    branch = Mamba2(preset_config("mamba2-125m"), 0)
    assert branch.flops(1024) == pytest.approx(0.89e6, rel=0.02)


def test_training_flops_are_of_parameters_and_mixers() -> None:
    config, T = preset_config("pha-125m"), 1024
    attention = 4 * 8 * 76 * (T + 1) / 2
    own = config.num_hidden_layers * (attention + 5 * config.state_size)
    expected = 6 * sum(count_parameters(config).values()) + 3 * own
    assert training_flops(config, T) == pytest.approx(expected)


def test_windows_of_layers_bound_the_cache() -> None:
    config, window = preset_config("griffin-125m"), 1024
    assert config.attention_window is None
    states, keys = kept_bytes(config)
    assert cache_bytes(config, 16_384) == states + keys * window


@pytest.mark.parametrize("name", ["pha-tiny", "pha-125m-gated-deltanet-tiny", "mamba-tiny"])
def test_cache_bytes_are_those_of_a_filled_cache(name: str) -> None:
    config = PHAConfig.from_preset(name, vocab_size=19, attention_window=8)
    model, T = PHAForCausalLM(config).eval(), 5
    cache = model.new_cache()
    model(input_ids=torch.zeros(1, T, dtype=torch.long), past_key_values=cache)
    held = 0
    for layer in cache.layers:
        held += sum(state.nbytes for state in layer.recurrent_states.values())
        if config.keeps_keys:
            held += layer.keys.nbytes + layer.values.nbytes
    assert cache_bytes(config, T) == held
    assert cache_bytes(config, 100) - cache_bytes(config, 8) == 0


@pytest.mark.parametrize(
    "name", ["s4d", "h3", "hyena", "pha-125m-mehta", "rg-lru", "mamba", "qrnn"]
)
def test_every_mixer_says_what_it_costs(name: str) -> None:
    preset = name if name.startswith("pha") else f"{name}-125m"
    config, T = preset_config(preset), 1024
    with torch.device("meta"):
        branch = next(x for x in Backbone(config).modules() if isinstance(x, Branch))
    # More than a plain recurrence does for a channel, less than attention's products.
    assert 256 <= branch.flops(T) < 2 * config.hidden_size * (T + 1)
