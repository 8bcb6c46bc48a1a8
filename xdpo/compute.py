"""The `compute` section on this machine: devices, precision, accumulation, trackers."""

from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration

from xdpo.config import Config, accumulation_steps


def build_accelerator(settings: Config) -> Accelerator:
    """Devices, precision, accumulation and trackers, as the config has them.

    Raises ValueError for fp16 on a CPU, or a total batch that cannot be split over the processes.
    """
    compute = settings.compute
    has_device = torch.accelerator.is_available()
    precision = compute.precision
    if precision == "auto":
        precision = "fp32"
        if torch.cuda.is_available():
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and not has_device:
        raise ValueError("compute.precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if compute.tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        cpu=not has_device,
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=list(settings.log.trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=settings.output_dir, logging_dir=str(Path(settings.output_dir) / "tensorboard")
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    accelerator.gradient_accumulation_steps = accumulation_steps(settings, accelerator.num_processes)
    return accelerator
