"""A run: its folder, the checkpoints in it, and the model that it exports.

```
output_dir/
  config.yaml          the resolved config          run.json        versions, commit, data counts, starts
  metrics.jsonl        one line per optimizer step  samples/        policy beside reference
  index.html           both as a page for people, renewed while it trains
  checkpoints/step_00000200/    policy, optimizer and EMA as safetensors, progress.json
  export/              the result: a denoiser in diffusers format or LoRA weights, with a model card; further forms
  snapshots/  self_play/          of SePPO alone: earlier policies, and what they sampled for the round
  online/  online_samples/        of online pairs alone: every round's scores, and the newest rounds' latents
  lock                 held by the process that writes here
```
"""

from xdpo.runs.card import model_card
from xdpo.runs.checkpoints import (
    CheckpointError,
    agree_on_checkpoint,
    checkpoint_path,
    finished_checkpoints,
    load_checkpoint,
    save_checkpoint,
    step_of,
    weights_checksum,
)
from xdpo.runs.export import SHEET, export_model, sample_sheets
from xdpo.runs.folder import check_pairs, check_run_folder, describe_run
from xdpo.runs.formats import write_model
from xdpo.runs.optimizer_state import check as check_optimizer

__all__ = [
    "SHEET",
    "CheckpointError",
    "agree_on_checkpoint",
    "check_optimizer",
    "check_pairs",
    "check_run_folder",
    "checkpoint_path",
    "describe_run",
    "export_model",
    "finished_checkpoints",
    "load_checkpoint",
    "model_card",
    "sample_sheets",
    "save_checkpoint",
    "step_of",
    "weights_checksum",
    "write_model",
]
