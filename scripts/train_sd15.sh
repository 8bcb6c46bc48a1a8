#!/usr/bin/env bash
# bash scripts/train_sd15.sh [config.yaml] [section.key=value …] [--dry-run]
#
# Trains through accelerate: by default the paper's run, configs/xdpo_sd15.yaml, on two GPUs. The same command resumes.
# Paths are relative to the repository.
#   NUM_PROCESSES=4      GPUs of this machine; one is trained on without a launcher
#   ACCELERATE_CONFIG=configs/accelerate/multi_node.yaml   another launch, such as several machines
#   GRACE_SECONDS=600    how long a run that is asked to stop (SIGTERM, Ctrl-C) may take to finish its step and save
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

if [[ -z ${ACCELERATE_CONFIG:-} && ${NUM_PROCESSES:-} == 1 ]]; then
  # accelerate's launcher for one process does not hand signals on, and in a container it would be process 1.
  exec "$python" train_xdpo.py --config "$config" "$@"
fi

# Read by torchrun's agent, which accelerate starts: seconds between SIGTERM and SIGKILL, 30 by itself.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE_SECONDS:-600}
exec "$python" -m accelerate.commands.launch --config_file "${ACCELERATE_CONFIG:-configs/accelerate/two_gpus.yaml}" \
  ${NUM_PROCESSES:+--num_processes "$NUM_PROCESSES"} train_xdpo.py --config "$config" "$@"
