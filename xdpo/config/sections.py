"""The typed sections of a run: every key with its type, range, default and meaning.

Each key is described here only: the help of the command line and configs/base.yaml are generated from it
(xdpo.config.explain).
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator
from pydantic.fields import FieldInfo

from xdpo.config.loss import LossConfig
from xdpo.config.splitting import micro_steps
from xdpo.config.types import (
    Bounds,
    Columns,
    Count,
    CountOrZero,
    Decay,
    FilePath,
    NonNegativeNumber,
    Number,
    Paths,
    PositiveNumber,
    Section,
    Seed,
    Share,
    Text,
)


class ModelConfig(Section):
    """Which pipeline is trained, and which of its weights."""

    pipeline: FilePath = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        description="hub id, or a folder in diffusers' format; docs/base_models.md lists the families",
    )
    revision: Text | None = Field(
        None, description="hub branch, tag or commit of the pipeline; a commit makes a run repeatable"
    )
    family: Text | None = Field(
        None,
        description="the family that the config is for, by its pipeline's class in diffusers: a pipeline of another "
        "family is refused; null: any",
    )
    vae: FilePath | None = Field(
        None,
        description="hub id or folder of an autoencoder, itself or under vae/, in place of the pipeline's; null: the "
        "pipeline's own",
    )
    empty_caption: Literal["zeros", "text"] | None = Field(
        None,
        description="Stable Diffusion XL alone: what an empty caption is encoded as, zeros or the encoders' states of "
        "no words; null: as the pipeline samples",
    )
    size_conditioning: Literal["original"] | None = Field(
        None,
        description="Stable Diffusion XL alone: what it is told of each image's size while it trains; original: height "
        "and width of the file, and what was cropped; null: data.resolution and uncropped, as the pipeline samples",
    )
    t5_tokens: Annotated[StrictInt, Field(gt=0, le=512)] | None = Field(
        None,
        description="Stable Diffusion 3 and FLUX alone: tokens of a caption that T5 reads; fewer make a smaller "
        "cache.examples and faster steps, and cut long captions; null: as the pipeline samples, 256 and 512",
    )
    trainable: Literal["full", "lora"] = Field(
        "full",
        description="full: the whole UNet, with a frozen copy beside it as the reference; lora: adapters on its "
        "attention, the reference being the same UNet with them off",
    )
    frozen_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="number format in which weights that are never trained are kept: the text encoders' and, with "
        "lora, the base model's; bf16 halves them, and needs a compute.precision below fp32",
    )
    guidance: NonNegativeNumber | None = Field(
        None,
        description="what a guidance-distilled model (FLUX.1-dev) is told while it trains; 1: no guidance; null: 3.5, "
        "as it samples",
    )
    lora_rank: Count = Field(64, description="rank of the adapters: more to learn with, more memory")
    lora_alpha: PositiveNumber = Field(64.0, description="adapters are scaled by lora_alpha / lora_rank")
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="decay per optimizer step of a moving average of the weights, such as 0.999; null: none"
    )
    reference_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None,
        description="the reference follows the policy as a moving average of this decay per optimizer step, such as "
        "0.999; null: it stays",
    )


class ComputeConfig(Section):
    """Speed and memory; no key here changes the method."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto",
        description="number format of autocast; auto: bf16 where the GPU has it, else fp16, and fp32 on a CPU. Trained "
        "weights stay float32 in every case",
    )
    tf32: StrictBool = Field(True, description="TensorFloat-32 for what is left in float32 on NVIDIA GPUs")
    compile: StrictBool = Field(
        False,
        description="torch.compile of the UNet where it trains; evaluation and samples run uncompiled. Minutes at the "
        "start, faster steps, for long runs; other bits than without",
    )
    channels_last: StrictBool = Field(
        False, description="channels-last memory format of the UNet: can help convolutions on recent GPUs"
    )
    gradient_checkpointing: StrictBool = Field(
        False, description="about a quarter more time for less memory: when the GPU runs out of it"
    )
    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="attention of the UNet: PyTorch's fused kernels, or plain matrix products to compare with"
    )
    deterministic: StrictBool = Field(
        False,
        description="GPU kernels that give the same bits each time, which cost time; a CPU's do anyway. "
        "docs/performance.md says what is promised with it and without",
    )


