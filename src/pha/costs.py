"""What a model does for a token, and what it keeps of a sequence, without computing either."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pha.model import ArchitectureConfig, Branch
from pha.model.backbone import Backbone
from pha.model.config import vars_of
from pha.model.parameters import count_parameters
from pha.modeling import PHAConfig, PHAForCausalLM


def shell(config: ArchitectureConfig) -> PHAForCausalLM:
    """The model with next to no vocabulary, to be counted in on fake tensors."""
    return PHAForCausalLM(PHAConfig(**(vars_of(config) | {"vocab_size": 8})))


def training_flops(config: ArchitectureConfig, length: int) -> float:
    """FLOPs to train on one of `length` tokens, forward and backward.

    Six for each parameter, the tied head once, and three times what the branches say of themselves
    (`Branch.flops`): a backward pass does everything twice.
    """
    with torch.device("meta"):
        branches = [x for x in Backbone(config).modules() if isinstance(x, Branch)]
    own = sum(branch.flops(length) for branch in branches)
    return 6.0 * sum(count_parameters(config).values()) + 3.0 * own


def cache_bytes(config: ArchitectureConfig, length: int) -> int:
    """Bytes that a model keeps of one sequence of `length` tokens to continue it, in float32."""
    states, keys = kept_bytes(config)
    return states + keys * min(length, PHAConfig(**vars_of(config)).sliding_window or length)


def kept_bytes(config: ArchitectureConfig) -> tuple[int, int]:
    """Bytes of the states of one sequence, and of the keys and values of each token, in float32.

    Counted by reading a token on fake tensors, which have shapes and types but no storage.
    """
    with FakeTensorMode(), torch.no_grad():
        model = shell(config).eval()
        cache = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    keys, states = 0, 0
    for layer in cache.layers:
        left = getattr(layer, "recurrent_states", {}).values()
        states += sum(state.nbytes for state in left if state is not None)
        kept = getattr(layer, "keys", None)
        if kept is not None and kept.dtype != torch.bool:  # those only mark what was seen
            keys += kept.nbytes + layer.values.nbytes
    return states, keys
