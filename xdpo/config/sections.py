"""The typed sections of a run: every key with its type, range, default and meaning."""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic.fields import FieldInfo

from xdpo.paths import expanded

_FRACTION = re.compile(r"\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*/\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*")


def _number(value: Any) -> float:
    """An int, a float, or a fraction written as text ("1/6"), as a float."""
    if isinstance(value, str) and (fraction := _FRACTION.fullmatch(value)):
        numerator, denominator = (float(part) for part in fraction.groups())
        if denominator == 0:
            raise ValueError("must be a number, and a fraction cannot divide by zero")
        return numerator / denominator
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("must be a finite number") from None


def _paths(value: Any) -> str | tuple[str, ...]:
    """One path, or several as a tuple; `~` expanded."""
    if isinstance(value, str) and value:
        return expanded(value)
    if isinstance(value, list | tuple) and value and all(isinstance(path, str) and path for path in value):
        return tuple(expanded(path) for path in value)
    raise ValueError("must be a path or a list of paths, none of them empty")


Number = Annotated[float, BeforeValidator(_number)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NonNegativeNumber = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[StrictInt, Field(gt=0)]
CountOrZero = Annotated[StrictInt, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=0, le=2**32 - 1)]
Text = Annotated[StrictStr, Field(min_length=1)]
FilePath = Annotated[Text, AfterValidator(expanded)]
Paths = Annotated[str | tuple[str, ...], BeforeValidator(_paths)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which pipeline is trained, and which of its weights."""

    pipeline: FilePath = Field(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        description="hub id or folder of a pipeline in Stable Diffusion format",
    )
    revision: Text | None = Field(None, description="hub revision of the pipeline (branch, tag or commit)")
    trainable: Literal["full", "lora"] = Field(
        "full", description="train the whole UNet, or low-rank adapters on its attention"
    )
    lora_rank: Count = Field(64, description="rank of the adapters; used when trainable is lora")
    lora_alpha: PositiveNumber = Field(64.0, description="adapters are scaled by lora_alpha / lora_rank")
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="decay per optimizer step of a moving average of the weights; null: none"
    )
    reference_decay: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="the reference follows the policy as a moving average of this decay; null: it stays"
    )


class ComputeConfig(Section):
    """How the arithmetic is done; no key here changes the method."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="autocast type; auto: bf16 where the GPU has it, else fp16, and fp32 on a CPU"
    )
    tf32: StrictBool = Field(True, description="TensorFloat-32 for what stays in float32 on NVIDIA GPUs")
    compile: StrictBool = Field(False, description="torch.compile of the whole UNet; minutes at the start")
    channels_last: StrictBool = Field(False, description="channels-last memory format for the UNet")
    gradient_checkpointing: StrictBool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="attention kernels of the UNet")
    deterministic: StrictBool = Field(
        False, description="kernels that give the same bits each time; slower on a GPU, no difference on a CPU"
    )


class DataConfig(Section):
    """Which preference pairs are read and how their images are prepared."""

    source: Literal["hub", "parquet", "webdataset", "folder"] = Field("hub", description="what path points to")
    path: Paths = Field(
        "liuhuohuo2/pick-a-pic-v2", description="hub id, or files, globs or a folder; a list for several"
    )
    revision: Text | None = Field(None, description="hub revision of the data set (branch, tag or commit)")
    split: Text = Field("train", description="split of a hub data set")
    max_pairs: Count | None = Field(None, description="pairs to use at most; null: all")
    resolution: Annotated[StrictInt, Field(gt=0, multiple_of=8)] = Field(
        512, description="side of the square training images, in pixels"
    )
    crop: Literal["center", "random"] = Field(
        "center", description="square cut out of each image, decided once per pair"
    )
    horizontal_flip: StrictBool = Field(True, description="mirror both images of a pair, every second time")
    sample_latents: StrictBool = Field(True, description="sample the autoencoder's posterior; false: its mean")
    caption_dropout: Share = Field(0.2, description="share of the pairs whose caption is replaced by an empty one")
    num_workers: CountOrZero = Field(
        4, description="data loading processes per training process; 0: load in the training process"
    )
    max_unreadable_share: Share = Field(0.01, description="share of rows that may be unreadable before the run stops")


