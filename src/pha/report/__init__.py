"""One self-contained HTML page that compares training runs."""

from pha.report.page import write_report

__all__ = ["write_report"]
