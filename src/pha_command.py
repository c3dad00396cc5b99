"""The console script `pha`.

It lies outside the package so that the package can tell: `import pha` brings torch and
transformers, which take seconds, and the command brings them only where a verb needs them.
"""


def main() -> None:
    """Run `pha VERB`."""
    from pha.cli import main as run

    run()
