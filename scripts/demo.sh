#!/usr/bin/env bash
# The whole chain on the embedded default, on a CPU: bash scripts/demo.sh [section.key=value …]
# Preference pairs → xDPO training → images before and after → a measured gain. Run again, it starts afresh.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
source scripts/foreground.sh

run=runs/demo
rm -rf "$run"
foreground "$PYTHON" train_xdpo.py --config configs/tiny/xdpo.yaml output_dir="$run" "$@"
"$PYTHON" scripts/compare_tiny.py "$run"