class CacheConfig(Section):
    """What is computed once and kept on disk: encoded examples, and the reference's errors."""

    examples: FilePath | None = Field(
        None,
        description="folder of encoded images and captions; training then needs no encoders and no data; null: none",
    )
    build: StrictBool = Field(True, description="encode what is missing in cache.examples before training")
    dtype: Literal["fp16", "fp32"] = Field("fp16", description="number format of cache.examples")
    local_copy: FilePath | None = Field(
        None, description="folder on a local disk to which cache.examples is copied first; null: read it where it is"
    )
    reference: FilePath | None = Field(
        None, description="folder of the reference's errors, kept per seed, data and model; null: compute them"
    )


class NoiseConfig(Section):
    """What is random in the diffusion objective, and the weight of a timestep."""

    shared_by_pair: StrictBool = Field(True, description="chosen and rejected image get the same noise")
    weighting: Literal["constant", "min_snr", "temporal_discount"] = Field(
        "constant", description="weight of a pair by its timestep"
    )
    min_snr_gamma: PositiveNumber = Field(5.0, description="signal-to-noise ratio at which min_snr cuts the weight off")
    discount: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.9, description="factor per fiftieth of the schedule for temporal_discount"
    )


_SHAPE = ("eta", "gamma", "n")
_PAIRWISE = ("beta", "label_smoothing", "safeguard")
OBJECTIVE_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "xdpo": (*_PAIRWISE, *_SHAPE, "margin_weight", "reward"),
        "diffusion_dpo": (*_PAIRWISE, "margin_weight"),
        "chipo": (*_PAIRWISE, "margin_weight", "kappa", "max_reward"),
        "f_dpo": (*_PAIRWISE, *_SHAPE, "margin_weight", "divergence", "kappa", "alpha"),
        "ipo": ("beta", "safeguard", "margin_weight"),
        "hinge": ("beta", "safeguard", "margin_weight"),
        "dmpo": ("beta", "safeguard", "margin_weight", "alpha"),
        "alpha_dpo": ("beta", "safeguard", "margin_weight", "alpha"),
        "dspo": ("beta", "safeguard"),
        "mapo": (*_PAIRWISE, "k", "scale"),
        "sft": (),
        "seppo": (*_PAIRWISE, "flip"),
        "diffusion_kto": ("beta", "utility", "desirable_share", "desirable_weight", "undesirable_weight"),
    }
)
"""Every objective (xdpo.loss.OBJECTIVES), and the keys of the loss section that act in it."""

PUBLISHED_BETA: Mapping[str, float] = MappingProxyType(
    {
        "xdpo": 1000.0,
        "diffusion_dpo": 2000.0,
        "chipo": 1000.0,
        "f_dpo": 2000.0,
        "ipo": 5000.0,
        "hinge": 5000.0,
        "dmpo": 2000.0,
        "alpha_dpo": 4000.0,
        "dspo": 0.001,
        "mapo": 0.1,
        "seppo": 2000.0,
        "diffusion_kto": 5000.0,
    }
)
"""The β that an objective has where the config gives none (xdpo.loss has the sources)."""

REFERENCE_FREE = frozenset({"mapo", "sft"})
"""The objectives that need no reference."""


