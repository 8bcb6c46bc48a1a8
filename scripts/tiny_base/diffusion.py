"""The embedded base in Stable Diffusion's format: a CLIP text encoder and a UNet that predicts noise."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from tiny_base.captions import clip_config, clip_ids, clip_tokenizer
from tiny_base.denoisers import TokenIds
from xdpo.noise import DiffusionProcess, Weighting

WIDTH = 96  # of the text encoder


def build_unet(latent_channels: int) -> UNet2DConditionModel:
    """A UNet (64, 96) on 8×8 latents with cross-attention at both levels."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule: 1,000 scaled-linear steps, epsilon prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Diffusion:
    """λ(t) is min-SNR's: a small model learns several times faster with it than with a constant."""

    name = "unet"
    learning_rate = 7e-3
    steps = 15_000

    def __init__(self, captions: list[str], latent_channels: int, seed: int, device: str):
        torch.manual_seed(seed + 1)
        self.tokenizer = clip_tokenizer(captions)
        self.scheduler = new_scheduler()
        self.process = DiffusionProcess.from_scheduler(self.scheduler, Weighting("min_snr"))
        self.encoders = nn.ModuleDict({"text_encoder": CLIPTextModel(clip_config(self.tokenizer, WIDTH))}).to(device)
        self.denoiser = build_unet(latent_channels).to(device)

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        return {"tokenizer": clip_ids(self.tokenizer, captions)}

    def states(self, ids: TokenIds) -> Tensor:
        return self.encoders["text_encoder"](ids["tokenizer"]).last_hidden_state

    def read(self, ids: TokenIds) -> Tensor:
        return self.states(ids)[:, -1]

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, len(self.process), (count,), generator=generator)

    def predict(self, noisy: Tensor, times: Tensor, ids: TokenIds) -> Tensor:
        return self.denoiser(noisy, times, self.states(ids)).sample

    def save(self, folder: Path, vae: nn.Module) -> None:
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.encoders["text_encoder"],
            tokenizer=self.tokenizer,
            unet=self.denoiser,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