class DataConfig(Section):
    """Which preference pairs are read and how their images are prepared."""

    source: Literal["hub", "parquet", "webdataset", "folder"] = Field("hub", description="what path points to")
    path: Paths = Field(
        "liuhuohuo2/pick-a-pic-v2",
        description="hub id; or files, globs or, to fill cache.examples, URLs (a list for several); or a folder. This "
        "is a copy of Pick-a-Pic v2: the original, yuvalkirstain/pickapic_v2, is gone",
    )
    revision: Text | None = Field(None, description="hub branch, tag or commit of the data set")
    split: Text = Field("train", description="split of a hub data set")
    columns: Columns | None = Field(
        None,
        description="what columns stand for, with their names in the files, such as {chosen: winner, rejected: loser, "
        "caption: prompt}; docs/data.md has those of other data sets. null: the names of Pick-a-Pic",
    )
    max_pairs: Count | None = Field(None, description="use no more pairs than this, for a trial; null: all")
    resolution: Annotated[StrictInt, Field(gt=0, multiple_of=8)] = Field(
        512, description="side of the square images in pixels, a multiple of 8: what the pipeline was made for"
    )
    crop: Literal["center", "random"] = Field(
        "center", description="the square cut out of an image, the same for both of a pair"
    )
    horizontal_flip: StrictBool = Field(
        True, description="mirror half of the pairs; false where captions say left and right"
    )
    sample_latents: StrictBool = Field(
        True, description="sample the autoencoder's posterior of each image; false: take its mean"
    )
    caption_dropout: Share = Field(
        0.2, description="share of the pairs trained with an empty caption, for classifier-free guidance"
    )
    num_workers: CountOrZero = Field(
        4, description="loading processes per training process; 0: load in the training process"
    )
    max_unreadable_share: Share = Field(0.01, description="stop when a larger share of the rows cannot be read")


class FilterConfig(Section):
    """Which pairs are left out, training and held-out ones alike; each is counted. docs/data.md."""

    captions: FilePath | None = Field(
        None,
        description="file of words and phrases, one a line: pairs whose caption has one of them, as whole words in "
        "upper or lower case, are left out; null: none",
    )
    columns: Bounds | None = Field(
        None,
        description="lowest and highest value of columns of numbers, such as scores of safety: {nsfw: [null, 0.5]}; a "
        "pair without a value is left out. null: none",
    )
    min_side: Count | None = Field(
        None, description="pixels that the shorter side of both images must have; null: any. Remote files do not tell"
    )
    max_aspect: Annotated[Number, Field(ge=1)] | None = Field(
        None, description="most that the longer side of either image may be of its shorter one, such as 2; null: any"
    )
    held_out_captions: StrictBool = Field(
        False, description="leave out training pairs with a held-out pair's caption, so that no pair is in both"
    )

    @property
    def needs_sides(self) -> bool:
        """Whether images' sizes in pixels are needed."""
        return self.min_side is not None or self.max_aspect is not None


class CacheConfig(Section):
    """What never changes while training, computed once and kept on disk; see docs/performance.md."""

    examples: FilePath | None = Field(
        None,
        description="folder of encoded images and captions: no encoders and no source data needed any more. Pick-a-Pic "
        "v2 at 512 pixels: 63 GB with data.horizontal_flip and data.sample_latents false; either doubles its latents' "
        "56 GB. null: none",
    )
    build: StrictBool = Field(
        True,
        description="encode what is missing in cache.examples before training; or ahead: scripts/cache_examples.py",
    )
    keep_source: StrictBool = Field(
        False,
        description="keep the files that were fetched for encoding, in a folder of cache.examples; false: let each go "
        "when its images are encoded, so that the disk holds the cache and a few files",
    )
    dtype: Literal["fp16", "fp32"] = Field(
        "fp16",
        description="number format of cache.examples; fp32: twice the size, and the very bits of a run without a cache",
    )
    local_copy: FilePath | None = Field(
        None,
        description="copy cache.examples to this folder on a local disk first, where storage is shared and slow; null: "
        "read it where it is",
    )
    reference: FilePath | None = Field(
        None,
        description="folder of the reference's errors: recorded by any run, reused by every later one with the same "
        "data, seed, noise and model, whatever its loss. 12 MB for 6,000 steps of 256; null: compute them",
    )


