"""The console script `pha`.

It lies outside the package so that the package can tell: `import pha` brings torch and
transformers, which take seconds, and the command brings them only where a verb needs them.
"""

import sys


def main() -> None:
    """Run `pha VERB`."""
    from pha.utils.extras import remedy

    try:
        from pha.cli import main as run
    except ModuleNotFoundError as error:
        if (what := remedy(error)) is None:
            raise
        print(f"pha: error: {what}", file=sys.stderr)
        sys.exit(2)
    run()
