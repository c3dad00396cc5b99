"""A command in a process that stops itself at a given moment, for `kill_anywhere.py`."""

from __future__ import annotations

import errno
import functools
import importlib
import json
import math
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from pha.cli import main

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
KINDS = (*SIGNALS, "full disk", "read-only", "memory")
OPERATIONS = {
    *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod"),
    *("os.truncate", "shutil.rmtree", "shutil.copyfile"),
}


@dataclass(frozen=True)
class Job:
    """A command, what its phases are called, and what must be the same in the end.

    Attributes:
        words: after `pha`; `{out}` stands for the output.
        phases: `MODULE:NAME` of a function -> the phase that the process is in meanwhile.
        outcome: what an output came to, as plain values.
        check: raises AssertionError where an output that was stopped is not as it must be; gets
            what it returned after the stop before.
        ending: phases after which only they come again.
    """

    name: str
    words: Sequence[str]
    phases: dict[str, str]
    outcome: Callable[[Path], Any]
    check: Callable[[Path, Any], Any] = lambda out, before: None
    ending: Sequence[str] = ()


@dataclass(frozen=True)
class Aim:
    """A moment: at file operation number `operation` of a phase, or `delay` seconds into it."""

    kind: str
    phase: str
    operation: int | None
    delay: float | None
    entry: int  # of how many times the phase is entered; for `delay`
    size: int  # bytes that a full disk or the memory still take


class Striker:
    """In the process to be stopped: knows the phase, and strikes at the moment given."""

    def __init__(self, job: Job, out: Path, aim: Aim | None, shared: mmap.mmap) -> None:
        # What becomes the output is written beside it.
        self.place, self.aim, self.shared = str(out.parent), aim, shared
        self.phase, self.since = "start", time.monotonic()
        self.operations: Counter[str] = Counter()
        self.entries: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.read_only = False
        for place, phase in job.phases.items():
            self._wrap(place, phase)
        signal.signal(signal.SIGALRM, lambda *_: self.strike())
        sys.addaudithook(self._hear)
        self._enter("start")

    def _wrap(self, place: str, phase: str) -> None:
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            before = self.phase
            self._enter(phase)
            try:
                return original(*arguments, **options)
            finally:
                self._switch(before)

        setattr(owner, name, wrapped)

    def _switch(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def _enter(self, phase: str) -> None:
        self._switch(phase)
        self.entries[phase] += 1
        aim = self.aim
        if aim and aim.phase == phase and aim.entry == self.entries[phase] and aim.delay:
            signal.setitimer(signal.ITIMER_REAL, aim.delay)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not str(arguments[0]).startswith(self.place):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.operations[self.phase] += 1
        aim = self.aim
        if aim and aim.phase == self.phase and aim.operation == self.operations[self.phase]:
            self.strike()
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    def strike(self) -> None:
        """Let it happen, and leave word of where it did."""
        aim, self.aim = self.aim, None
        assert aim is not None
        self.tell({"phase": self.phase, "operation": self.operations[self.phase]})
        if aim.kind in SIGNALS:
            os.kill(os.getpid(), getattr(signal, aim.kind))
        elif aim.kind == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (aim.size, aim.size))
        elif aim.kind == "read-only":
            self.read_only = True
        else:
            most = psutil.Process().memory_info().vms + aim.size
            resource.setrlimit(
                resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1])
            )

    def tell(self, what: dict[str, Any]) -> None:
        """Write into the memory that the parent reads."""
        self.shared[:] = json.dumps(what).encode().ljust(len(self.shared))


@dataclass
class Ended:
    """How a process ended: its code, what it printed, and what its striker left word of."""

    code: int
    said: str
    word: dict[str, Any]


def run(job: Job, out: Path, aim: Aim | None = None) -> Ended:
    """Run the command in a forked process."""
    shared = mmap.mmap(-1, 4096)
    shared[:] = b"{}".ljust(4096)
    reader, writer = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.close(reader)
        _run_here(job, out, aim, shared, writer)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as said:
        text = said.read()
    _, status = os.waitpid(process, 0)
    return Ended(os.waitstatus_to_exitcode(status), text, json.loads(shared[:].decode()))


def _run_here(job: Job, out: Path, aim: Aim | None, shared: mmap.mmap, writer: int) -> NoReturn:
    code = 1
    try:
        for descriptor in (1, 2):
            os.dup2(writer, descriptor)
        os.close(writer)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would have it ignore
        # Memory ends in this process alone: without any, OpenBLAS cannot be loaded and tries on.
        usual = resource.getrlimit(resource.RLIMIT_AS)
        free = functools.partial(resource.setrlimit, resource.RLIMIT_AS, usual)
        popen = subprocess.Popen
        subprocess.Popen = functools.partial(popen, preexec_fn=free)  # type: ignore[assignment, misc]
        sys.argv = ["pha", *(word.format(out=out) for word in job.words)]
        striker = Striker(job, out, aim, shared)
        main(sys.argv[1:])
        code = 0
        striker.tell({name: vars(striker)[name] for name in ("operations", "entries", "seconds")})
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def draw_aim(rng: random.Random, kind: str, phase: str, usual: dict[str, Any]) -> Aim:
    """A moment in a phase, which the undisturbed process went through as `usual` says."""
    entries = max(1, usual["entries"].get(phase, 1))
    operations = usual["operations"].get(phase, 0)
    seconds = usual["seconds"].get(phase, 0.0)
    at_operation = operations > 0 and rng.random() < 0.5
    return Aim(
        kind,
        phase,
        rng.randint(1, math.ceil(operations / entries)) if at_operation else None,
        None if at_operation else max(1e-4, rng.random() * seconds / entries),
        rng.randint(1, min(entries, 3)),
        int(2 ** rng.uniform(0, 16 if kind == "full disk" else 24)),
    )
