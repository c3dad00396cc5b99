"""Losses of every token of a split, kept in a file with what they belong to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pha.data.store import TokenStore
from pha.evals.protocols import Protocol
from pha.results import Evaluation
from pha.utils.errors import PHAError
from pha.utils.files import atomic_file
from pha.utils.records import record_from

_KEY = "pha"


@dataclass(frozen=True)
class _About:
    """What the losses belong to, as JSON in the file's metadata."""

    model: str
    protocol: Protocol
    evaluation: Evaluation


@dataclass(frozen=True)
class KeptNats:
    """What a model makes of every token of a split of N tokens.

    Attributes:
        model: its name.
        evaluation: what `pha eval` says of it; split and hash of the data are in it.
        protocol: the windows.
        nats: (N - 1,) float32; entry i is -log p of token i + 1.
    """

    model: str
    evaluation: Evaluation
    protocol: Protocol
    nats: np.ndarray

    def write(self, path: Path) -> None:
        """Write a safetensors file of one tensor, `nats`."""
        from safetensors.numpy import save_file

        about = _About(self.model, self.protocol, self.evaluation)
        with atomic_file(path) as temporary:
            save_file({"nats": self.nats}, temporary, {_KEY: json.dumps(asdict(about))})

    @classmethod
    def read(cls, path: Path, store: TokenStore, split: str) -> KeptNats:
        """Read a file and check that it is of this split of this store.

        Raises:
            PHAError: no such file, or one of other data or another split.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                about = record_from(_About, json.loads(file.metadata()[_KEY]), str(path))
                nats = file.get_tensor("nats")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise PHAError(f"{path} is not a file of `pha eval --nats`; make it again") from error
        evaluation = about.evaluation
        if evaluation.split != split:
            raise PHAError(
                f"{path} is of the {evaluation.split} split; add --split {evaluation.split}"
            )
        if evaluation.protocol.get("data_sha256") != store.sha256:
            raise PHAError(f"{path} is of other data than {store.path}; name its store")
        if nats.shape != (store.counts(split).tokens - 1,) or nats.dtype != np.float32:
            raise PHAError(f"{path} is damaged: it does not hold a loss for every token")
        return cls(about.model, evaluation, about.protocol, nats)