class NoiseConfig(Section):
    """Which times and which noise are drawn, and the weight of a time."""

    shared_by_pair: StrictBool = Field(
        True, description="one noise for chosen and rejected image (Appendix C); false: one each"
    )
    shift: PositiveNumber | None = Field(
        None,
        description="flows (Stable Diffusion 3, FLUX): above 1 more of the times are noisy ones, 1 is plain "
        "logit-normal; null: as the pipeline samples, 3 for Stable Diffusion 3, by resolution for FLUX",
    )
    weighting: Literal["constant", "min_snr", "temporal_discount"] = Field(
        "constant", description="weight of a pair by its time; temporal_discount in diffusions alone"
    )
    min_snr_gamma: PositiveNumber = Field(5.0, description="signal-to-noise ratio at which min_snr cuts the weight off")
    discount: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.9,
        description="temporal_discount: the weight falls by this factor per fiftieth of the schedule, from the "
        "noisiest timestep to the cleanest; mean 1",
    )


class SelfPlayConfig(Section):
    """For self-play alone (see loss.name), whose paper leaves much of this open."""

    every: Count = Field(
        30,
        description="optimizer steps of a round (stated). Where it begins, the policy is kept as a snapshot (3.4 GB), "
        "one snapshot becomes the reference, and it samples an image for each pair, kept in output_dir/self_play "
        "(66 kB each) until a checkpoint lies behind the round",
    )
    reference: Literal["random", "latest", "base"] = Field(
        "random",
        description="which snapshot a round's reference is; random: any so far, the base model among them (stated, "
        "its best)",
    )
    buffer_pairs: Count | None = Field(
        None,
        description="how many images are sampled in a round, to be used again at other timesteps and noise (ours: "
        "sampling costs more than training); null: one for every pair",
    )
    num_inference_steps: Count = Field(50, description="sampler steps (not stated)")
    guidance_scale: NonNegativeNumber = Field(
        7.5, description="classifier-free guidance while sampling; 1: none (not stated)"
    )
    batch_size: Count = Field(8, description="images sampled at once; changes results by rounding")


class FeedConfig(Section):
    """What an optimizer step trains on."""

    name: Literal["offline", "online_pairs", "online_images"] = Field(
        "offline",
        description="offline: the data's pairs; online_pairs: the policy's own images, ranked by rewards (see online); "
        "online_images: the same one by one, each as good as its reward says, for objectives on single images",
    )

    @property
    def is_online(self) -> bool:
        return self.name != "offline"


