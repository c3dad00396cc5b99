"""Windows of attention that change from step to step: a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pha.utils.errors import PHAError

Windows = dict[str, float] | list[list[int | str]]
"""Window -> how often, drawn anew at every step; or [step, window], each from its step on."""

FULL = "full"  # the window of the model itself, if it has any


def check_windows(windows: Windows | None) -> None:
    """Refuse what is neither odds nor a schedule.

    Raises:
        PHAError: saying what would be right.
    """
    if windows is None:
        return
    what = f"run.windows is {windows}"
    if isinstance(windows, dict):
        odds = list(windows.values())
        if not odds or min(odds) < 0 or not abs(sum(odds) - 1) <= 1e-6:
            raise PHAError(
                f"{what}; give odds of windows that sum to 1, such as {{16: 0.5, full: 0.5}}"
            )
        names: list[Any] = list(windows)
    else:
        if not windows or any(len(pair) != 2 for pair in windows):
            raise PHAError(f"{what}; give pairs of step and window, such as [[0, 16]]")
        steps, names = [pair[0] for pair in windows], [pair[1] for pair in windows]
        if steps[0] != 0 or any(type(s) is not int for s in steps) or steps != sorted(set(steps)):
            raise PHAError(f"{what}; steps are whole numbers that grow from 0")
    for name in names:
        if str(name) != FULL and not (str(name).isdecimal() and int(name) >= 2):
            raise PHAError(f"{what}; a window is at least 2, or {FULL}")


def window_at(windows: Windows, seed: int, step: int) -> int | None:
    """The window of a step (counted from 0), or None for that of the model.

    Draws are raw PCG64 output, which numpy promises to keep between versions.
    """
    if isinstance(windows, dict):
        drawn = np.random.PCG64(np.random.SeedSequence([seed, step, 1])).random_raw() / 2**64
        place = np.searchsorted(np.cumsum(list(windows.values())), drawn, side="right")
        name: int | str = list(windows)[min(int(place), len(windows) - 1)]
    else:
        name = next(window for begin, window in reversed(windows) if step >= int(begin))
    return None if name == FULL else int(name)


@contextmanager
def windowed(config: Any, windows: Windows | None, seed: int, step: int) -> Iterator[None]:
    """Give the model of this configuration the window of a step meanwhile."""
    window = None if windows is None else window_at(windows, seed, step)
    if window is None:
        yield
        return
    own, config.attention_window = config.attention_window, window
    try:
        yield
    finally:
        config.attention_window = own
