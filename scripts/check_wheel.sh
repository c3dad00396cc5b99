#!/usr/bin/env bash
# Rehearse a release. Build the sdist and from it the wheel, check both, install the wheel with the pinned
# versions into an empty environment, and use it far from the checkout: the help, the sizes, and some
# steps of the demo. The release itself, .github/workflows/release.yml, runs this too.
#
#     scripts/check_wheel.sh [PYTHON [DIST]]       # DIST keeps what was built; it must not exist
set -euo pipefail
python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dist=$("$python" -c 'import os, sys; print(os.path.abspath(sys.argv[1]))' "${2:-$work/dist}")
[ ! -e "$dist" ] || { echo "$dist exists; remove it or name another folder" >&2; exit 2; }
cd "$work"
unset PYTHONPATH

"$python" -m venv tools
tools/bin/python -m pip install --quiet --disable-pip-version-check build twine check-wheel-contents
tools/bin/python -m build --outdir "$dist" "$root"
tools/bin/python -m twine check --strict "$dist"/*
tools/bin/check-wheel-contents --config "$root/pyproject.toml" "$dist"/*.whl

"$python" -m venv empty
wheel=$(echo "$dist"/*.whl)
empty/bin/python -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" "$wheel[all]"
empty/bin/python -m pip check
export PHA_CACHE=$work/cache
empty/bin/pha --help > help.txt
# The name of the wheel, what pip believes and what the command says are one version.
version=$(empty/bin/pha --version | cut -d' ' -f2)
[ "$(empty/bin/python -c 'import importlib.metadata as m; print(m.version("pha-lm"))')" = "$version" ]
[ "$(basename "$wheel")" = "pha_lm-$version-py3-none-any.whl" ]
empty/bin/pha params
empty/bin/pha demo --steps 3 --out demo
test -s demo/report.html
echo "the wheel works: $(basename "$wheel")"