class LossConfig(Section):
    """The preference objective and the numbers of its formula. Keys that are null have their published value."""

    name: Literal[tuple(OBJECTIVE_KEYS)] = Field("xdpo", description="objective")
    beta: PositiveNumber | None = Field(
        None, description="β, strength of the pull to the reference; null: the objective's published one"
    )
    eta: NonNegativeNumber = Field(0.05, description="η, weight of the linear (logarithmic) reward")
    gamma: NonNegativeNumber = Field(1 / 6, description="γ, weight of the exponential (power) reward")
    n: PositiveNumber = Field(6.0, description="n, exponent of the power reward")
    reward: Literal["appendix_c", "eq9", "eq10"] = Field(
        "appendix_c", description="which of the paper's printed rewards"
    )
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = Field(
        0.0, description="probability that a label is wrong (conservative DPO)"
    )
    safeguard: Share | None = Field(
        None, description="μ of Diffusion-SDPO's limit on the rejected image's gradient; null: none"
    )
    margin_weight: PositiveNumber | None = Field(
        None, description="scale of SmPO's weight on a pair's margin, from its two scores; null: none"
    )
    alpha: PositiveNumber | None = Field(None, description="α of dmpo, alpha_dpo, or f_dpo's alpha_divergence")
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence", "xdpo"] | None = Field(
        None, description="f_dpo: which f-divergence keeps the policy near the reference"
    )
    kappa: PositiveNumber | None = Field(None, description="f_dpo and chipo: ln z = −κ·d")
    max_reward: PositiveNumber | None = Field(None, description="chipo: bound R of the reward")
    k: PositiveNumber | None = Field(None, description="mapo: k of f(e) = k·e/(exp(k·e) − 1)")
    scale: PositiveNumber | None = Field(None, description="mapo: factor T of the margin")
    flip: Literal["sign", "indicator"] | None = Field(
        None, description="seppo: the sampled image where the policy is worse: the chosen one, or left out"
    )
    utility: Literal["kto", "loss_averse", "risk_seeking"] | None = Field(
        None, description="diffusion_kto: how gains and losses count"
    )
    desirable_share: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="diffusion_kto: share of desirable images; null: 0.8"
    )
    desirable_weight: PositiveNumber | None = Field(None, description="diffusion_kto: weight of a desirable image")
    undesirable_weight: PositiveNumber | None = Field(None, description="diffusion_kto: weight of any other image")

    @model_validator(mode="before")
    @classmethod
    def _published_beta(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("beta") is None:
            return {**values, "beta": PUBLISHED_BETA.get(values.get("name", cls.model_fields["name"].default))}
        return values

    @property
    def numbers(self) -> dict[str, float | str]:
        """What the objective's function takes: the keys that act in it and have a value."""
        not_its_own = ("safeguard", "margin_weight", "desirable_share")  # the step's and the data's
        keys = [key for key in OBJECTIVE_KEYS[self.name] if key not in not_its_own]
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}

    @property
    def is_unpaired(self) -> bool:
        return self.name == "diffusion_kto"

    @property
    def samples_rejected(self) -> bool:
        """Whether the rejected images are sampled by the run itself."""
        return self.name == "seppo"

    @property
    def needs_reference(self) -> bool:
        return self.name not in REFERENCE_FREE

    @model_validator(mode="after")
    def _has_a_gradient(self):
        if self.name == "xdpo" and self.eta == 0 and self.gamma == 0:
            raise ValueError("eta and gamma are both 0, so that the loss has no gradient; raise one of them")
        return self

    @model_validator(mode="after")
    def _alpha_is_in_range(self):
        if self.name in ("dmpo", "alpha_dpo") and self.alpha is not None and self.alpha >= 1:
            raise ValueError(f"alpha (got {self.alpha}) must lie between 0 and 1 in {self.name}")
        return self

    @model_validator(mode="after")
    def _keys_belong_to_the_objective(self):
        for key, field in type(self).model_fields.items():
            if key != "name" and key not in OBJECTIVE_KEYS[self.name] and getattr(self, key) != field.default:
                owners = ", ".join(name for name, keys in OBJECTIVE_KEYS.items() if key in keys)
                raise ValueError(
                    f"{key} (got {getattr(self, key)}) does not act in {self.name}; it belongs to {owners}. "
                    f"Remove it, or choose one of these as loss.name"
                )
        return self


class SelfPlayConfig(Section):
    """Where loss.name is seppo: how the run's own past becomes reference and opponent."""

    every: Count = Field(30, description="optimizer steps of a round: then a snapshot is kept and images are sampled")
    reference: Literal["random", "latest", "base"] = Field(
        "random", description="which snapshot so far is a round's reference"
    )
    buffer_pairs: Count | None = Field(
        None, description="images sampled in a round, each used as often as it takes; null: one for every pair of it"
    )
    num_inference_steps: Count = Field(50, description="sampler steps")
    guidance_scale: NonNegativeNumber = Field(7.5, description="classifier-free guidance; 1: none")
    batch_size: Count = Field(8, description="images sampled at once on one device; changes results by rounding")


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit keeps its state in 8 bits and needs bitsandbytes"
    )
    learning_rate: PositiveNumber = Field(1e-8, description="learning rate, before scale_lr")
    scale_lr: StrictBool = Field(True, description="multiply the learning rate by the total batch in pairs")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decay of AdamW's two moments")
    eps: PositiveNumber = Field(1e-8, description="AdamW's ε, added to the root of the second moment")
    weight_decay: NonNegativeNumber = Field(1e-2, description="decoupled weight decay")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up; linear and cosine reach 0 at train.max_steps"
    )
    warmup_steps: CountOrZero = Field(500, description="optimizer steps of linear warm-up from 0")
    max_grad_norm: PositiveNumber | None = Field(
        1.0, description="longer gradients are shortened to this norm; null: never"
    )


