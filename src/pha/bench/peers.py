"""Peers from transformers at the size of our models: shapes only, the weights are random.

All have GPT-2's vocabulary. Shapes follow the published families at this scale; the targets are
the sizes at which they stand beside pha-125m and pha-180m.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pha.model.presets import PRESETS
from pha.modeling import PHAConfig
from pha.utils.errors import PHAError

VOCABULARY = 50257
CHECKPOINTING = "+gradient_checkpointing"  # behind the name of a model that is trained
PREFIX = "hf:"
POSITIONS = 8192  # learned positions of GPT-2 at least; more where a run is longer


@dataclass(frozen=True)
class Peer:
    """A model of transformers.

    Attributes:
        model_type: its name in transformers.
        parameters: the size that the shape is chosen for; None where it is only for trying out.
        shape: fields of its configuration.
    """

    model_type: str
    parameters: float | None
    shape: dict[str, Any]


def _sizes(width: int, layers: int, heads: int, key_heads: int, ffn: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": ffn,
    }


def _falcon_state(width: int, heads: int, head_dim: int, state: int) -> dict[str, Any]:
    return {
        "mamba_d_ssm": width,
        "mamba_n_heads": heads,
        "mamba_d_head": head_dim,
        "mamba_d_state": state,
    }


def _mamba(width: int, layers: int, heads: int, head_dim: int, state: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_heads": heads,
        "head_dim": head_dim,
        "state_size": state,
        "n_groups": 1,
    }


_TIED = {"tie_word_embeddings": True}
# The others have none by default; it would keep attention off the fast path in training.
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_GPT2_TINY = {"n_embd": 64, "n_layer": 2, "n_head": 4}

PEERS: dict[str, Peer] = {
    "gpt2": Peer("gpt2", 130e6, _NO_DROPOUT),
    "llama": Peer("llama", 183e6, _TIED | _sizes(768, 24, 12, 4, 1920)),
    "falcon-h1": Peer(
        "falcon_h1",
        174e6,
        _TIED | _sizes(768, 12, 12, 4, 2560) | _falcon_state(1536, 24, 64, 128),
    ),
    "mamba2": Peer("mamba2", 129e6, _TIED | _mamba(768, 24, 24, 64, 128)),
    "recurrent-gemma": Peer("recurrent_gemma", 123e6, _sizes(768, 12, 6, 1, 4608)),
    # Miniatures, for trying a command out before the real models are paid for.
    "gpt2-tiny": Peer("gpt2", None, _NO_DROPOUT | _GPT2_TINY),
    "llama-tiny": Peer("llama", None, _TIED | _sizes(64, 2, 4, 2, 160)),
    "falcon-h1-tiny": Peer(
        "falcon_h1", None, _TIED | _sizes(64, 2, 4, 2, 160) | _falcon_state(128, 4, 32, 16)
    ),
    "mamba2-tiny": Peer("mamba2", None, _TIED | _mamba(64, 2, 4, 32, 16)),
    "recurrent-gemma-tiny": Peer("recurrent_gemma", None, _sizes(64, 3, 4, 1, 320)),
}
"""By the name that follows `hf:`."""


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
            reach = length if self.window is None else min(length, self.window)
            return reach * (reach + 1) // 2 + (length - reach) * reach

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
    name, *changes = name.split("+")
    if checkpointed or (changes and name not in PRESETS):
        raise PHAError(
            f"{name} cannot be changed so: only presets take +FIELD=VALUE, and {CHECKPOINTING} "
            "comes last"
        )
    if name in PRESETS:
        fields = {"vocab_size": VOCABULARY} | dict(map(_change, changes))
        return PHAConfig.from_preset(name, **fields)
    if name.removeprefix(PREFIX) not in PEERS or not name.startswith(PREFIX):
        known = [*PRESETS, *(PREFIX + peer for peer in PEERS)]
        close = difflib.get_close_matches(name, known, n=2, cutoff=0.4) or ["pha-125m", "hf:gpt2"]
        raise PHAError(
            f"there is no model {name!r}; did you mean {' or '.join(close)}? Give presets of "
            "`pha params` or hf: and one of " + ", ".join(peer_names())
        )
    peer = PEERS[name.removeprefix(PREFIX)]
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    fields = {"vocab_size": VOCABULARY} | special | peer.shape
    positions = max(POSITIONS, length)
    fields["n_positions" if peer.model_type == "gpt2" else "max_position_embeddings"] = positions
    return AutoConfig.for_model(peer.model_type, **fields)


def peer_names() -> list[str]:
    """Names after `hf:`, miniatures left out."""
    return [name for name, peer in PEERS.items() if peer.parameters is not None]


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


def count_multiplied(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that multiply every token.

    Tables that are only looked up (learned positions, an untied embedding) are not among the
    latter; an embedding that is also the output head is.
    """
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    looked_up = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not head
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(looked_up.values())


def attention_shape(config: PreTrainedConfig) -> AttentionShape:
    """What the attention of any of the models costs."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = 0
    if getattr(config, "keeps_keys", True):  # ours alone says so
        layers = sum(kind != "linear_attention" for kind in kinds)
    heads = getattr(config, "num_attention_heads", 1)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    return AttentionShape(layers, heads, key_heads, head_dim, window)
