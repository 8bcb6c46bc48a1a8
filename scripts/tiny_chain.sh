#!/usr/bin/env bash
# The whole method on the embedded default, on a CPU: bash scripts/tiny_chain.sh [section.key=value …]
#
# Diffusion-DPO and xDPO are trained, the base and both make images for tinyprompts, the judges score them, and a report
# compares them: runs/chain/results/report.html. The same command goes on where it was interrupted.
# 120 steps of training each; arguments are settings of both trainings, such as train.max_steps=300. From the environment:
#   OUTPUT=runs/chain      where everything goes; another one for other settings
#   PROMPTS=200            of tinyprompts, so many at random
#   CURVE=1                images from the checkpoints too, to draw quality over training
#   SCORERS=tiny_reward,tiny_alignment,tiny_appeal
#   PIPELINE=assets/tiny/pipeline
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
source scripts/foreground.sh

output=${OUTPUT:-runs/chain}
pipeline=${PIPELINE:-assets/tiny/pipeline}
methods=(diffusion_dpo xdpo)

for method in "${methods[@]}"; do
    echo "== train $method"
    foreground "$PYTHON" train_xdpo.py --config "configs/tiny/$method.yaml" output_dir="$output/runs/$method" \
        model.pipeline="$pipeline" train.max_steps=120 checkpoint.every=40 checkpoint.keep=100 "$@"
done

images() {  # images MODEL NAME
    foreground "$PYTHON" generate.py --model "$1" --output "$output/images/$2" --prompts tinyprompts --sample "${PROMPTS:-200}" \
        --steps 20 --guidance 1 --batch-size 20
}

echo "== images"
images "$pipeline" base
evaluated=("$output/images/base")
runs=()
for method in "${methods[@]}"; do
    images "$output/runs/$method" "$method"
    evaluated+=("$output/images/$method")
done
if [[ ${CURVE:-} == 1 ]]; then
    for method in "${methods[@]}"; do
        runs+=("$output/runs/$method")
        for checkpoint in "$output/runs/$method"/checkpoints/step_*; do
            name=${method}_$(basename "$checkpoint")
            images "$checkpoint" "$name"
            evaluated+=("$output/images/$name")
        done
    done
fi

echo "== scores and report"
"$PYTHON" evaluate.py --images "${evaluated[@]}" --baseline base diffusion_dpo --output "$output/results" \
    --scorers "${SCORERS:-tiny_reward,tiny_alignment,tiny_appeal}" --title "The embedded default" \
    ${runs[@]+--runs "${runs[@]}"}
