#!/usr/bin/env bash
# sbatch [sbatch's options] scripts/train_slurm.sh [config.yaml] [section.key=value …]
#
# Trains on all GPUs of a Slurm job, one task per GPU, on one node or several. Five minutes before the time limit, and
# when the job is preempted, Slurm's SIGTERM makes the training save and leave; the job then goes back into the queue
# and resumes there, on another number of GPUs too, as long as the total batch can be split over them.
# Submit from the repository, with its .venv on storage that all nodes see. Options that sites differ in:
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --partition=… --account=… scripts/train_slurm.sh …
#   PYTHON=…       another interpreter than .venv's
#SBATCH --job-name=xdpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch; on one machine use scripts/train_sd15.sh}"

config=configs/xdpo_sd15.yaml
if [[ ${1:-} == *.yaml || ${1:-} == *.yml ]]; then
  config=$1
  shift
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) || exit
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) PYTHON=${PYTHON:-.venv/bin/python}

# Without torchrun: its agent would give the processes 30 seconds between SIGTERM and SIGKILL, and saving takes longer.
srun --kill-on-bad-exit=0 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec "$PYTHON" train_xdpo.py "$@"
' train --config "$config" "$@"
status=$?

if ((status == 143)); then  # 128 + SIGTERM: saved and left as asked
  echo "train_slurm.sh: saved; back into the queue"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
