"""A rank that hangs: its number is named and the job ends, where all others would wait for it.

A process may keep its connections open and answer nothing: it is stopped, its machine is lost, it
waits for a disk. A collective with it fails only after a long time, and says that it timed out, not
for whom. So each process has a thread, which tells the store of the process group every few seconds
how far the process has come. A training step does nothing for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d

MOST_SECONDS = 5.0
"""Between two signs of life; a fifth of the timeout where that is shorter."""
REMEDY = "the same command goes on from the last checkpoint"
NO_STORE = "no step is finished, and rank 0 does not answer, whose machine holds the store of all"


class Sign(NamedTuple):
    """What a rank said of itself, which the store keeps as JSON."""

    beat: int  # how often it has said something
    step: int  # steps finished
    collectives: int  # that it has begun, in all process groups
    host: str


def blame(
    before: Mapping[int, Sign | None], after: Mapping[int, Sign | None], seconds: float
) -> tuple[set[int], str]:
    """Who is hanging, by what every rank said at two moments between which each should have.

    All ranks begin the same collectives in the same order, so that one which has begun fewer than
    others is what they wait for.

    Args:
        before: by rank; None for one that has never said anything.
        after: some signs of life later.
        seconds: how long no step has been finished, for the message.

    Returns:
        Ranks, none if all have come equally far, and a line about them.
    """
    silent = {rank for rank, sign in after.items() if sign is None or sign == before[rank]}
    if silent:
        what = "gives no sign of life: the process is stopped, or its machine or network is lost"
        guilty = silent
    else:
        begun = {rank: sign.collectives for rank, sign in after.items() if sign is not None}
        guilty = {rank for rank, count in begun.items() if count < max(begun.values())}
        what = "is behind, and all others wait for it; its threads are shown where it prints"
    if not guilty:
        return guilty, (
            f"no step was finished for {seconds:.0f} s and all ranks wait: a device hangs, or the "
            "network does"
        )
    names = []
    for rank in sorted(guilty):
        sign = after[rank]
        names.append(f"rank {rank} ({sign.host if sign is not None else 'on an unknown host'})")
    step = max(sign.step for sign in after.values() if sign is not None) + 1
    return guilty, f"{', '.join(names)} {what}; step {step} was not finished for {seconds:.0f} s"


class _Watch:
    def __init__(self, timeout: float, step: Callable[[], int]) -> None:
        self.timeout, self.step = timeout, step
        self.interval = min(MOST_SECONDS, timeout / 5)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # A connection of its own: that of the process group may be waiting for something.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
        )
        self.store = dist.PrefixStore("pha/hang", store)
        self.beat = 0
        self.ended = threading.Event()

    def say(self) -> tuple[int, int]:
        """Give a sign of life; how far this process has come."""
        groups: list[Any] = list(distributed_c10d._world.pg_map)  # stubs do not know the number
        begun = sum(group._get_sequence_number_for_group() for group in groups)
        self.beat += 1
        sign = Sign(self.beat, self.step(), begun, socket.gethostname())
        self.store.set(str(self.rank), json.dumps(sign))
        return sign.step, sign.collectives

    def heard(self) -> dict[int, Sign | None]:
        """The last sign of every rank."""
        signs: dict[int, Sign | None] = {}
        for rank in range(self.size):
            key = str(rank)
            known = self.store.check([key])
            signs[rank] = Sign(*json.loads(self.store.get(key))) if known else None
        return signs

    def wait(self, intervals: int) -> None:
        """Live on for so many intervals."""
        for _ in range(intervals):
            if not self.ended.wait(self.interval):
                self.say()

    def run(self) -> None:
        """Watch until the end, or until nothing has gone on for too long, and then end all."""
        last, since = self.say(), time.monotonic()
        while not self.ended.wait(self.interval):
            now, waited = self.say(), time.monotonic() - since
            if now != last:
                last, since = now, time.monotonic()
            elif waited > self.timeout:
                self.judge(waited)

    def judge(self, waited: float) -> None:
        """End this process; one of those that are not to blame says who is."""
        nobody = threading.Timer(4 * self.interval, self.leave, [NO_STORE])
        nobody.daemon = True
        nobody.start()
        before = self.heard()
        self.wait(2)
        guilty, what = blame(before, self.heard(), waited)
        nobody.cancel()
        self.wait(2)  # until the others have listened, too
        if not self.ended.is_set():
            told = self.rank == min(set(range(self.size)) - guilty, default=0)
            self.leave(what if told else "", show=self.rank in guilty or not guilty)

    def leave(self, what: str, show: bool = False) -> None:
        """End this process, whatever its other threads do."""
        if what:
            print(f"pha: {what}; {REMEDY}", file=sys.stderr)
        if show:
            faulthandler.dump_traceback()
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def no_hang(timeout: float, step: Callable[[], int]) -> Iterator[None]:
    """End the process when the training inside the block does not go on, and say who is to blame.

    Going on is a step finished or a collective begun. A single process is not watched.

    Args:
        timeout: seconds without either, after which all processes end with exit code 1.
        step: how many steps are finished.
    """
    if not dist.is_initialized():
        yield
        return
    watch = _Watch(timeout, step)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        thread.join(watch.interval)
