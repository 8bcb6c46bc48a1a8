"""Bytes on one GPU in every phase of a training, counted op by op, without a GPU, weights or memory for them.

The training's own steps run on fake tensors, which have shapes but no contents, and the living storages are summed
after each op. Autocast is the CPU's with CUDA's float32 ops. A GPU holds more than is counted: CUDA's context and
libraries (about 0.5 GB), NCCL's buffers on several GPUs (0.1 to 0.3 GB), the workspaces of cuDNN and of attention's
backward, and what the allocator loses to fragments.
"""

import multiprocessing
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.pipelines import without_contents
from benchmarks.true_models import COUNTABLE, Model, is_counted, scorer_network
from xdpo import learner, models, step
from xdpo.batch import Batch, Conditioning, LatentMoments, SingleImages
from xdpo.compute import build_accelerator
from xdpo.config import Config, accumulation_steps
from xdpo.data import PairWeights, Split
from xdpo.families import held_in_bf16
from xdpo.learner import Learner, build_ema, build_reference, needs_base
from xdpo.noise import DiffusionProcess, FlowProcess, Process
from xdpo.noisy import NoisyBatchMaker
from xdpo.non_finite import SkippedSteps
from xdpo.precompute import takes_single_images
from xdpo.reference import Frozen, Recorded
from xdpo.watch import SAMPLE_CHUNK as IMAGES_OF_A_SHEET

GPU_PRECISIONS = {"auto": "bf16", "fp16": "bf16"}  # what a GPU takes; of one size, and a CPU has no fp16
FLOAT32_ON_CUDA = (  # of the ops of these networks, those that CUDA's autocast runs in float32 and the CPU's doesn't
    *((F, name) for name in ("group_norm", "layer_norm", "interpolate", "softmax")),
    *((torch, name) for name in ("softmax", "exp")),
    (Tensor, "softmax"),
)
ALLOCATION = 512  # bytes: CUDA's allocator rounds each storage up to a multiple


@dataclass(frozen=True)
class Phase:
    """Bytes alive at the end of a phase, its peak, and the op at which the peak was reached."""

    at_rest: int
    peak: int
    op: str


