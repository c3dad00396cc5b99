"""Times of training that another study measured: of the same variants, on one machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pha.results import hardware
from pha.utils.errors import PHAError
from pha.utils.formats import read_json
from pha.utils.records import record_from


@dataclass(frozen=True)
class _Mean:
    mean: float


@dataclass(frozen=True)
class _Seed:
    provenance: dict[str, Any] | None = None  # of a run that has ended well


@dataclass(frozen=True)
class _Variant:
    name: str
    measures: dict[str, _Mean]
    seeds: list[_Seed]


@dataclass(frozen=True)
class _Study:
    variants: list[_Variant]


@dataclass(frozen=True)
class Times:
    """Training speeds by variant."""

    path: Path  # of the `study.json` that they are from
    speeds: dict[str, float]  # variant -> tokens a second, the mean over its seeds
    hardware: str  # that all of them are of

    @classmethod
    def read(cls, path: Path, needed: Iterable[str]) -> Times:
        """Read a `study.json`, or the one in a folder, for these variants.

        Raises:
            PHAError: it is no study's, has no times, as its runs are of different hardware, or
                lacks a variant.
        """
        path = path / "study.json" if path.is_dir() else path
        variants = record_from(_Study, read_json(path), f"{path}: study").variants
        speeds = {v.name: v.measures["speed"].mean for v in variants if "speed" in v.measures}
        if not speeds:
            raise PHAError(f"{path} has no times; give a study whose runs are of one machine")
        for name in needed:
            if name not in speeds:
                raise PHAError(f"{path} has no time of {name}, only of {', '.join(speeds)}")
        origins = [s.provenance for v in variants for s in v.seeds if s.provenance]
        return cls(path, speeds, hardware(origins[0]))

    def of(self, variant: str, tokens: int) -> dict[str, float]:
        """The measures `speed`, and `seconds` of training on so many tokens."""
        return {"speed": self.speeds[variant], "seconds": tokens / self.speeds[variant]}
