"""What a person sees while a store is made."""

from __future__ import annotations

import time
from datetime import timedelta

from pha.data.preparation import PreparationState
from pha.utils.progress import ProgressLine


class PreparationDisplay(ProgressLine):
    """Progress of one preparation; a context manager, called with each `PreparationState`."""

    _stage = ""
    _begin = 0.0

    def __call__(self, state: PreparationState) -> None:
        """Show `state`."""
        if state.stage != self._stage:
            self._stage, self._begin = state.stage, time.monotonic()
        status = describe_state(state, time.monotonic() - self._begin)
        self.show(state.stage, status, state.fraction)


def describe_state(state: PreparationState, seconds: float) -> str:
    """What is done, how fast, and how long it will yet take, `seconds` after the stage began."""
    parts = []
    if state.fraction is not None:
        parts.append(f"{state.fraction:.0%}")
    parts += [f"{state.documents:,} documents", f"{state.bytes / 1e6:,.0f} MB"]
    if seconds > 0:
        parts.append(f"{state.bytes / 1e6 / seconds:.1f} MB/s")
        if state.tokens:
            parts.append(f"{state.tokens / seconds:,.0f} tokens/s")
        if state.fraction:
            left = timedelta(seconds=round(seconds * (1 / state.fraction - 1)))
            parts.append(f"{left} left")
    return "  ".join(parts)
