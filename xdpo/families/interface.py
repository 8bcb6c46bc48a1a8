"""A family of base models: a record of everything that differs between families."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from xdpo.batch import Conditioning, LatentMoments, Tokens
from xdpo.config import ModelConfig, NoiseConfig
from xdpo.noise import Process

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Choices = Mapping[str, Any]
"""What decides the encoding of captions besides the files of a pipeline's parts, by name; JSON."""


@dataclass(frozen=True)
class PipelineParts:
    """The loaded parts of a pipeline, by the names of their folders; nothing is trainable.

    Weights are float32, but for those that model.frozen_precision keeps in bf16.
    """

    family: "Family"
    modules: Mapping[str, "ModelMixin | PreTrainedModel"]  # the denoiser, and unless left out the encoders
    tokenizers: Mapping[str, "PreTrainedTokenizerBase"]
    scheduler: "SchedulerMixin"
    options: Mapping[str, Any] = field(default_factory=dict)  # arguments of the pipeline's class that are no parts
    choices: Choices = field(default_factory=dict)  # see Family

    @property
    def denoiser(self) -> "ModelMixin":
        return self.modules[self.family.denoiser]

    @property
    def encoders(self) -> "tuple[ModelMixin | PreTrainedModel, ...]":
        """Autoencoder and text encoders; empty where they were left out."""
        return tuple(self.modules[name] for name in self.family.encoders if name in self.modules)

    @property
    def vae(self) -> "AutoencoderKL":
        """The autoencoder. Raises KeyError where the encoders were left out."""
        return self.modules["vae"]

    def process(self, noise: NoiseConfig) -> Process:
        """The process of the scheduler and the config, on the CPU. Raises ValueError for one that can't be trained."""
        return self.family.process(self.scheduler, noise)

    @property
    def tokenize(self) -> Callable[[str], tuple[Tokens, bool]]:
        """Caption → its token ids, (L,) each, and whether it is longer than the text encoders read.

        A function of tokenizers and choices alone: data sets keep it, and are sent to processes that load.
        """
        return partial(self.family.tokenize, self.tokenizers, self.choices)

    def encode_captions(self, tokens: Tokens) -> Conditioning:
        """Token ids (N, L) → the denoiser's inputs from them, (N, …)."""
        return self.family.encode_captions(self, tokens)

    def encode_images(self, pixel_values: Tensor) -> LatentMoments:
        """Pixels (N, 3, R, R) in [−1, 1] → the posterior's moments, (N, C, h, w) float32."""
        return self.family.encode_images(self, pixel_values)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image of side `resolution` in pixels."""
        return self.family.latent_shape(self, resolution)


def unchanged(value: Any, *_: Any) -> Any:
    return value


def older_lora_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names that every version of diffusers loads into a UNet. It doesn't know those of all layers of a transformer."""
    from diffusers.utils import convert_state_dict_to_diffusers

    return convert_state_dict_to_diffusers(weights)


def _no_problem(index: Mapping[str, Any]) -> str | None:
    return None


def _no_choices(model: ModelConfig, index: Mapping[str, Any]) -> Choices:
    return {}


def _no_sampling_arguments(choices: Choices) -> dict[str, Any]:
    return {}


def _no_predict_arguments(folder: Path, model: ModelConfig) -> dict[str, Any]:
    return {}


def _without_size(conditioning: Conditioning, resolution: int, sizes: Tensor | None = None) -> Conditioning:
    return conditioning


