"""The settings of sampling. This module imports no library, so that a command line can show them at once."""

from dataclasses import dataclass

SCHEDULERS: dict[str, tuple[str, dict]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # latents go beyond ±1
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # as Stable Diffusion has it
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}
"""A sampler's name → its diffusers class and options; the rest of its config is the pipeline's scheduler's."""


@dataclass(frozen=True)
class SamplingSettings:
    """Everything that decides a pixel, besides model and prompt.

    image_size in pixels, None: the pipeline's own. scheduler "pipeline" or a key of SCHEDULERS.
    """

    seed: int = 0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str = "pipeline"
    image_size: int | None = None
    precision: str = "fp32"
    compile: bool = False
    batch_size: int = 8
