"""The families' models and the scorers at their true shapes, from their published configs.

They are for counting, within `pipelines.without_contents`; `save_model` writes one with random weights, for a GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.pipelines import PIPELINES, TOKENS, build_networks, save_parts
from xdpo.batch import Tokens
from xdpo.families import PipelineParts
from xdpo.families.flux import FLUX
from xdpo.families.interface import Family
from xdpo.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from xdpo.families.stable_diffusion_xl import EMPTY_CAPTION, STABLE_DIFFUSION_XL
from xdpo.scorers.blip import PROMPT_LENGTH, ImageRewardNetwork, blip_networks
from xdpo.scorers.clip import clip_network, clip_vision_network, image_embeddings, text_embeddings
from xdpo.scorers.metrics import ARCHITECTURES, METRICS
from xdpo.scorers.pixels import SIDE

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

END = 2  # the end token of CLIP's configs here: where the pooled state is read, which costs nothing
T5_XXL = {"d_model": 4096, "d_ff": 10_240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32_128}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


@dataclass(frozen=True)
class Model:
    """A model that can be counted."""

    name: str  # for people
    resolution: int  # that it was made for
    build: Callable[[], PipelineParts]
    tokens: dict[str, int] = field(default_factory=lambda: {"input_ids": TOKENS})  # of a caption, for each tokenizer
    t5: str | None = None  # its tokenizer's name
    scheduler: Callable[[], "SchedulerMixin"] | None = None  # of its pipeline; None: it is not for `save_model`

    def captions(self, count: int = 1) -> Tokens:
        """Token ids of `count` captions, all zero."""
        return Tokens({name: torch.zeros(count, length, dtype=torch.long) for name, length in self.tokens.items()})

    def with_t5_tokens(self, count: int | None) -> "Model":
        """The model where T5 reads so many tokens; None: as many as the pipeline has it read."""
        if self.t5 is None or count is None:
            return self
        return replace(self, tokens={**self.tokens, self.t5: count})


def of_shapes(name: str, shapes: Mapping[str, Mapping[str, Any]]) -> Model:
    """A model of Stable Diffusion's kind with these shapes."""
    return Model(name, 512, partial(build_networks, shapes))


def _parts(family: Family, modules: dict[str, nn.Module], choices: dict[str, str] | None = None) -> PipelineParts:
    for module in modules.values():
        module.eval().requires_grad_(False)
    return PipelineParts(family, modules, {}, None, choices=choices or {})


def _clip(sizes: dict[str, int], projection: int, *, projected: bool = True) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        **sizes, projection_dim=projection, max_position_embeddings=TOKENS, bos_token_id=1, eos_token_id=END
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**T5_XXL, feed_forward_proj="gated-gelu", tie_word_embeddings=False))


def _vae(latent_channels: int, **extra: Any) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=latent_channels,
        sample_size=1024,
        **extra,
    )


def stable_diffusion_xl() -> PipelineParts:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    modules = {
        "unet": unet,
        "vae": _vae(4, force_upcast=True),
        "text_encoder": _clip(CLIP_L, 768, projected=False),
        "text_encoder_2": _clip(CLIP_G, 1280),
    }
    return _parts(STABLE_DIFFUSION_XL, modules, {EMPTY_CAPTION: "text"})


def stable_diffusion_35(**sizes: Any) -> PipelineParts:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        attention_head_dim=64,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        qk_norm="rms_norm",
        **sizes,
    )
    modules = {
        "transformer": transformer,
        "vae": _vae(16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": _clip(CLIP_L, 768),
        "text_encoder_2": _clip(CLIP_G, 1280),
        "text_encoder_3": _t5(),
    }
    return _parts(STABLE_DIFFUSION_3, modules)


def flux_dev() -> PipelineParts:
    from diffusers import FluxTransformer2DModel

    modules = {
        "transformer": FluxTransformer2DModel(guidance_embeds=True),
        "vae": _vae(16, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": _clip(CLIP_L, 768, projected=False),
        "text_encoder_2": _t5(),
    }
    return _parts(FLUX._replace(predict=partial(FLUX.predict, guidance=3.5)), modules)


def _diffusion_scheduler() -> "SchedulerMixin":
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )


def _flow_scheduler(**choices: Any) -> "SchedulerMixin":
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, **choices)


