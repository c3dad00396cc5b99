"""A table of ops and their backends: which one runs is a visible choice, never a silent one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pha.utils.errors import PHAError

OPS: dict[str, Op] = {}


def _no_fault(backend: str, device_type: str) -> str | None:
    return None


@dataclass
class Op:
    """One operation with interchangeable backends.

    Attributes:
        name: how the op is called in `OPS` and by `pha doctor`.
        backends: name -> function, all with the same signature. `"naive"` is the oracle.
        preferred: device type -> backend name; `"default"` is the fallback for other devices.
        plain: the best form in torch's own operations, which every kernel is measured against.
        limits: backend name -> for which shapes and types it leaves the work to what, in a few
            words.
        check: a self-check that compares a backend with the oracle and returns the largest
            relative error of values and gradients.
        only_on: backend name -> the one device type it is made for; others run on all.
        fault: for a backend and a device type, why something else computes in place of the
            backend there, in a few words; None where it runs, as far as its use has shown.
    """

    name: str
    backends: dict[str, Callable[..., Any]]
    preferred: dict[str, str]
    check: Callable[[Callable[..., Any], Callable[..., Any], str], float]
    only_on: dict[str, str] = field(default_factory=dict)
    fault: Callable[[str, str], str | None] = _no_fault
    plain: str = "torch"
    limits: dict[str, str] = field(default_factory=dict)
    forced: str | None = field(default=None)

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def choice(self, device_type: str) -> str:
        """The backend that runs on tensors of `device_type` (`"cpu"`, `"cuda"`, ...)."""
        return self.forced or self.preferred.get(device_type, self.preferred["default"])

    def runs_on(self, backend: str, device_type: str) -> bool:
        """Whether `backend` is made for tensors of `device_type`."""
        return self.only_on.get(backend, device_type) == device_type

    def describe(self, device_type: str) -> str:
        """What runs on tensors of `device_type`, with its limits or what is wrong with it."""
        chosen = self.choice(device_type)
        if (reason := self.fault(chosen, device_type)) is not None:
            return f"{chosen} cannot run: {reason}"
        return f"{chosen} ({self.limits[chosen]})" if chosen in self.limits else chosen

    def __call__(self, device_type: str) -> Callable[..., Any]:
        """The function of the chosen backend."""
        return self.backends[self.choice(device_type)]

    @contextmanager
    def force(self, backend: str) -> Iterator[None]:
        """Use `backend` for everything inside the block.

        Raises:
            PHAError: there is no such backend.
        """
        if backend not in self.backends:
            known = ", ".join(sorted(self.backends))
            raise PHAError(f"{self.name} has no backend {backend!r}; it has {known}")
        previous, self.forced = self.forced, backend
        try:
            yield
        finally:
            self.forced = previous

    def self_check(self, backend: str, device_type: str) -> float:
        """Largest relative error of `backend` against the oracle on a small random problem."""
        return self.check(self.backends[backend], self.backends["naive"], device_type)


def in_use(device_type: str) -> dict[str, str]:
    """Op -> what runs on tensors of `device_type`: for the log of a run and rows of benchmarks."""
    return {op.name: op.describe(device_type) for op in OPS.values()}


def find_fault(largest_error: Callable[[], float], limit: float, slower: str) -> str | None:
    """Why a kernel cannot be used, found by trying it; None if it can.

    Args:
        largest_error: of the kernel on a small problem.
        limit: of that error.
        slower: what is slower without the kernel, for the warning that gives the reason.
    """
    try:
        error = largest_error()
        reason = None if error <= limit else f"it is off by {error:.1g}"
    except Exception as failure:  # Whatever it is, torch can compute the same.
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
    if reason is not None:
        warnings.warn(f"{slower} ({reason}); see pha doctor", RuntimeWarning, stacklevel=2)
    return reason