class OnlineConfig(Section):
    """For feed.name=online_pairs and online_images alone; docs/online.md."""

    every: Count = Field(
        30,
        description="optimizer steps of a round. Where it begins, the policy samples images, which are scored, paired "
        "and kept in output_dir/online_samples (66 kB each) until a checkpoint lies behind the round",
    )
    prompts: FilePath | None = Field(
        None, description="a prompt set by its name, or a file of prompts; null: the training pairs' captions"
    )
    prompts_per_round: Count = Field(64, description="prompts of a round")
    images_per_prompt: Annotated[StrictInt, Field(ge=2)] = Field(
        4, description="images of a prompt, which differ in their starting noise"
    )
    rewards: tuple[Text, ...] = Field(
        ("pickscore",), description="scorers that training maximises, as evaluate.py names them; each is normalised"
    )
    reward_weights: tuple[Number, ...] | None = Field(
        None, description="a factor for each reward, after its normalisation; null: 1 each"
    )
    held_out_rewards: tuple[Text, ...] = Field(
        ("image_reward",), description="scorers that are logged in every round and that training never sees"
    )
    scorer_weights: FilePath | None = Field(
        None, description="folder of {repository}/{file} with the scorers' weights; null: the hub"
    )
    keep_scorers: StrictBool = Field(
        True, description="keep the scorers in memory between rounds; false: load them in each"
    )
    pairs: Literal["best_worst", "all"] = Field(
        "best_worst", description="best_worst: one pair of a prompt; all: every pair that the margin admits"
    )
    margin: NonNegativeNumber = Field(
        0.0, description="a pair's rewards differ by more than this, in the normalised rewards' deviations"
    )
    advantage_limit: PositiveNumber = Field(
        5.0, description="online_images: advantages are cut off at so many deviations, where an image counts fully"
    )
    sampler: Literal["policy", "average", "reference"] = Field(
        "policy",
        description="which weights sample: the policy's, their moving average (model.ema_decay), or the reference's",
    )
    renew_reference: StrictBool = Field(
        False, description="the reference becomes the policy where a round begins; false: it stays the base model"
    )
    offline_share: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the pairs that are the data's instead of the round's"
    )
    num_inference_steps: Count = Field(20, description="sampler steps")
    guidance_scale: NonNegativeNumber = Field(7.5, description="classifier-free guidance while sampling; 1: none")
    batch_size: Count = Field(8, description="images sampled at once; changes results by rounding")

    @property
    def weights(self) -> tuple[float, ...]:
        """A factor for each reward."""
        return self.reward_weights or (1.0,) * len(self.rewards)

    @model_validator(mode="after")
    def _rewards_are_weighted_and_held_out(self):
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one scorer")
        if len(self.weights) != len(self.rewards):
            raise ValueError(f"reward_weights has {len(self.weights)} numbers for {len(self.rewards)} rewards")
        names = (*self.rewards, *self.held_out_rewards)
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{repeated[0]} is named twice in rewards and held_out_rewards; a held-out reward is not trained on"
            )
        return self


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = Field(
        "adamw",
        description="adamw8bit needs bitsandbytes, and 5 GB less for Stable Diffusion 1.5; adafactor has a moment of "
        "rows and columns",
    )
    learning_rate: PositiveNumber = Field(1e-8, description="learning rate, before scale_lr")
    scale_lr: StrictBool = Field(
        True,
        description="multiply the learning rate by train.total_batch_pairs; what counts is the product, here 2.56e-6",
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's: decay of its moments, each below 1")
    eps: PositiveNumber = Field(1e-8, description="AdamW's ε, added to the root of the second moment")
    weight_decay: NonNegativeNumber = Field(1e-2, description="decoupled weight decay")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up; linear and cosine reach 0 at train.max_steps"
    )
    warmup_steps: CountOrZero = Field(500, description="optimizer steps of linear warm-up from 0")
    max_grad_norm: PositiveNumber | None = Field(1.0, description="clip gradients to this norm; null: no clipping")

    @model_validator(mode="after")
    def _adafactor_has_its_own_moments(self):
        idle = [key for key in ("betas", "eps") if getattr(self, key) != type(self).model_fields[key].default]
        if self.name == "adafactor" and idle:
            raise ValueError(f"{idle[0]} is AdamW's, and optim.name is adafactor, which has its own; leave it out")
        return self


class TrainConfig(Section):
    """How long, and in what pieces."""

    max_steps: Count = Field(6000, description="optimizer steps of the whole run; raising it lets a finished run go on")
    total_batch_pairs: Count = Field(
        256, description="pairs per optimizer step = processes × accumulation × micro_batch_pairs"
    )
    micro_batch_pairs: Count = Field(
        1, description="pairs in one forward pass of one GPU: as many as fit; results stay the same"
    )

    @model_validator(mode="after")
    def _splits_evenly(self):
        micro_steps(self.total_batch_pairs, self.micro_batch_pairs, num_processes=1)
        return self