class Meter(TorchDispatchMode):
    """Sums the living storages, of placed tensors and of all results of ops, phase by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, Phase] = {}
        self._living: dict[int, tuple[int, weakref.ref]] = {}  # bytes by the storage's id, until it is freed
        self._now, self._peak, self._op = 0, 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.place(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if self._now > self._peak:
            self._peak, self._op = self._now, str(function).removesuffix(".default")
        return output

    def place(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = id(storage)
            if key not in self._living:
                size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
                self._living[key] = size, weakref.ref(storage, lambda _, key=key: self._forget(key))
                self._now += size

    def remove(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._forget(id(tensor.untyped_storage()))

    def _forget(self, key: int) -> None:
        size, _ = self._living.pop(key, (0, None))
        self._now -= size

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._peak, self._op = self._now, "at rest"
        yield
        self.phases.pop(name, None)  # once more: in the order of the last time
        peak, op = max((self._peak, self._op), (self._now, "at rest"))
        self.phases[name] = Phase(self._now, peak, op)


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as CUDA's autocast runs it, within autocast on a CPU."""

    def on_cuda(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tree_map_only(Tensor, lambda tensor: tensor.float(), args)
        return function(*args, **kwargs)

    return on_cuda


@contextmanager
def without_a_device(fake: bool) -> Iterator[None]:
    """A context that runs the training's GPU code on CPU tensors; with `fake` they have no contents."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another config may have another precision
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of fake tensors that are copied, and of a GPU that isn't there
        for owner in (torch.accelerator, torch.cuda):
            stack.enter_context(patch.object(owner, "is_available", return_value=False))
        if fake:
            stack.enter_context(without_contents())
        for owner, name in FLOAT32_ON_CUDA:
            stack.enter_context(patch.object(owner, name, in_float32(getattr(owner, name))))
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        yield


def count(settings: Config, model: Model, processes: int = 1, *, fake: bool = True) -> dict[str, Phase]:
    """The phases of a training on one of `processes` GPUs, in the order of the run.

    A reference cache is taken to be complete. Raises ValueError for a batch that can't be split over the processes.
    """
    accumulation = accumulation_steps(settings, processes)
    precision = GPU_PRECISIONS.get(settings.compute.precision, settings.compute.precision)
    compute = settings.compute.model_copy(update={"precision": precision, "compile": False})
    log = settings.log.model_copy(update={"trackers": []})
    settings = settings.model_copy(update={"compute": compute, "log": log})
    meter = Meter()
    with without_a_device(fake):
        training = Training(settings, model, processes, meter)
        training.start()
        training.update()  # makes the optimizer's moments
        training.micro_step(is_first=accumulation == 1)
        training.update()
        training.evaluate()
        training.draw_samples()
        training.sample_rejected()
        training.sample_online()
        training.save()
        training.resume()
    return meter.phases


def count_apart(settings: Config, pipeline: str, processes: int = 1) -> dict[str, Phase]:
    """`count` in a separate process, because torch sometimes crashes after several counts in one process.

    Raises ValueError where it crashes nevertheless.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(count, settings, COUNTABLE[pipeline], processes).result()
        except BrokenProcessPool as error:
            raise ValueError("the process that counts ended abnormally; run the same command again") from error


def shape_of(settings: Config, processes: int) -> tuple:
    """Everything in a config that its count depends on."""
    loss, samples = settings.loss, settings.samples
    return (
        *settings.model.model_dump(exclude={"pipeline", "revision"}).items(),
        *settings.compute.model_dump().items(),
        (settings.data.resolution, settings.data.sample_latents),
        (bool(settings.cache.examples), bool(settings.cache.reference)),
        (loss.needs_reference, needs_base(settings), loss.samples_rejected, step.inputs_of(loss)),
        takes_single_images(settings, Split.TRAIN),
        (settings.optim.name, settings.train.micro_batch_pairs, accumulation_steps(settings, processes) == 1),
        (settings.eval.every > 0, samples.every > 0, samples.guidance_scale > 1),
        (settings.self_play.batch_size, settings.self_play.guidance_scale > 1) if loss.samples_rejected else None,
        (
            (settings.online.batch_size, settings.online.guidance_scale > 1, settings.online.offline_share > 0),
            (settings.online.keep_scorers, settings.online.rewards, settings.online.held_out_rewards),
        )
        if settings.feed.is_online
        else None,
    )


def scorers_of(settings: Config) -> tuple[str, ...]:
    """The scorers that a training loads."""
    return (*settings.online.rewards, *settings.online.held_out_rewards) if settings.feed.is_online else ()


def uncounted_scorers(settings: Config) -> list[str]:
    """Those of a training's scorers whose shapes are not known here: users' own, reward models, judges, Qwen2-VL's."""
    return [name for name in scorers_of(settings) if not is_counted(name)]


class Training:
    """A training's learner on networks without contents, and the phases of a run, each measured."""

    def __init__(self, settings: Config, model: Model, processes: int, meter: Meter) -> None:
        self.settings, self.processes, self.meter = settings, processes, meter
        self.model = model.with_t5_tokens(settings.model.t5_tokens)
        parts = model.build()
        for name in held_in_bf16(parts.family, settings.model):
            keep_in_bf16(parts.modules[name])
        accelerator = build_accelerator(settings)
        network = None
        if settings.loss.needs_reference and not settings.cache.reference:
            network = models.make_reference(parts, settings.model, settings.compute)
        base = models.make_reference(parts, settings.model, settings.compute) if needs_base(settings) else None
        policy = accelerator.prepare(models.make_policy(parts, settings.model, settings.compute))
        if network is not None:
            network = accelerator.prepare_model(network, evaluation_mode=True)
        if base is not None:
            base = accelerator.prepare_model(base, evaluation_mode=True)
        reference = build_reference(settings, network, policy)
        if settings.cache.reference:
            cache = FullCache(settings.train.micro_batch_pairs)
            reference = Recorded(reference, cache, accelerator.device)
        process: Process = DiffusionProcess(torch.linspace(0.99, 0.01, 1000), "epsilon")
        if parts.family.is_flow:
            process = FlowProcess()
        ones = SimpleNamespace(get=lambda rows, device: torch.ones(len(rows)))
        self.learner = Learner(
            settings=settings,
            accelerator=accelerator,
            parts=parts,
            policy=policy,
            bare_policy=policy,
            optimizer=build_optimizer(settings, models.trainable_parameters(policy)),
            make_noisy=NoisyBatchMaker(parts, process, settings, torch.device("cpu")),
            references={Split.TRAIN: reference, Split.HELD_OUT: reference},
            margin_weights=PairWeights(*(ones if settings.loss.margin_weight is not None else None for _ in range(2))),
            ema=None,
            z0=torch.zeros(()),
            skipped_steps=SkippedSteps(None),
            base=None if base is None else Frozen(base),
        )
        self.latent_shape = parts.latent_shape(settings.data.resolution)
        self.encoded = parts.encode_captions(model.captions())
        self.batch = self._batch()
        self.scorers = [scorer_network(name) for name in scorers_of(settings) if is_counted(name)]

    def start(self) -> None:
        """Weights on the device, and with several processes DDP's buckets, in which the gradients are."""
        learner, settings = self.learner, self.settings
        with self.meter, self.meter.phase("start"):
            base = None if learner.base is None else learner.base.network
            self.meter.place(_tensors(learner.policy, learner.reference.network, base))
            if not settings.cache.examples:
                self.meter.place(_tensors(*learner.parts.encoders))
            if settings.feed.is_online and settings.online.keep_scorers:  # as from the second round on
                self._place_scorers()
            if self.processes > 1:
                self._make_gradients()
            learner.ema = build_ema(settings, learner.parameters)

    def micro_step(self, is_first: bool) -> None:
        """One pass, which accumulates its gradients; before the first one there are none."""
        learner = self.learner
        with self.meter:
            if not is_first:
                self._make_gradients()
            with self.meter.phase("encoding"):
                batch = self._fresh_batch()
                noisy = learner.noisy(batch)
            with self.meter.phase("forward"):
                output = learner.outcome(batch, noisy)
            with self.meter.phase("backward"):
                learner.accelerator.backward(output.loss.mean())

    def update(self) -> None:
        learner = self.learner
        with self.meter, self.meter.phase("update"):
            self._make_gradients()
            learner.accelerator.clip_grad_norm_(learner.parameters, self.settings.optim.max_grad_norm or float("inf"))
            learner.optimizer.step()
            learner.optimizer.zero_grad(set_to_none=self.processes == 1)
            if learner.ema is not None:
                learner.ema.step(learner.parameters)
            learner.reference.after_update(learner.bare_policy)

    @torch.no_grad()
    def evaluate(self) -> None:
        if self.settings.eval.every:
            with self.meter, self.meter.phase("evaluation"):
                self.learner.measure(self._fresh_batch()._replace(single=None), Split.HELD_OUT)

    @torch.no_grad()
    def draw_samples(self) -> None:
        """A sheet's two columns."""
        learner, samples = self.learner, self.settings.samples
        if samples.every:
            with self._drawing("samples"):
                with learner.reference.running() as reference:
                    if reference is not None:
                        self._draw(reference, IMAGES_OF_A_SHEET, samples.guidance_scale)
                self._draw(learner.bare_policy, IMAGES_OF_A_SHEET, samples.guidance_scale)

    @torch.no_grad()
    def sample_rejected(self) -> None:
        """A batch of a self-play round; its latents are kept on the CPU."""
        if self.settings.loss.samples_rejected:
            sampling = self.settings.self_play
            captions = self._captions_at_once(sampling.batch_size, sampling.guidance_scale)
            with self.meter, self.meter.phase("self-play"), self.learner.accelerator.autocast():
                states = self._conditioning(captions)
                self._sample(self.learner.reference.network, states, sampling.batch_size)

    @torch.no_grad()
    def sample_online(self) -> None:
        """A batch of an online round, decoded and scored in float32; scorers that aren't kept come and go with it."""
        if not self.settings.feed.is_online:
            return
        online, parts = self.settings.online, self.learner.parts
        with self._drawing("online"):
            states = self._states(online.batch_size, online.guidance_scale)
            latents = self._sample(self.learner.bare_policy, states, online.batch_size)
            if not online.keep_scorers:
                self._place_scorers()
            with torch.autocast("cpu", enabled=False):
                parts.vae.decode(latents).sample.add(1).div(2).clamp(0, 1)
                for network in self.scorers:
                    network.score(online.batch_size)
            if not online.keep_scorers:
                self.meter.remove(_tensors(*self.scorers))

    def _place_scorers(self) -> None:
        self.meter.place(_tensors(*self.scorers))

    @contextmanager
    def _drawing(self, phase: str) -> Iterator[None]:
        """A phase that decodes images. With cached examples the encoders are on the device only for this."""
        learner, parts = self.learner, self.learner.parts
        encoders = _tensors(*parts.encoders)
        with self.meter, self.meter.phase(phase):
            self.meter.place(encoders)
            parts.vae.enable_slicing()
            with learner.accelerator.autocast():
                yield
            parts.vae.disable_slicing()
            if self.settings.cache.examples:
                self.meter.remove(encoders)

    def _draw(self, denoiser: nn.Module, images: int, guidance_scale: float) -> None:
        """Images, as far as their memory goes."""
        states = self._states(images, guidance_scale)
        self.learner.parts.vae.decode(self._sample(denoiser, states, images)).sample.add(1).div(2).clamp(0, 1)

    def _states(self, images: int, guidance_scale: float) -> Conditioning:
        """Encoded captions of a sampler's pass."""
        captions = self.model.captions(self._captions_at_once(images, guidance_scale))
        return self.learner.parts.encode_captions(captions)

    def save(self) -> None:
        """Tensors are copied to the CPU one by one: nothing new on the device."""
        with self.meter, self.meter.phase("save"):
            pass

    @torch.no_grad()
    def resume(self) -> None:
        """Weights and moments are read tensor by tensor into the existing ones, each as a temporary copy first."""
        with self.meter, self.meter.phase("resume"):
            for parameter in self.learner.parameters:
                parameter.copy_(torch.empty_like(parameter))

    def _make_gradients(self) -> None:
        for parameter in self.learner.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _batch(self) -> Batch:
        """A batch as the loader gives it."""
        settings, pairs, loss = self.settings, self.settings.train.micro_batch_pairs, self.settings.loss
        has_single_images = takes_single_images(settings, Split.TRAIN)
        captions, side = 2 * pairs if has_single_images else pairs, settings.data.resolution
        is_online = settings.feed.is_online and not settings.online.offline_share
        if settings.cache.examples or is_online:
            means = torch.zeros(2 * pairs, *self.latent_shape)
            factor = self.learner.parts.vae.config.scaling_factor
            images = LatentMoments(means, means.clone() if settings.data.sample_latents else None, factor)
        else:
            images = torch.zeros(2 * pairs, 3, side, side)
        captioned = self._conditioning(captions) if settings.cache.examples else self.model.captions(captions)
        single = rejected = None
        if has_single_images:
            single = SingleImages(range(2 * pairs), torch.zeros(2 * pairs, dtype=torch.bool))
        if loss.samples_rejected:
            rejected = torch.zeros(pairs, *self.latent_shape)
        return Batch(range(pairs), range(pairs), [], images, captioned, 0, [], single, rejected)

    def _fresh_batch(self) -> Batch:
        """The batch, new on the device."""
        captions = type(self.batch.captions)({name: value.clone() for name, value in self.batch.captions.items()})
        return tree_map_only(Tensor, torch.clone, self.batch._replace(captions=captions))

    def _captions_at_once(self, images: int, guidance_scale: float) -> int:
        """Captions that a sampler's pass takes: with guidance, unless the denoiser is told it, the empty one too."""
        arguments = self.learner.parts.family.prompt_arguments(self.encoded, self.encoded)
        has_empty = guidance_scale > 1 and any(name.startswith("negative") for name in arguments)
        return 2 * images if has_empty else images

    def _conditioning(self, captions: int) -> Conditioning:
        """Encoded captions as a cache gives them."""
        return Conditioning({name: torch.zeros(captions, *one.shape[1:]) for name, one in self.encoded.items()})

    def _sample(self, denoiser: nn.Module, conditioning: Conditioning, images: int) -> Tensor:
        """Latents of images after one sampler step. conditioning: of as many captions, or of twice as many."""
        family, captions = self.learner.parts.family, len(next(iter(conditioning.values())))
        latents = torch.zeros(images, *self.latent_shape)
        noisy = latents.repeat(captions // images, 1, 1, 1)
        conditioning = family.with_size(conditioning, self.settings.data.resolution)
        prediction = family.predict(denoiser, noisy, torch.zeros(captions), conditioning)
        if captions > images:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + 2.0 * (conditional - unconditional)  # any scale takes the same memory
        return latents - prediction


def keep_in_bf16(module: nn.Module) -> None:
    """Replace a module's frozen weights and its buffers by bf16 ones. Fake weights can't be moved, as `to` does it."""
    halved: dict[int, nn.Parameter] = {}  # by the id of the old one: modules may share weights
    for owner in module.modules():
        for name, weight in [*owner._parameters.items()]:
            if weight is not None:
                new = halved.setdefault(id(weight), nn.Parameter(weight.bfloat16(), requires_grad=False))
                setattr(owner, name, new)
        for name, buffer in [*owner._buffers.items()]:
            if buffer is not None and buffer.is_floating_point():
                setattr(owner, name, buffer.bfloat16())


class FullCache:
    """Stands for a reference cache in which all errors are recorded."""

    def __init__(self, pairs: int):
        self.pairs = pairs

    def get(self, positions: object, device: torch.device) -> Tensor:
        return torch.zeros(2, self.pairs)


class EightBitStates(torch.optim.Optimizer):
    """The state of bitsandbytes' 8-bit AdamW without its arithmetic: two moments, a byte per value, a scale per block.

    Parameters with fewer than 4,096 values have float32 moments.
    """

    SMALLEST, BLOCK = 4096, 256

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter not in self.state:
                size = parameter.numel()
                kinds = [(size, torch.float32)]
                if size >= self.SMALLEST:
                    kinds = [(size, torch.uint8), (-(-size // self.BLOCK), torch.float32)]
                self.state[parameter] = [torch.empty(n, dtype=dtype) for n, dtype in kinds for _moment in range(2)]


def build_optimizer(settings: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The training's optimizer; bitsandbytes need not be installed to count its states."""
    if settings.optim.name == "adamw8bit":
        return EightBitStates(parameters, {})
    return learner.build_optimizer(settings, parameters)


def _tensors(*modules: nn.Module | None) -> list[Tensor]:
    return [tensor for module in modules if module is not None for tensor in (*module.parameters(), *module.buffers())]
