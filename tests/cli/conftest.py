"""How these tests run a verb: in this process, as the command line does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pha.cli import main


class Printed(str):
    """What a verb wrote to standard output, with what it wrote to standard error beside it."""

    err: str


@pytest.fixture
def pha(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Run a verb and return what it printed."""

    def call(*words: Any) -> Printed:
        capsys.readouterr()
        main([str(word) for word in words])
        captured = capsys.readouterr()
        printed = Printed(captured.out)
        printed.err = captured.err
        return printed

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a verb that must end with exit code 2 and one line; return the line."""

    def call(*words: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    return call
