"""Sharing is tested with the runs that reports are tested with."""

from tests.report.conftest import make_run

__all__ = ["make_run"]
