"""Peers from transformers at the size of our models: shapes only, the weights are random.

Shapes follow the published families at this scale; the targets are the sizes, with GPT-2's
vocabulary, at which they stand beside pha-125m and pha-180m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

PREFIX = "hf:"
"""Before the name of a model of transformers."""


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


def _mamba(width: int, layers: int, heads: int, head_dim: int, state: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_heads": heads,
        "head_dim": head_dim,
        "state_size": state,
        "n_groups": 1,
    }


def _hybrid(heads: int, head_dim: int, state: int) -> dict[str, Any]:
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": head_dim,
        "mamba_d_state": state,
        "mamba_n_groups": 1,
    }


_TIED = {"tie_word_embeddings": True}
# The others have none by default; it would keep attention off the fast path in training.
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
# Jamba's layers of attention are one in eight, and none has experts here.
_JAMBA = _TIED | {"num_experts": 1, "num_experts_per_tok": 1}
_GPT2_TINY = {"n_embd": 64, "n_layer": 2, "n_head": 4}

PEERS: dict[str, Peer] = {
    "gpt2": Peer("gpt2", 130e6, _NO_DROPOUT),
    "llama": Peer("llama", 183e6, _TIED | _sizes(768, 24, 12, 4, 1920)),
    "falcon-h1": Peer(
        "falcon_h1",
        174e6,
        _TIED | _sizes(768, 12, 12, 4, 2560) | _hybrid(24, 64, 128) | {"mamba_d_ssm": 1536},
    ),
    "mamba2": Peer("mamba2", 129e6, _TIED | _mamba(768, 24, 24, 64, 128)),
    "recurrent-gemma": Peer("recurrent_gemma", 123e6, _sizes(768, 12, 6, 1, 4608)),
    "mamba": Peer("mamba", 129e6, {"hidden_size": 768, "num_hidden_layers": 24}),
    "jamba": Peer("jamba", 126e6, _JAMBA | _sizes(640, 16, 10, 2, 1792)),
    "bamba": Peer(
        "bamba",
        129e6,
        _TIED
        | _sizes(768, 12, 12, 4, 1792)
        | _hybrid(24, 64, 128)
        | {"attn_layer_indices": [4, 10]},
    ),
    # Miniatures, for trying a command out before the real models are paid for.
    "gpt2-tiny": Peer("gpt2", None, _NO_DROPOUT | _GPT2_TINY),
    "llama-tiny": Peer("llama", None, _TIED | _sizes(64, 2, 4, 2, 160)),
    "falcon-h1-tiny": Peer(
        "falcon_h1",
        None,
        _TIED | _sizes(64, 2, 4, 2, 160) | _hybrid(4, 32, 16) | {"mamba_d_ssm": 128},
    ),
    "mamba2-tiny": Peer("mamba2", None, _TIED | _mamba(64, 2, 4, 32, 16)),
    "recurrent-gemma-tiny": Peer("recurrent_gemma", None, _sizes(64, 3, 4, 1, 320)),
    "mamba-tiny": Peer("mamba", None, {"hidden_size": 64, "num_hidden_layers": 2}),
    "jamba-tiny": Peer(
        "jamba",
        None,
        _JAMBA | _sizes(64, 2, 4, 2, 160) | {"attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "bamba-tiny": Peer(
        "bamba",
        None,
        _TIED | _sizes(64, 2, 4, 2, 160) | _hybrid(4, 32, 16) | {"attn_layer_indices": [1]},
    ),
}
"""By the name that follows `hf:`."""


def peer_config(
    model_type: str, shape: Mapping[str, Any], vocab_size: int, positions: int
) -> PreTrainedConfig:
    """The configuration of a model with random weights, without special tokens.

    Args:
        model_type: its name in transformers.
        shape: fields of its configuration, which win over the others.
        vocab_size: V.
        positions: tokens that it must be able to read, where that is a matter of its shape.
    """
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": positions}
    return AutoConfig.for_model(model_type, **(sizes | special | dict(shape)))


def peer_names() -> list[str]:
    """Names after `hf:`, miniatures left out."""
    return [name for name, peer in PEERS.items() if peer.parameters is not None]


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
