"""The `compute` section applied to this machine: devices, precision, accumulation, trackers."""

import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, ProjectConfiguration, check_cuda_p2p_ib_support

from xdpo import processes
from xdpo.config import ComputeConfig, Config, accumulation_steps


def build_accelerator(settings: Config) -> Accelerator:
    """Devices, precision, accumulation and trackers, as the config has them; several processes are connected.

    Raises ValueError for fp16 on a CPU, bf16 weights without autocast, compiling without a compiler, a launch
    that shards the weights, or a total batch that cannot be split over the processes.
    """
    compute = settings.compute
    refuse_sharded_launch()
    has_device = torch.accelerator.is_available()
    precision = precision_of(compute)
    if precision == "fp16" and not has_device:
        raise ValueError("compute.precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if settings.model.frozen_precision == "bf16" and precision == "fp32":
        raise ValueError(
            f"model.frozen_precision: bf16 weights are used where the networks run in less than float32, and "
            f"compute.precision is {compute.precision}, float32 here; set compute.precision=bf16, or "
            "model.frozen_precision=fp32"
        )
    if compute.compile:
        check_compiler("compute.compile")
    choose_kernels(compute)
    if torch.cuda.is_available() and not check_cuda_p2p_ib_support():
        # GeForce cards without peer access. Of all launchers only `accelerate launch` says so to NCCL.
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    accelerator = Accelerator(
        cpu=not has_device,
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=list(settings.log.trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=settings.output_dir, logging_dir=str(Path(settings.output_dir) / "tensorboard")
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=processes.COLLECTIVE_TIMEOUT),
            # A forward uses each weight once: the cache would save no cast, and keep every bf16 copy until its end.
            AutocastKwargs(cache_enabled=False),
        ],
    )
    processes.connect()
    accelerator.gradient_accumulation_steps = accumulation_steps(settings, accelerator.num_processes)
    return accelerator


def precision_of(compute: ComputeConfig) -> str:
    """The autocast type that a config means on this machine: fp32, fp16 or bf16."""
    if compute.precision != "auto":
        return compute.precision
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def device_kind() -> str:
    """What decides which kernels run on this machine: "cuda 8.9" by its compute capability, "cpu AVX2", "mps"."""
    if torch.cuda.is_available():
        return "cuda {}.{}".format(*torch.cuda.get_device_capability())
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        return device.type
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def choose_kernels(compute: ComputeConfig) -> None:
    """Set which kernels PyTorch may use in this process. To be called before the first one runs on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = compute.tf32
    # Benchmarking convolutions may choose other kernels at the next start, which round differently.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = compute.deterministic
    torch.use_deterministic_algorithms(compute.deterministic)
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first matrix product


def check_compiler(setting: str) -> None:
    """Raise ValueError where `setting` has kernels compiled and no compiler is there: torch.compile says so late."""
    if torch.cuda.is_available():  # Triton builds what launches its kernels
        language, variable, names = "C", "CC", ["gcc", "clang"]
    else:
        language, variable, names = "C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    wanted = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in wanted):
        raise ValueError(
            f"{setting} needs a {language} compiler, and {' or '.join(wanted)} is not found; install it, name another "
            f"one in the environment variable {variable}, or do without {setting}"
        )


def refuse_sharded_launch() -> None:
    """Raise ValueError under an accelerate configuration that shards the weights over the processes."""
    for name, variable in {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise ValueError(
                f"accelerate was configured for {name}, which shares the weights out over the processes. Sampling, "
                "evaluation and checkpoints here need whole weights on each; launch with "
                "configs/accelerate/two_gpus.yaml, and if the memory is too small use model.trainable=lora, "
                "compute.gradient_checkpointing=true or optim.name=adamw8bit"
            )
