#!/usr/bin/env bash
# bash scripts/ablations.sh [--tiny] [section.key=value …] [--dry-run]
#
# Trains the six rows of the paper's Table 3, one after another, and stops at the first that fails. The same command
# goes on from there: a finished row has nothing left to do, an interrupted one resumes.
#   --tiny   the embedded counterparts, in one process on this machine
# Environment as in scripts/train_sd15.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/foreground.sh

rows=(eta1_n1 eta1_n3 eta1_n6 eta0.5_n6 eta0.1_n6 eta0.05_n6)

tiny=false
arguments=()
for argument in "$@"; do
  case $argument in
    --tiny) tiny=true ;;
    output_dir=*)
      echo "ablations.sh: output_dir cannot be overridden: every row needs its own (got '$argument')" >&2
      exit 2
      ;;
    *) arguments+=("$argument") ;;
  esac
done

python=${PYTHON:-}
if [[ -z $python ]]; then
  if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi
fi

for row in "${rows[@]}"; do
  if $tiny; then
    config=configs/tiny/ablations/$row.yaml
    command=("$python" train_xdpo.py --config "$config")
  else
    config=configs/ablations/$row.yaml
    command=(bash scripts/train_sd15.sh "$config")
  fi
  echo "== $config"
  foreground "${command[@]}" ${arguments[@]+"${arguments[@]}"} || {
    status=$?
    echo "ablations.sh: row $row failed (exit status $status); the rows after it were not started" >&2
    exit "$status"
  }
done
