"""The configuration as transformers has it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from pha.model.branches import BRANCHES, Branch
from pha.model.config import ArchitectureConfig, is_old
from pha.model.presets import preset
from pha.utils.errors import PHAError


class PHAConfig(ArchitectureConfig, PreTrainedConfig):
    """`ArchitectureConfig` as a transformers configuration (saved as config.json).

    Raises:
        PHAError: an impossible shape (see `ArchitectureConfig.check`).
    """

    model_type: ClassVar[str] = "pha"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # Where there is no code that travels with a model; programs read it of classes like ours.
    auto_map: ClassVar[dict[str, str]] = {}

    # Tokens of a sequence in training, for programs that ask; nothing here depends on it.
    max_position_embeddings: int = 1024
    # Of the longest ones, where training went on from other weights; None: the line above.
    trained_length: int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.is_remote_code():
            kwargs.pop("auto_map", None)  # of code that travels with a model: this is not that
        if is_old(vars(self) | kwargs):
            raise PHAError(
                "model: this configuration was written by an older version of pha; run `pha "
                "convert FOLDER NEW_FOLDER` on the model's folder"
            )
        self.check()
        super().__post_init__(**kwargs)
        if not self.tie_word_embeddings:
            raise PHAError("model: tie_word_embeddings is false; the paper ties them, and so do we")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> PHAConfig:
        """A published configuration by name (`pha params` lists them), fields replaced at will.

        Raises:
            PHAError: an unknown preset or an impossible shape.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(overrides) - set(known)):
            close = difflib.get_close_matches(unknown[0], known, n=2) or ["a field of PHAConfig"]
            raise PHAError(
                f"model: there is no field {unknown[0]}; did you mean {' or '.join(close)}?"
            )
        return cls(**(preset(name) | overrides))

    @property
    def longest_trained(self) -> int:
        """Tokens of the longest sequences in training."""
        return self.trained_length or self.max_position_embeddings

    @property
    def windows(self) -> list[int | None]:
        """How many keys a query sees in each layer that keeps keys, its own included; None: all."""
        found, of_all = [], self.attention_window
        for branches in self.branches_of_layers():
            own = branches.get("attention", {}).get("window")
            bounds = [w for w in (of_all, own) if isinstance(w, int)]  # others are refused later
            if _keep(branches, "keeps_keys"):
                found.append(min(bounds) if bounds else None)
        return found

    @property
    def sliding_window(self) -> int | None:
        """transformers' word for the most keys that a query sees; None: all, in some layer."""
        windows = self.windows
        bounds = [window for window in windows if window is not None]
        if len(bounds) < len(windows):
            return None
        return max(bounds) if bounds else self.attention_window

    @property
    def has_windows(self) -> bool:
        """Whether attention has a window in some layer, the model's or its own."""
        return self.attention_window is not None or any(self.windows)

    @property
    def layer_types(self) -> list[str]:
        """What each layer keeps in a transformers cache.

        Where no layer keeps keys, the first still has room for them, which then counts the past.
        """
        kept = [
            (_keep(branches, "keeps_keys"), _keep(branches, "states"))
            for branches in self.branches_of_layers()
        ]
        keys_kind, both = "full_attention", "hybrid"
        if not any(keeps_keys for keeps_keys, _ in kept):
            kept[0] = (True, kept[0][1])
        elif self.sliding_window is not None:
            keys_kind, both = "sliding_attention", "hybrid_sliding"
        # A layer that keeps nothing counts as linear: one with keys would be asked for its length.
        kinds = {
            (True, True): both,
            (True, False): keys_kind,
            (False, True): "linear_attention",
            (False, False): "linear_attention",
        }
        return [kinds[layer] for layer in kept]

    @property
    def number_of_conv_states(self) -> int:
        """transformers' word for how many states a layer of the cache has room for."""
        classes = [
            [BRANCHES.get(name, Branch) for name in branches]
            for branches in self.branches_of_layers()
        ]
        return max(1, *(sum(len(cls.states) for cls in layer) for layer in classes))

    @property
    def keeps_keys(self) -> bool:
        """Whether some layer keeps keys and values."""
        return any(_keep(branches, "keeps_keys") for branches in self.branches_of_layers())


def _keep(branches: Iterable[str], what: str) -> bool:
    # A name that is not known here is refused where the model is made.
    return any(bool(getattr(BRANCHES.get(name, Branch), what)) for name in branches)
