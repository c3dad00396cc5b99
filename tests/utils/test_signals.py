"""Stop signals: the first asks, a second Ctrl-C interrupts, and nohup is obeyed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pha.utils.errors import StoppedError
from pha.utils.signals import SIGNALS, exit_code, leave, on_stop_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """None is changed for good."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_further_ones_do_not(number: int) -> None:
    asked: list[int] = []
    with on_stop_signals(asked.append):
        send(number, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        assert asked == [number]
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert exit_code(number) == (130 if number == signal.SIGINT else 75)


def test_an_inner_block_takes_over_meanwhile() -> None:
    inner: list[int] = []
    with on_stop_signals(leave):
        with on_stop_signals(inner.append):
            send(signal.SIGTERM)
        assert inner == [signal.SIGTERM]
        with pytest.raises(StoppedError, match="stopped by SIGUSR1"):
            send(signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt) as stop, on_stop_signals(leave):
        send(signal.SIGINT)
    assert not isinstance(stop.value, StoppedError)


def test_what_was_to_be_ignored_is_ignored_but_for_ctrl_c() -> None:
    asked: list[int] = []
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGHUP, signal.SIGINT)}
    try:
        with on_stop_signals(asked.append):
            send(signal.SIGHUP)
            assert asked == []
            send(signal.SIGINT)
            assert asked == [signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