class Family(NamedTuple):
    """One family: names, and functions without state that work on the parts that they are given."""

    name: str  # for people
    pipeline_class: str  # in diffusers; also the `_class_name` in model_index.json
    denoiser: str  # folder of the trained network, in a pipeline and in an export
    encoders: tuple[str, ...]  # folders of the autoencoder, "vae", and the text encoders
    tokenizers: tuple[str, ...]  # folders
    classes: Mapping[str, tuple[str, ...]]  # folder with weights → its class in diffusers or transformers, or several
    lora_targets: tuple[str, ...]  # layers that a LoRA adapter changes, by the end of their names
    without_extras: Mapping[str, Any]  # arguments of the pipeline class that leave out unused parts

    problems: Callable[[Path], list[str]]
    """A sentence for each problem of the configs and vocabularies of a pipeline that has all parts."""

    denoiser_problems: Callable[[Path, Path], list[str]]
    """The same of a denoiser's folder that is to replace that of a checked pipeline, the second folder."""

    process: "Callable[[SchedulerMixin, NoiseConfig], Process]"
    tokenize: "Callable[[Mapping[str, PreTrainedTokenizerBase], Choices, str], tuple[Tokens, bool]]"
    encode_captions: Callable[[PipelineParts, Tokens], Conditioning]
    encode_images: Callable[[PipelineParts, Tensor], LatentMoments]
    latent_shape: Callable[[PipelineParts, int], tuple[int, int, int]]
    # These five: see PipelineParts, which has a method for each.

    conditioning_shapes: Callable[[PipelineParts], dict[str, tuple[int, ...]]]
    """The shape of each entry of a Conditioning, for one caption."""

    to_latents: Callable[[LatentMoments, Tensor | None], Tensor]
    """Latents (N, C, h, w) for the denoiser: a sample of the posterior with this noise, or its mean without noise."""

    predict: Callable[..., Tensor]
    """Denoiser, noisy latents (N, C, h, w), times (N,), conditioning, `predict_arguments` → prediction (N, C, h, w)."""

    prompt_arguments: Callable[[Conditioning, Conditioning], dict[str, Tensor]]
    """The pipeline's arguments for N captions and for N empty ones, which guidance starts from."""

    decode: "Callable[[DiffusionPipeline, Tensor], Tensor]"
    """Latents as the pipeline returns them → pixel values (N, 3, H, W) around [−1, 1]."""

    use_plain_attention: Callable[[nn.Module], None] | None
    """Make a denoiser's attention matrix products and a softmax, without fused kernels (compute.attention=eager)."""

    index_problem: Callable[[Mapping[str, Any]], str | None] = _no_problem
    """What a model_index.json says against its pipeline, before the pipeline's folders are looked at."""

    keys: tuple[str, ...] = ()  # of the config's model section, which must be null in a family without them

    choices: Callable[[ModelConfig, Mapping[str, Any]], Choices] = _no_choices
    """See Choices; by the config and the pipeline's index. Raises ValueError for an idle key."""

    sampling_arguments: Callable[[Choices], dict[str, Any]] = _no_sampling_arguments
    """The pipeline's arguments by which it encodes captions as these choices say."""

    with_size: Callable[..., Conditioning] = _without_size
    """Conditioning of N captions, side in pixels → with what the denoiser is told of N square images of this side.

    Its third argument, sizes (N, 4) as data.images.size_and_crop gives them, says what they were cut from; where it is
    left out they are whole.
    """

    predict_arguments: Callable[[Path, ModelConfig], dict[str, Any]] = _no_predict_arguments
    """Further arguments of `predict`, from a pipeline's configs and a config. Raises ValueError for an idle key."""

    optional: tuple[str, ...] = ()
    """The encoders and tokenizers that a pipeline may lack; `without` leaves them out."""

    size_multiple: int = 8
    """An image's side in pixels is a multiple of this."""

    is_flow: bool = False  # only its pipeline's scheduler samples it

    guidance: float = 7.5
    """The guidance that its pipeline samples with, where none is asked for."""

    pack: Callable[[Tensor], Tensor] = unchanged
    """Latents (N, C, h, w) → as the pipeline takes and returns them."""

    unpack: Callable[[Tensor, int], Tensor] = unchanged
    """The way back, to latents of height h."""

    lora_names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = older_lora_names
    """An adapter's weights by PEFT's names → by those that are exported."""

    single_file: Mapping[str, Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]] = {}
    """Folder with weights → (its weights, its config) → the same by the original checkpoint's names; {} where unknown.
    """

    kohyas_layer: Callable[[Mapping[str, Any], str], str] | None = None
    """(The denoiser's config, an adapted layer) → what kohya's scripts call that layer; None where it is unknown."""

    def without(self, lacking: Collection[str]) -> "Family":
        """The record of a pipeline that lacks these of its optional parts."""
        return self._replace(
            encoders=tuple(name for name in self.encoders if name not in lacking),
            tokenizers=tuple(name for name in self.tokenizers if name not in lacking),
            without_extras={**self.without_extras, **dict.fromkeys(lacking)},
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """Every folder of a pipeline that is read."""
        return (*self.tokenizers, *self.with_weights, "scheduler")

    @property
    def with_weights(self) -> tuple[str, ...]:
        return (*self.encoders, self.denoiser)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(name for name in self.encoders if name != "vae")

    @property
    def lora_parts(self) -> tuple[str, ...]:
        """The parts that a LoRA file may adapt."""
        return (self.denoiser, *self.text_encoders)
