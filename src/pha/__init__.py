"""The Parallel Hybrid Architecture: gated state space, attention and feed-forward side by side.

`import pha` makes the model known to transformers' Auto classes.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pha.utils.versions import __version__

if TYPE_CHECKING:
    from pha.modeling import PHAConfig, PHAForCausalLM, PHAModel

__all__ = ["PHAConfig", "PHAForCausalLM", "PHAModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pha import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module 'pha' has no attribute {name!r}")


# Torch and transformers take seconds; the command brings them only where a verb needs them.
if "pha_command" not in sys.modules and sys.orig_argv[1:3] != ["-m", "pha"]:
    from pha import modeling as modeling
