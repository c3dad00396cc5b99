"""The Parallel Hybrid Architecture: gated state space, attention and feed-forward side by side.

`import pha` makes the model known to transformers' Auto classes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pha.utils.versions import own_version

if TYPE_CHECKING:
    from pha.modeling import PHAConfig, PHAForCausalLM

__version__ = own_version()
__all__ = ["PHAConfig", "PHAForCausalLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("PHAConfig", "PHAForCausalLM"):
        from pha import modeling

        return getattr(modeling, name)
    raise AttributeError(f"module 'pha' has no attribute {name!r}")


# Torch and transformers take seconds to import. A program that says `import pha` wants them; the
# commands `pha` and `python -m pha` (whose name is not known yet here) import them when they must.
if Path(sys.argv[0] if sys.argv else "").name not in ("pha", "-m"):
    from pha import modeling as modeling
