"""The Parallel Hybrid Architecture: gated state space, attention and feed-forward side by side.

`from pha import PHAForCausalLM` also makes the model known to transformers' Auto classes.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pha.modeling import PHAConfig, PHAForCausalLM

__version__ = metadata.version("pha")
__all__ = ["PHAConfig", "PHAForCausalLM", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing torch and transformers takes seconds; `pha --help` should not.
    if name in ("PHAConfig", "PHAForCausalLM"):
        from pha import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module 'pha' has no attribute {name!r}")
