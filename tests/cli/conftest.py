"""How these tests run a verb: in this process, as the command line does."""

from __future__ import annotations

from typing import Protocol

import pytest

from pha.cli import main


class Printed(str):
    """What a verb wrote to standard output, with what it wrote to standard error beside it."""

    err: str


class Pha(Protocol):
    """The command line without its first word."""

    def __call__(self, *words: object) -> Printed: ...


class Refused(Protocol):
    """The same, of a mistake."""

    def __call__(self, *words: object) -> str: ...


@pytest.fixture
def pha(capsys: pytest.CaptureFixture[str]) -> Pha:
    """Run a verb and return what it printed."""

    def call(*words: object) -> Printed:
        capsys.readouterr()
        main([str(word) for word in words])
        captured = capsys.readouterr()
        printed = Printed(captured.out)
        printed.err = captured.err
        return printed

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a verb that must end with exit code 2 and one line; return the line."""

    def call(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    return call
