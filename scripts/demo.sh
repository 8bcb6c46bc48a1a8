#!/usr/bin/env bash
# The whole chain on the embedded default, on a CPU: bash scripts/demo.sh [--flow] [section.key=value …]
# Preference pairs → xDPO training → images before and after → a measured gain. Run again, it starts afresh.
# --flow trains the embedded flow, a model in Stable Diffusion 3's format, in place of the diffusion.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
source scripts/foreground.sh

run=runs/demo config=configs/tiny/xdpo.yaml
if [[ ${1-} == --flow ]]; then
    run=runs/demo_flow config=configs/tiny/flow_xdpo.yaml
    shift
fi
rm -rf "$run"
foreground "$PYTHON" train_xdpo.py --config "$config" output_dir="$run" cache.examples="$run/examples" "$@"
"$PYTHON" scripts/compare_tiny.py "$run"
