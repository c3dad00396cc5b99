#!/bin/sh
# Takes everything from a machine with a GPU in one go: checks, tests, kernels, benchmarks, training.
# docs/gpu.md explains the stages; `scripts/gpu.sh --help` lists the options.
#
#   scripts/gpu.sh                                        # all of it, into runs/gpu/out
#   PYTHON=python3 STAGES=environment,tests OUT=/tmp/out scripts/gpu.sh
#   scripts/gpu.sh --tiny                                 # a rehearsal in miniature, on any machine
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
PYTHONUNBUFFERED=1
export PYTHONPATH PYTHONUNBUFFERED
exec "$PYTHON" -m scripts.gpu.main "$@"
