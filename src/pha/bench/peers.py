"""The models of the benchmark: presets and peers from transformers, and what they are said to need.

All have GPT-2's vocabulary and random weights.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pha.model.presets import PRESETS
from pha.modeling import PHAConfig
from pha.ops.attention import causal_pairs
from pha.ops.linear_attention.fla import is_installed
from pha.peers import PEERS, PREFIX, Peer, peer_config, peer_names
from pha.utils.errors import PHAError

VOCABULARY = 50257
CHECKPOINTING = "+gradient_checkpointing"  # behind the name of a model that is trained
CHUNKED = "+chunked_loss"  # behind the name of a peer that is trained with our loss
POSITIONS = 8192  # learned positions of GPT-2 at least; more where a run is longer
STATE_SPACES = ("mamba", "mamba2", "jamba", "falcon_h1", "bamba")


# Models of flash-linear-attention, where that package is installed: training alone.
FLA_PEERS: dict[str, Peer] = {
    "fla-gla": Peer(
        "gla",
        124e6,
        {"hidden_size": 768, "num_hidden_layers": 12, "tie_word_embeddings": True},
    ),
    "fla-gated-deltanet": Peer(
        "gated_deltanet",
        124e6,
        {
            **{"hidden_size": 768, "num_hidden_layers": 9, "tie_word_embeddings": True},
            **{"num_heads": 3, "head_dim": 256},
        },
    ),
}
FLA_TYPES = [peer.model_type for peer in FLA_PEERS.values()]


def fla_peers() -> list[str]:
    """Those that can run here, with `hf:`."""
    return [PREFIX + name for name in FLA_PEERS] if is_installed() else []


@dataclass(frozen=True)
class AttentionShape:
    """What the attention of a model costs: layers that have it, H, G, K, and the window, if any."""

    layers: int
    heads: int
    key_heads: int
    head_dim: int
    window: int | None

    def pairs(self, queries: int, keys: int) -> int:
        """How many (query, key) pairs the last `queries` of `keys` positions look at, causally."""

        def seen(length: int) -> int:
            return causal_pairs(length, min(length, self.window or length))

        return seen(keys) - seen(keys - queries)

    def flops(self, queries: int, keys: int) -> float:
        """Of q k^T and its product with v, in all layers, for one sequence."""
        return 4.0 * self.layers * self.heads * self.head_dim * self.pairs(queries, keys)

    def cached_numbers(self, length: int) -> int:
        """How many numbers the keys and values of `length` tokens are, for one sequence."""
        kept = length if self.window is None else min(length, self.window)
        return 2 * self.layers * self.key_heads * self.head_dim * kept


def model_config(name: str, length: int) -> PreTrainedConfig:
    """The configuration of a model of the benchmark.

    Args:
        name: one of our presets, with fields to change behind a plus sign, as in
            `pha-180m+attention_window=1024`; or `hf:` and the name of a peer.
        length: tokens that it must be able to read.

    Raises:
        PHAError: there is no such model, or the change is not possible.
    """
    name, _, checkpointed = name.partition(CHECKPOINTING)
    if name.startswith(PREFIX):
        name = name.removesuffix(CHUNKED)
    name, *changes = name.split("+")
    if checkpointed or (changes and name not in PRESETS):
        raise PHAError(
            f"{name} cannot be changed so: only presets take +FIELD=VALUE, and {CHECKPOINTING} "
            "comes last"
        )
    if name in PRESETS:
        fields = {"vocab_size": VOCABULARY} | dict(map(_change, changes))
        return PHAConfig.from_preset(name, **fields)
    peers = PEERS | FLA_PEERS
    if name.removeprefix(PREFIX) not in peers or not name.startswith(PREFIX):
        known = [*PRESETS, *(PREFIX + peer for peer in peers)]
        close = difflib.get_close_matches(name, known, n=2, cutoff=0.4) or ["pha-125m", "hf:gpt2"]
        raise PHAError(
            f"there is no model {name!r}; did you mean {' or '.join(close)}? Give presets of "
            "`pha params` or hf: and one of " + ", ".join(peer_names())
        )
    peer = peers[name.removeprefix(PREFIX)]
    if peer.model_type in FLA_TYPES:
        try:
            import fla.models  # noqa: F401  # which makes them known
        except ImportError as error:
            raise PHAError(
                f"{PREFIX}{name} needs flash-linear-attention ({error}); pip install 'pha-lm[fla]'"
            ) from error
    return peer_config(peer.model_type, peer.shape, VOCABULARY, max(POSITIONS, length))


def _change(text: str) -> tuple[str, Any]:
    """FIELD=VALUE, the value as in YAML."""
    field, equals, value = text.partition("=")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        equals = ""
    if not equals:
        raise PHAError(f"+{text} is not FIELD=VALUE, such as +attention_window=1024")
    return field, parsed


def is_ours(name: str) -> bool:
    """Whether a model of the benchmark is a preset, not a peer."""
    return name.split("+")[0] in PRESETS


@functools.cache
def _can_import(package: str) -> bool:
    """Whether a package of kernels is there and of this version of PyTorch."""
    try:
        importlib.import_module(package)
    except Exception:  # whatever its binary code raises
        return False
    return True


def kernels_of(model_type: str, device_type: str, training: bool) -> list[str]:
    """How transformers computes the state spaces of a type of model, in words.

    It takes the functions of mamba_ssm and of causal_conv1d where that package can be imported,
    each without the other, and its own in plain PyTorch elsewhere.

    Raises:
        PHAError: it would call a kernel of mamba_ssm that does not run without causal_conv1d.
    """
    if model_type in FLA_TYPES:
        return ["kernels of flash-linear-attention"]
    if model_type not in STATE_SPACES:
        return []
    scan, convolution = (
        device_type == "cuda" and _can_import(package) for package in ("mamba_ssm", "causal_conv1d")
    )
    if training and scan and not convolution:
        raise PHAError(
            "in training transformers calls the fused kernel of mamba_ssm, which needs "
            "causal_conv1d; install that too, or remove mamba_ssm"
        )
    return [
        f"scan {'by mamba_ssm' if scan else 'in plain PyTorch'}",
        f"convolution {'by causal_conv1d' if convolution else 'in plain PyTorch'}",
    ]


def build(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model with random weights of `dtype`, attention by PyTorch's fused kernels if it has any.

    What a model declares to stay in fp32, as ours does its decays, stays so.
    """
    attends = attention_shape(config).layers > 0
    implementation = {"attn_implementation": "sdpa"} if attends else {}
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **implementation)


def attention_shape(config: PreTrainedConfig) -> AttentionShape:
    """What the attention of any of the models costs."""
    kinds = getattr(config, "layer_types", None)
    # RecurrentGemma's word in older versions of transformers.
    kinds = kinds or getattr(config, "layers_block_type", None)
    kinds = kinds or ["full_attention"] * config.num_hidden_layers
    layers = 0
    if getattr(config, "keeps_keys", config.model_type not in FLA_TYPES):  # ours alone says so
        layers = sum(kind not in ("linear_attention", "recurrent") for kind in kinds)
    heads = getattr(config, "num_attention_heads", 1)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    return AttentionShape(layers, heads, key_heads, head_dim, window)