class EvalConfig(Section):
    """Implicit accuracy and margin on held-out pairs, at fixed timesteps and noise."""

    every: CountOrZero = Field(200, description="optimizer steps between evaluations; 0: never")
    path: Paths | None = Field(
        None, description="held-out pairs, read as data.source says; null: data.path, with this section's split"
    )
    split: Text = Field("validation_unique", description="split of a hub data set")
    columns: Columns | None = Field(
        None,
        description="what columns of held-out pairs stand for, where theirs differ; null: as data.columns says; {}: "
        "the names of Pick-a-Pic",
    )
    pairs: Count = Field(
        256, description="how many held-out pairs, the first of the split; more: narrower intervals, more time"
    )
    draws: Count = Field(4, description="fixed draws of timestep and noise per pair, equal in all runs of one seed")


class SamplesConfig(Section):
    """Images on the way, for fixed prompts and seeds, policy beside reference."""

    every: CountOrZero = Field(500, description="optimizer steps between sample sheets; 0: never")
    prompts: tuple[Text, ...] = Field(
        (
            "a lighthouse on a cliff in a thunderstorm, oil painting",
            "portrait of an old fisherman, natural light, 85mm photograph",
            "a red bicycle leaning against a yellow wall",
            "a fox reading a newspaper in a cafe, watercolour",
        ),
        description="one image each",
    )
    seed: Seed = Field(0, description="prompt i starts from the noise of seed + i")
    num_inference_steps: Count = Field(50, description="sampler steps")
    guidance_scale: NonNegativeNumber = Field(7.5, description="classifier-free guidance; 1: none")


class CheckpointConfig(Section):
    """What a killed run can go on from; about 10 GB each when all of Stable Diffusion 1.5 is trained."""

    every: Count = Field(200, description="optimizer steps between checkpoints: the most that a killed run loses")
    keep: Count = Field(2, description="how many checkpoints are kept, the newest")


class ExportConfig(Section):
    """In which forms the trained model is written, in export/; scripts/export.py writes them of older runs."""

    formats: tuple[
        Literal["diffusers", "diffusers_fp16", "single_file", "single_file_fp16", "unet", "unet_fp16"], ...
    ] = Field(
        ("diffusers",),
        description="diffusers: its folder or LoRA file, always written; single_file: a safetensors file for "
        "ComfyUI, A1111 and Forge, the whole checkpoint or a LoRA in kohya's names; unet: such a file without "
        "encoders; each again with _fp16, in half precision. Single files are of Stable Diffusion 1.x, 2.x and XL",
    )

    @model_validator(mode="after")
    def _diffusers_is_written(self):
        if "diffusers" not in self.formats:
            raise ValueError("formats: diffusers is always written, since everything here reads it; add it")
        return self