_THREE = {"tokenizer": TOKENS, "tokenizer_2": TOKENS, "tokenizer_3": 256}
TRUE_MODELS: dict[str, Model] = {
    "sd15": of_shapes("Stable Diffusion 1.5", PIPELINES["sd15"]),
    "sdxl": Model(
        "Stable Diffusion XL",
        1024,
        stable_diffusion_xl,
        {"tokenizer": TOKENS, "tokenizer_2": TOKENS},
        scheduler=_diffusion_scheduler,
    ),
    "sd35_medium": Model(
        "Stable Diffusion 3.5 medium",
        1024,
        partial(
            stable_diffusion_35,
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
        ),
        _THREE,
        "tokenizer_3",
        _flow_scheduler,
    ),
    "sd35_large": Model(
        "Stable Diffusion 3.5 large",
        1024,
        partial(
            stable_diffusion_35,
            num_layers=38,
            num_attention_heads=38,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
        ),
        _THREE,
        "tokenizer_3",
        _flow_scheduler,
    ),
    "flux": Model(
        "FLUX.1-dev",
        1024,
        flux_dev,
        {"tokenizer": TOKENS, "tokenizer_2": 512},
        "tokenizer_2",
        partial(_flow_scheduler, use_dynamic_shifting=True),
    ),
}
"""The published models, at their true shapes."""


def save_model(model: Model, folder: Path, device: str) -> None:
    """Write a model with random bf16 weights as a pipeline's folder; they are drawn on `device`.

    A training reads them as float32 all the same, unless its config keeps them in bf16.
    """
    torch.manual_seed(0)
    if model.scheduler is None:
        raise ValueError(f"{model.name} has no scheduler here")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            parts = model.build()
    finally:
        torch.set_default_dtype(default)
    save_parts(parts, model.scheduler(), folder)


COUNTABLE = {name: of_shapes(name, shapes) for name, shapes in PIPELINES.items()} | TRUE_MODELS


# --- scorers -------------------------------------------------------------------------------------------


class _Clip(nn.Module):
    """CLIP's score of images and their prompts."""

    def __init__(self, sizes: dict):
        super().__init__()
        self.network = clip_network(sizes)

    def score(self, images: int) -> None:
        embeddings = image_embeddings(self.network, _pixels(images))
        (embeddings * text_embeddings(self.network, torch.ones(images, TOKENS, dtype=torch.long))).sum(-1)


class _ClipVision(nn.Module):
    """The score of images by a head on CLIP's embedding; the head's 4 MB are left out."""

    def __init__(self, sizes: dict):
        super().__init__()
        self.network = clip_vision_network(sizes)

    def score(self, images: int) -> None:
        self.network(pixel_values=_pixels(images))


class _Blip(nn.Module):
    """ImageReward's score of images and their prompts; its head's 4 MB are left out."""

    def __init__(self, sizes: dict):
        super().__init__()
        self.network = ImageRewardNetwork(*blip_networks(sizes), nn.Linear(sizes["text_config"]["hidden_size"], 1))

    def score(self, images: int) -> None:
        tokens = torch.ones(images, PROMPT_LENGTH, dtype=torch.long)
        self.network(_pixels(images), tokens, tokens)


def _pixels(images: int) -> torch.Tensor:
    return torch.zeros(images, 3, SIDE, SIDE)


_SCORERS = {
    "clip_vit_h_14": _Clip,
    "clip_vit_h_14_vision": _ClipVision,
    "clip_vit_l_14": _ClipVision,
    "blip_vit_l_16": _Blip,
}


def is_counted(name: str) -> bool:
    """Whether a scorer is a metric whose network is described here; Qwen2-VL's are not."""
    return name in METRICS and METRICS[name].architecture in _SCORERS


def scorer_network(name: str) -> nn.Module:
    """The network of a metric at its true shape. Its method `score` makes a pass over a number of images."""
    from transformers import PreTrainedModel

    architecture = METRICS[name].architecture
    with patch.object(PreTrainedModel, "init_weights", lambda network: None):  # BLIP's looks at what it has drawn
        return _SCORERS[architecture](ARCHITECTURES[architecture]).eval().requires_grad_(False)
