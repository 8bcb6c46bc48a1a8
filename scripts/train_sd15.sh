#!/usr/bin/env bash
# bash scripts/train_sd15.sh [config.yaml] [section.key=value …] [--dry-run]
#
# Trains through accelerate: by default the paper's run, configs/xdpo_sd15.yaml, on two GPUs. The same command resumes.
# Paths are relative to the repository.
#   NUM_PROCESSES=4      so many GPUs of this machine
#   ACCELERATE_CONFIG=configs/accelerate/multi_node.yaml   another launch, such as several machines
#   PYTHON=python3.12    another interpreter than .venv's or python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=configs/xdpo_sd15.yaml
if [[ ${1:-} == *.yaml || ${1:-} == *.yml ]]; then
  config=$1
  shift
fi

python=${PYTHON:-}
if [[ -z $python ]]; then
  if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi
fi

launch=${ACCELERATE_CONFIG:-configs/accelerate/two_gpus.yaml}
if [[ -z ${ACCELERATE_CONFIG:-} && ${NUM_PROCESSES:-} == 1 ]]; then
  launch=configs/accelerate/one_gpu.yaml  # accelerate refuses one process with a configuration for several
fi

exec "$python" -m accelerate.commands.launch --config_file "$launch" \
  ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} train_xdpo.py --config "$config" "$@"
