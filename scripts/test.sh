#!/usr/bin/env bash
# Lint, formatting, types and the tests, in an environment of their own: bash scripts/test.sh [--all] [pytest arguments …]
# Without --all it leaves out those marked slow, end-to-end runs whose essence a cheaper test has, and says how many.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

# Packages that a user may have or not: beside the environment, for the tests that ask for them.
optional=.venv/optional
if [[ ! -d $optional/bitsandbytes ]]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$optional" bitsandbytes==0.50.2
fi

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy  # of what pyproject.toml lists
# As many tests at once as there are cores, and one thread for each: several start two processes of their own. With one
# more, tests that stop a launcher came near their time limits.
OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$PYTHON" -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal "$@"
