#!/usr/bin/env bash
# Build the sdist and from it the wheel, check both, install the wheel with the pinned versions into an
# empty environment, and use it far from the checkout: the help, the sizes, and some steps of the demo.
#
#     scripts/check_wheel.sh [PYTHON]
set -euo pipefail
python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
unset PYTHONPATH

"$python" -m venv tools
tools/bin/python -m pip install --quiet --disable-pip-version-check build twine
tools/bin/python -m build --outdir dist "$root"
tools/bin/python -m twine check --strict dist/*

"$python" -m venv empty
wheel=$(echo dist/*.whl)
empty/bin/python -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" "$wheel[all]"
empty/bin/python -m pip check
export PHA_CACHE=$work/cache
empty/bin/pha --help > help.txt
empty/bin/pha params
empty/bin/pha demo --steps 3 --out demo
test -s demo/report.html
echo "the wheel works: $(basename "$wheel")"