class TrainConfig(Section):
    """How long, and in what pieces."""

    max_steps: Count = Field(6000, description="optimizer steps of the whole run")
    total_batch_pairs: Count = Field(256, description="pairs per optimizer step, over all processes")
    micro_batch_pairs: Count = Field(1, description="pairs in one forward pass of one process")

    @model_validator(mode="after")
    def _splits_evenly(self):
        if self.total_batch_pairs % self.micro_batch_pairs:
            raise ValueError(splitting_message(self, num_processes=1))
        return self


class EvalConfig(Section):
    """Implicit accuracy and margin on held-out pairs, at fixed timesteps and noise."""

    every: CountOrZero = Field(200, description="optimizer steps between evaluations; 0: never")
    path: Paths | None = Field(None, description="held-out pairs, read as data.source; null: data.path")
    split: Text = Field("validation_unique", description="split of a hub data set")
    pairs: Count = Field(256, description="pairs evaluated, the first ones of the split")
    draws: Count = Field(4, description="fixed draws of timestep and noise per pair")


class SamplesConfig(Section):
    """Images for fixed prompts and seeds, policy beside reference."""

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
    seed: Seed = Field(0, description="prompt i starts from noise of seed + i")
    num_inference_steps: Count = Field(50, description="sampler steps")
    guidance_scale: NonNegativeNumber = Field(7.5, description="classifier-free guidance; 1: none")


class CheckpointConfig(Section):
    """What a killed run can go on from."""

    every: Count = Field(200, description="optimizer steps between checkpoints")
    keep: Count = Field(2, description="checkpoints kept, newest first")


class LogConfig(Section):
    """Where the numbers go besides metrics.jsonl and the progress bar."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(("tensorboard",), description="[]: none")
    project: Text = Field("xdpo", description="project name in the trackers")


class Config(Section):
    """Everything that defines a run. Immutable; equal configs describe the same run."""

    seed: Seed = Field(0, description="the root of all randomness of the training")
    output_dir: FilePath = Field(description="run folder: checkpoints, metrics, samples, the resolved config")
    model: ModelConfig = ModelConfig()
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    cache: CacheConfig = CacheConfig()
    noise: NoiseConfig = NoiseConfig()
    loss: LossConfig = LossConfig()
    self_play: SelfPlayConfig = SelfPlayConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _examples_can_be_cached(self):
        if self.cache.examples and self.data.crop == "random":
            raise ValueError(
                "cache.examples holds one crop of each image; set data.crop to center, or no cache.examples"
            )
        return self

    @model_validator(mode="after")
    def _reference_can_be_kept(self):
        if self.loss.name == "dspo" and self.cache.reference:
            raise ValueError(
                "loss.name: dspo needs the reference's predictions, not only its errors; set cache.reference=null"
            )
        return self

    @model_validator(mode="after")
    def _reference_can_move(self):
        moves = {"model.reference_decay": self.model.reference_decay, "loss.name: seppo": self.loss.name == "seppo"}
        asked = [key for key, value in moves.items() if value]
        if len(asked) == 2:
            raise ValueError("loss.name: seppo draws its own reference; set model.reference_decay=null")
        if asked and self.model.trainable == "lora":
            raise ValueError(
                f"{asked[0]} moves the reference, and with model.trainable=lora that is the policy without its "
                "adapter; set model.trainable=full"
            )
        if asked and self.cache.reference:
            raise ValueError(f"{asked[0]} moves the reference, so its errors can't be kept; set cache.reference=null")
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


def splitting_message(train: TrainConfig, num_processes: int) -> str:
    total, micro = train.total_batch_pairs, train.micro_batch_pairs
    pairs_at_once = micro * num_processes
    below = total // pairs_at_once * pairs_at_once
    totals = [size for size in (below, below + pairs_at_once) if size > 0]
    choices = [f"train.total_batch_pairs {' or '.join(map(str, totals))}"]
    per_process, uneven = divmod(total, num_processes)
    if not uneven:
        micros = [size for size in range(1, per_process + 1) if per_process % size == 0]
        nearest = sorted(sorted(micros, key=lambda size: abs(size - micro))[:3])
        choices.append(f"train.micro_batch_pairs {' or '.join(map(str, nearest))}")
    pieces = f"micro batches of {micro}"
    if num_processes > 1:
        pieces = f"{num_processes} processes with {pieces}"
    return f"a total batch of {total} pairs cannot be split into {pieces}; choose {', or '.join(choices)}"