class LogConfig(Section):
    """Where the numbers go besides metrics.jsonl and the progress bar."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        ("tensorboard",), description="tensorboard, wandb, both, or [] for none"
    )
    project: Text = Field("xdpo", description="project name in the trackers")


class Config(Section):
    """Everything that defines a run. Immutable; equal configs describe the same run."""

    seed: Seed = Field(0, description="root of all randomness of the training, 0 … 2^32 - 1")
    output_dir: FilePath = Field(
        description="run folder: checkpoints, metrics, samples, the resolved config; a run found in it is resumed"
    )
    model: ModelConfig = ModelConfig()
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    filter: FilterConfig = FilterConfig()
    cache: CacheConfig = CacheConfig()
    noise: NoiseConfig = NoiseConfig()
    loss: LossConfig = LossConfig()
    self_play: SelfPlayConfig = SelfPlayConfig()
    feed: FeedConfig = FeedConfig()
    online: OnlineConfig = OnlineConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    log: LogConfig = LogConfig()

    @property
    def exports_encoders(self) -> bool:
        """Whether the exported model has the encoders' weights too."""
        is_single = any(form.startswith("single_file") for form in self.export.formats)
        return is_single and self.model.trainable == "full"

    @model_validator(mode="after")
    def _whole_checkpoints_are_exact(self):
        if self.exports_encoders and self.model.frozen_precision != "fp32":
            raise ValueError(
                "export.formats: a whole checkpoint would have text encoders rounded to model.frozen_precision "
                f"{self.model.frozen_precision}; set it to fp32, or convert the finished run by scripts/export.py"
            )
        return self

    @model_validator(mode="after")
    def _captions_are_held_out(self):
        if self.filter.held_out_captions and not self.eval.every:
            raise ValueError("filter.held_out_captions needs held-out pairs, and eval.every is 0; change one of them")
        return self

    @model_validator(mode="after")
    def _examples_can_be_cached(self):
        if self.cache.examples and self.data.crop == "random":
            raise ValueError(
                "cache.examples holds one crop of each image; set data.crop to center, or no cache.examples"
            )
        return self

    @model_validator(mode="after")
    def _reference_can_be_kept(self):
        if self.loss.objective.needs_predictions and self.cache.reference:
            raise ValueError(
                f"loss.name: {self.loss.name} needs the reference's predictions, not only its errors; "
                "set cache.reference=null"
            )
        return self

    @model_validator(mode="after")
    def _reference_can_move(self):
        objective = f"loss.name: {self.loss.name}"
        moves = {
            "model.reference_decay": self.model.reference_decay,
            "online.renew_reference": self.online.renew_reference,
            objective: self.loss.samples_rejected,
        }
        asked = [key for key, value in moves.items() if value]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} both decide what the reference is; choose one")
        if asked and self.model.trainable == "lora":
            raise ValueError(
                f"{asked[0]} moves the reference, and with model.trainable=lora that is the policy without its "
                "adapter; set model.trainable=full"
            )
        if asked and self.cache.reference:
            raise ValueError(f"{asked[0]} moves the reference, so its errors can't be kept; set cache.reference=null")
        return self

    @model_validator(mode="after")
    def _pairs_can_be_online(self):
        loss, online = self.loss, self.online
        if not self.feed.is_online:
            default = OnlineConfig()
            given = [key for key in OnlineConfig.model_fields if getattr(online, key) != getattr(default, key)]
            if given:
                raise ValueError(f"online.{given[0]} is for online feeds, and feed.name is offline")
            return self
        refused = {
            f"loss.name={loss.name} trains on {loss.objective.takes}": loss.objective.takes
            != self.feed.name.removeprefix("online_"),
            f"loss.name={loss.name} samples its own rejected images": loss.samples_rejected,
            f"loss.name={loss.name} has no reference, which online.renew_reference renews": online.renew_reference
            and not loss.needs_reference,
            "loss.margin_weight weighs the data's pairs by their scores": loss.margin_weight is not None,
            "cache.reference keeps errors on the data's pairs": self.cache.reference,
            "cache.examples leaves no text encoder for online.prompts": self.cache.examples and online.prompts,
            "online.sampler=average needs model.ema_decay": online.sampler == "average" and not self.model.ema_decay,
            "online.sampler=reference needs a reference with weights of its own": online.sampler == "reference"
            and (self.model.trainable == "lora" or not loss.needs_reference),
            "online.offline_share mixes pairs with pairs": online.offline_share and self.feed.name != "online_pairs",
        }
        if problems := [problem for problem, applies in refused.items() if applies]:
            raise ValueError(f"feed.name={self.feed.name}: {problems[0]}; change one of the two")
        return self


SECTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
)


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for name, field in Config.model_fields.items():
        if name not in SECTIONS:
            yield name, field
            continue
        for key, inner in SECTIONS[name].model_fields.items():
            yield f"{name}.{key}", inner


KEYS: Mapping[str, FieldInfo] = MappingProxyType(dict(_fields()))
"""Every key by its dotted name, in the order of the file."""
