"""How much one reads to understand a part, and how much there is in all; see docs/decisions.md."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = {
    "the model": (
        "src/pha/model/config.py src/pha/model/branches.py src/pha/model/backbone.py "
        "src/pha/model/block.py src/pha/model/mixing.py src/pha/model/norm.py "
        "src/pha/model/gss.py src/pha/model/attention.py src/pha/model/ffn.py"
    ),
    "one training step, with set-up": (
        "src/pha/train/run.py src/pha/train/session.py src/pha/train/trainer.py "
        "src/pha/train/optim.py src/pha/train/batches.py src/pha/train/plan.py "
        "src/pha/train/config.py src/pha/data/sampler.py src/pha/modeling/language_model.py"
    ),
    "one op, the gated scan": "src/pha/ops/gated_scan/*.py src/pha/ops/backends.py",
    "its tests": "tests/ops/test_gated_scan.py",
    "src": "src/**/*.py",
    "tests": "tests/**/*.py",
}


def count(patterns: str) -> tuple[int, int]:
    """Files and lines that match any of the patterns."""
    files = [path for pattern in patterns.split() for path in ROOT.glob(pattern)]
    return len(files), sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def main() -> None:
    """Print a table in Markdown."""
    print("| part | files | lines |\n|---|---|---|")
    for part, patterns in PARTS.items():
        files, lines = count(patterns)
        print(f"| {part} | {files} | {lines:,} |")


if __name__ == "__main__":
    main()
