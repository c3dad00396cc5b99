"""A table of ops and their backends: which one runs is a visible choice, never a silent one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pha.utils.errors import PHAError

OPS: dict[str, Op] = {}
CHOSEN = "PHA_BACKENDS"  # the environment variable by which a user chooses: OP=BACKEND,...


class Trial(NamedTuple):
    """How a kernel is tried before its first use on a device.

    Attributes:
        largest_error: of the kernel on a small problem on a device.
        limit: of that error.
    """

    largest_error: Callable[[torch.device], float]
    limit: float


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
        trials: backend name -> how it is tried, for those that may fail on some machine.
        asked: backends that run, and are tried, only where the user names them.
        forced: the backend of `force`; it wins over the user's choice, and that over `preferred`.
        faults: what the trials have found: see `fault`.
        kernels: what the op's own operators call of an added backend, by name.
    """

    name: str
    backends: dict[str, Callable[..., Any]]
    preferred: dict[str, str]
    check: Callable[[Callable[..., Any], Callable[..., Any], str], float]
    only_on: dict[str, str] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    plain: str = "torch"
    limits: dict[str, str] = field(default_factory=dict)
    forced: str | None = None
    faults: dict[tuple[str, torch.device], str | None] = field(default_factory=dict)
    kernels: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def add(
        self,
        name: str,
        function: Callable[..., Any],
        device_type: str,
        trial: Trial,
        limits: str,
        *,
        if_asked: bool = False,
        **kernels: Callable[..., Any],
    ) -> None:
        """Have one more backend, made for one type of device and preferred there.

        The files of kernels call this, so that an op knows none of them and runs without.

        Args:
            name: of the backend.
            function: with the signature of the others.
            device_type: such as `"cuda"`.
            trial: see `trials`.
            limits: see `limits`.
            if_asked: whether it is not preferred, but one of `asked`.
            kernels: see `kernels`.
        """
        self.backends[name] = function
        if if_asked:
            self.asked.add(name)
        else:
            self.preferred[device_type] = name
        self.only_on[name], self.trials[name], self.limits[name] = device_type, trial, limits
        self.kernels |= kernels

    def choice(self, device_type: str) -> str:
        """The backend that runs on tensors of `device_type` (`"cpu"`, `"cuda"`, ...).

        Raises:
            PHAError: $PHA_BACKENDS names an op or a backend that there is not.
        """
        usual = self.preferred.get(device_type, self.preferred["default"])
        return self.forced or _chosen(self.name) or usual

    def fault(self, backend: str, device: torch.device | str) -> str | None:
        """Why `backend` cannot run on `device`, in a few words; None where it can.

        The first question compiles the kernel, compares it and waits for the device.
        """
        if backend not in self.trials:
            return None
        device = torch.empty(0, device=device).device  # with its index
        if (backend, device) not in self.faults:
            self.faults[backend, device] = self._try(backend, device)
        return self.faults[backend, device]

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _try(self, backend: str, device: torch.device) -> str | None:
        trial = self.trials[backend]
        try:
            with torch.autocast(device.type, enabled=False):
                error = trial.largest_error(device)
        except Exception as failure:  # Whatever it is, the kernel cannot be used.
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
            try:  # An illegal access ends all work on the device, whatever is called next.
                torch.zeros(1, device=device).item()
            except RuntimeError:
                raise PHAError(
                    f"{self.name}: the trial of its kernel {backend} has left {device} unusable "
                    f"for this process ({reason}); start again with "
                    f"{CHOSEN}={self.name}={self.plain}"
                ) from failure
            return reason
        return None if error <= trial.limit else f"it is off by {error:.1g}"

    def require(self, backend: str, x: Tensor) -> None:
        """Try a kernel before its first use on the device of `x`.

        Neither a graph of torch.compile nor one that CUDA records can hold the trial: a kernel is
        tried when it is next used outside of them.

        Raises:
            PHAError: it fails there, or is wrong. Nothing slower takes over by itself.
        """
        if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if (reason := self.fault(backend, x.device)) is not None:
            raise PHAError(
                f"{self.name}: its kernel {backend} fails on {x.device} ({reason}); set "
                f"{CHOSEN}={self.name}={self.plain} to compute it in plain torch"
            )

    def by_triton(self, form: str, x: Tensor) -> bool:
        """Whether Triton computes in an operator of this op, which it must be able to.

        Raises:
            PHAError: see `require`.
        """
        if form == "torch" or not x.numel():
            return False
        self.require("triton", x)
        return True

    def is_at_hand(self, backend: str, device_type: str) -> bool:
        """Whether `backend` may be tried on `device_type`: unless it has to be asked for."""
        return backend not in self.asked or self.choice(device_type) == backend

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
        self._require_known(backend)
        previous, self.forced = self.forced, backend
        try:
            yield
        finally:
            self.forced = previous

    def _require_known(self, backend: str) -> None:
        if backend not in self.backends:
            known = ", ".join(sorted(self.backends))
            raise PHAError(f"{self.name} has no backend {backend!r}; it has {known}")

    def self_check(self, backend: str, device_type: str) -> float:
        """Largest relative error of `backend` against the oracle on a small random problem."""
        return self.check(self.backends[backend], self.backends["naive"], device_type)


def in_use(device_type: str) -> dict[str, str]:
    """Op -> what runs on tensors of `device_type`: for rows of benchmarks."""
    return {op.name: op.describe(device_type) for op in OPS.values()}


def unusual(device_type: str) -> str:
    """What runs on tensors of `device_type` in the place of torch's own operations, in words."""
    other = [op for op in OPS.values() if op.choice(device_type) != op.plain]
    said = [f"{op.name} {op.describe(device_type)}" for op in other]
    return ", ".join([*said, "all others in plain torch" if said else "all in plain torch"])


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Launch Triton's kernels on the device of `x`, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@torch.compiler.assume_constant_result  # a graph of torch.compile need not read the environment
def _chosen(op: str) -> str | None:
    """The backend of an op that the user asks for."""
    text = os.environ.get(CHOSEN)
    return _parse(text).get(op) if text else None


@lru_cache(maxsize=1)
def _parse(text: str) -> dict[str, str]:
    chosen = dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part)
    for name, backend in chosen.items():
        if name not in OPS:
            raise PHAError(f"{CHOSEN}: there is no op {name!r}; there are {', '.join(sorted(OPS))}")
        OPS[name]._require_known(backend)
    if len(chosen) != text.count(",") + 1:
        raise PHAError(f"{CHOSEN} is {text!r}; write OP=BACKEND, with commas between several")
    return chosen
