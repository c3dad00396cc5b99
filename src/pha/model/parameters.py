"""Counting parameters by component, without allocating any."""

from __future__ import annotations

from collections import Counter

import torch

from pha.model.backbone import Backbone
from pha.model.config import ArchitectureConfig


def count_parameters(config: ArchitectureConfig) -> dict[str, int]:
    """Parameters by component; the tied output head counts once, as the embedding.

    Returns:
        `embedding`, one entry for each branch (by its name),
        `primary_ffn`, `norms_and_mixing`.
    """
    with torch.device("meta"):
        backbone = Backbone(config)
    counts: Counter[str] = Counter({"embedding": 0})
    counts.update(dict.fromkeys(config.branch_names, 0))
    counts.update({"primary_ffn": 0, "norms_and_mixing": 0})
    for name, parameter in backbone.named_parameters():
        parts = name.split(".")
        if parts[0] == "embed_tokens":
            counts["embedding"] += parameter.numel()
        elif "branches" in parts:
            counts[parts[parts.index("branches") + 1]] += parameter.numel()
        elif "primary_ffn" in parts:
            counts["primary_ffn"] += parameter.numel()
        else:
            counts["norms_and_mixing"] += parameter.numel()
    return dict(counts)
