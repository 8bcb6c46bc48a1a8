"""The embedded flow base in Stable Diffusion 3's format: two CLIP encoders, a T5, and a transformer."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tiny_base.captions import MAX_TOKENS, clip_config, clip_ids, clip_tokenizer, t5_ids, t5_tokenizer
from tiny_base.denoisers import TokenIds
from xdpo.noise import FlowProcess

CLIP_WIDTHS = (64, 32)  # of the two CLIP encoders, and of their projections
WIDTH = 96  # of T5, and of the transformer
LAYERS = 7


class Flow:
    """Times are logit-normal, as Stable Diffusion 3's, without its shift, which is for images of many more tokens."""

    name = "transformer"
    learning_rate = 7e-3
    steps = 9_000

    def __init__(self, captions: list[str], latent_channels: int, seed: int, device: str):
        torch.manual_seed(seed + 3)
        self.tokenizer, self.t5_tokenizer = clip_tokenizer(captions), t5_tokenizer(captions)
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        self.process = FlowProcess.from_scheduler(self.scheduler)
        one, other = (CLIPTextModelWithProjection(clip_config(self.tokenizer, width)) for width in CLIP_WIDTHS)
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer),
                d_model=WIDTH,
                d_kv=24,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        )
        encoders = {"text_encoder": one, "text_encoder_2": other, "text_encoder_3": t5}
        self.encoders = nn.ModuleDict(encoders).to(device)
        self.denoiser = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=latent_channels,
            out_channels=latent_channels,
            num_layers=LAYERS,
            attention_head_dim=WIDTH // 3,
            num_attention_heads=3,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=sum(CLIP_WIDTHS),
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ).to(device)

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        clip = clip_ids(self.tokenizer, captions)
        return {"tokenizer": clip, "tokenizer_3": t5_ids(self.t5_tokenizer, captions)}

    def states(self, ids: TokenIds) -> tuple[Tensor, Tensor]:
        """States (B, 2·MAX_TOKENS, WIDTH) and pooled projections, as StableDiffusion3Pipeline makes them."""
        outputs = [
            self.encoders[name](ids["tokenizer"], output_hidden_states=True)
            for name in ("text_encoder", "text_encoder_2")
        ]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        t5 = self.encoders["text_encoder_3"](ids["tokenizer_3"]).last_hidden_state
        states = torch.cat([pad(clip, (0, WIDTH - clip.shape[-1])), t5], dim=1)
        return states, torch.cat([output.text_embeds for output in outputs], dim=-1)

    def read(self, ids: TokenIds) -> Tensor:
        states, pooled = self.states(ids)
        return torch.cat([states[:, MAX_TOKENS:].mean(1), pooled], dim=-1)

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        sigmas = torch.randn(count, generator=generator).sigmoid()
        return self.process.shifted(sigmas, (0, 8, 8)) * self.process.num_timesteps

    def predict(self, noisy: Tensor, times: Tensor, ids: TokenIds) -> Tensor:
        states, pooled = self.states(ids)
        return self.denoiser(
            hidden_states=noisy, timestep=times, encoder_hidden_states=states, pooled_projections=pooled
        ).sample

    def save(self, folder: Path, vae: nn.Module) -> None:
        pipeline = StableDiffusion3Pipeline(
            vae=vae,
            text_encoder=self.encoders["text_encoder"],
            tokenizer=self.tokenizer,
            text_encoder_2=self.encoders["text_encoder_2"],
            tokenizer_2=self.tokenizer,
            text_encoder_3=self.encoders["text_encoder_3"],
            tokenizer_3=self.t5_tokenizer,
            transformer=self.denoiser,
            scheduler=self.scheduler,
        )
        pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
