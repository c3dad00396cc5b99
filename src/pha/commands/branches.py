"""The verb for branches of one's own: check-branch."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from pha.commands.common import Json, answer
from pha.utils.errors import PHAError


def check_branch(module: str, *, json: Json = False) -> None:
    """What a branch of your own keeps of what every branch promises.

    A line each: whether it looks ahead, splits through the cache as in one piece, keeps documents
    apart, leaves padding out, runs in bf16, exports, and how fast it is beside gss. Nothing is
    trained.

    Args:
        module: such as my_branch for a file my_branch.py here
    """
    from pha import mixers as mixers  # which makes them known
    from pha.bench.branch import check_branch as check
    from pha.model import BRANCHES
    from pha.utils.modules import import_modules

    import_modules([module], "check-branch")
    names = [name for name, kind in BRANCHES.items() if kind.__module__ == module]
    if not names:
        raise PHAError(f"{module} registers no branch; see `register_branch` in docs/extending.md")
    record, tables, failed = {}, [], []
    for name in names:
        table = Table(title=f"branch {name}", title_justify="left", show_header=False)
        findings = list(check(name))
        for each in findings:
            table.add_row(each.what, "ok" if each.passed else "FAILS", each.words)
        failed += [f"{name}: {each.what}" for each in findings if not each.passed]
        record[name] = [asdict(each) for each in findings]
        tables.append(table)
    answer(json, record, *tables)
    if failed:
        raise PHAError(f"not kept: {', '.join(failed)}")
