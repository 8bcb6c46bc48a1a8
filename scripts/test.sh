#!/usr/bin/env bash
# Lint, formatting and all tests, in an environment of their own: bash scripts/test.sh [pytest arguments …]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One thread for each process: several tests start two of them, and two cores are all that a laptop may have.
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$PYTHON" -m pytest "$@"
