"""The value of a key at which a model has as many parameters as another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from pha.model import ArchitectureConfig
from pha.model.parameters import count_parameters
from pha.model.presets import PRESETS
from pha.train.keys import recipe_keys, require_keys
from pha.train.recipes import Settings, load_recipe
from pha.utils.errors import PHAError

CLOSE = 1e-3
"""Of all parameters: two models within this are called equal."""

FINEST = 1e-3  # between two numbers that are tried where a key is no whole number
LARGEST = 1 << 24


@dataclass(frozen=True)
class Match:
    """What was found."""

    value: float  # of the key
    parameters: int
    wanted: int

    @property
    def difference(self) -> float:
        """Of all parameters wanted."""
        return self.parameters / self.wanted - 1


def read_architecture(name: str, settings: Settings, vocab_size: int) -> ArchitectureConfig:
    """The architecture of a preset or recipe with keys changed; it needs no data.

    Raises:
        PHAError: no such recipe, or an impossible setting.
    """
    recipe = f"{name}.text" if name in PRESETS else name
    no_data = {"data.store": "none", "data.task_options": {}, "data.tests": {}}
    config = load_recipe(recipe, no_data | settings)
    if config.transformers.name is not None:
        raise PHAError(f"{name} is a model of transformers; this counts those of ours")
    return replace(config.model, vocab_size=vocab_size)


def find_match(config: ArchitectureConfig, key: str, wanted: int) -> Match:
    """The value of `key` at which `config` comes closest to so many parameters.

    Args:
        config: the model to change.
        key: `model.FIELD`, or `model.branch_options.BRANCH.OPTION` for an option of a branch. More
            of it must be more parameters.
        wanted: parameters of the other model.

    Raises:
        PHAError: no such key, none that is a number, or one that changes no parameters.
    """
    change, is_whole = _changer(config, key)
    count_parameters(config)  # what is wrong with the rest of it is said as it is

    def parameters(value: float) -> int | None:
        try:
            changed = change(int(value) if is_whole else value)
            changed.check()
            return sum(count_parameters(changed).values())
        except PHAError:
            return None

    step: float = FINEST
    if is_whole:  # of which some have to be multiples, as a state of whole groups
        possible = (n for n in (1, 2, 4, 8, 16, 32) if parameters(2 * n) and parameters(3 * n))
        step = next(possible, 0)
    first = next((n for n in range(1, 1000) if parameters(n * step) is not None), None)
    if step == 0 or first is None:
        raise PHAError(f"{key} has no value that this model can have; choose another --by")
    low, high = first, 2 * first
    if parameters(low * step) == parameters(64 * low * step):
        raise PHAError(f"{key} changes no parameters; choose another --by")
    while (found := parameters(high * step)) is not None and found < wanted:
        low, high = high, 2 * high
        if high * step > LARGEST:
            raise PHAError(f"no {key} up to {LARGEST:,} gives {wanted:,} parameters")
    while high - low > 1:
        middle = (low + high) // 2
        found = parameters(middle * step)
        low, high = (middle, high) if found is not None and found < wanted else (low, middle)
    tried = {n: parameters(n * step) for n in (low, high)}
    known = {n: found for n, found in tried.items() if found is not None}
    best = min(known, key=lambda n: abs(known[n] - wanted))
    value = best * step
    return Match(value if is_whole else round(value, 6), known[best], wanted)


def _changer(
    config: ArchitectureConfig, key: str
) -> tuple[Callable[[float], ArchitectureConfig], bool]:
    """What makes the configuration with another value of a key, and whether that is a whole number.

    Raises:
        PHAError: no such key, or none that is a number.
    """
    require_keys([key])
    section, field, *inside = key.split(".")
    if section == "model" and field == "branch_options" and len(inside) == 2:
        branch, option = inside

        def change_option(value: float) -> ArchitectureConfig:
            options = copy.deepcopy(config.branch_options)
            options.setdefault(branch, {})[option] = value
            return replace(config, branch_options=options)

        return change_option, True
    kind = recipe_keys()[f"{section}.{field}"].hint
    if section != "model" or inside or kind not in (int, float):
        raise PHAError(
            f"--by {key}: name a number of the model, such as model.state_size, or an option of a "
            "branch, such as model.branch_options.NAME.OPTION"
        )
    return lambda value: replace(config, **{field: value}), kind is int
