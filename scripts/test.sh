#!/usr/bin/env bash
# Lint, formatting and the tests, in an environment of their own: bash scripts/test.sh [--all] [pytest arguments …]
# Without --all it leaves out those marked slow, end-to-end runs whose essence a cheaper test has, and says how many.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# As many tests at once as there are cores, and one thread for each: several start two processes of their own.
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$PYTHON" -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal "$@"
