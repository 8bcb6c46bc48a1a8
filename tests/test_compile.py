"""compute.compile: policy and reference through one graph, where training is; evaluation and samples as written."""

import re
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from conftest import forget_accelerators
from training_runs import assert_same_run, command, rows_of

import generate
from xdpo.batch import Conditioning, stack
from xdpo.compute import check_compiler
from xdpo.config import ComputeConfig, ModelConfig, load_config
from xdpo.families import PipelineParts, load_parts
from xdpo.families.stable_diffusion import STABLE_DIFFUSION
from xdpo.models import make_policy, make_reference
from xdpo.noisy import NoisyBatch
from xdpo.reference import AdapterOff, Frozen, Recorded
from xdpo.step import measure, preference_loss

LOSS = load_config("configs/xdpo_sd15.yaml").loss
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on a CPU compiles with g++")


@pytest.fixture
def compiling(monkeypatch):
    """compiling("aot_eager"): have torch.compile do so; returns the list of the graphs that it meets from here on."""
    from torch._dynamo.backends.registry import lookup_backend

    def choose(name):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return lookup_backend(name)(graph, inputs)

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        monkeypatch.setattr("xdpo.compute.check_compiler", lambda setting: None)
        return graphs

    torch.compiler.reset()
    yield choose
    torch.compiler.reset()


def build_unet():
    """One block down, a residual network and a transformer, and one up."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return unet.eval().requires_grad_(False)


def unet_on_a_pair():
    """The parts of a pipeline that training compiled needs, and the inputs of one pair."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 8, 8), (2, 8, 16), (2, 4, 8, 8)
    latents, states, targets = (torch.randn(shape, generator=generator) for shape in shapes)
    times, weights, conditioning = torch.tensor([10, 10]), torch.ones(2), Conditioning(text=states)
    parts = PipelineParts(STABLE_DIFFUSION, {"unet": build_unet()}, {}, None)
    return parts, NoisyBatch(STABLE_DIFFUSION, [0], latents, times, conditioning, targets, weights, weights)


def transformer_on_a_pair(pipeline):
    """The same of a flow's pipeline."""
    generator, parts = torch.Generator().manual_seed(0), load_parts(ModelConfig(pipeline=pipeline))
    latents, targets = (torch.randn(2, *parts.latent_shape(32), generator=generator) for _ in range(2))
    conditioning = parts.encode_captions(stack([parts.tokenize(caption)[0] for caption in ("a cat", "a cat")]))
    return parts, NoisyBatch(
        parts.family, [0], latents, torch.full((2,), 500.0), conditioning, targets, torch.ones(2), torch.ones(2)
    )


class Training:
    """Policy and reference as a training in bf16 has them, on one pair."""

    def __init__(self, trainable, pair=None, **compute):
        model, compute = ModelConfig(trainable=trainable, lora_rank=4), ComputeConfig(compile=True, **compute)
        parts, self.noisy = pair or unet_on_a_pair()
        network = make_reference(parts, model, compute)
        cache = AutocastKwargs(cache_enabled=False)  # as compute.build_accelerator
        forget_accelerators()
        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16", kwargs_handlers=[cache])
        self.policy = self.accelerator.prepare_model(make_policy(parts, model, compute))
        self.reference = AdapterOff(self.policy)
        if network is not None:
            self.reference = Frozen(self.accelerator.prepare_model(network, evaluation_mode=True))

    def measure(self):
        """The errors of one micro-step, or of an evaluation without gradients: policy's, reference's."""
        with self.accelerator.autocast():
            errors = measure(self.policy, self.reference, self.noisy, LOSS).errors
        if torch.is_grad_enabled():
            preference_loss(errors, LOSS).loss.mean().backward()
        return [[error.item() for error in half] for half in (errors[:2], errors[2:])]

    def step(self):
        """Move the policy."""
        with torch.no_grad():
            for parameter in self.policy.parameters():
                if parameter.requires_grad:
                    parameter.sub_(0.01 * parameter.grad.sign())


def check_one_arithmetic(trainable, checkpointing, graphs, pair=None):
    """First margin 0 to the bit, in one graph; later the reference still says what it said."""
    training = Training(trainable, pair, gradient_checkpointing=checkpointing)
    with torch.no_grad():
        training.measure()
    assert not graphs, "evaluation runs as written"
    policy, reference = training.measure()
    assert policy == reference
    training.step()
    moved, still = training.measure()
    assert still == reference and moved != policy
    with torch.no_grad():
        evaluated, _ = training.measure()
    assert evaluated == pytest.approx(moved, rel=0.02)  # bf16's rounding is 0.004
    assert len(graphs) == 1, "policy, reference and adapter share a graph"
    if (network := training.reference.network) is not None:
        assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("trainable", "checkpointing"),
    [
        ("lora", True),
        pytest.param("full", False, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
        pytest.param("lora", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_policy_and_reference_share_a_graph(trainable, checkpointing, compiling):
    check_one_arithmetic(trainable, checkpointing, compiling("aot_eager"))


@pytest.mark.parametrize(
    ("flow", "trainable"),
    [
        pytest.param("sd3", "lora", marks=pytest.mark.slow),
        pytest.param("sd3", "full", marks=pytest.mark.slow),
        pytest.param("flux", "lora", marks=pytest.mark.slow),
        pytest.param("flux", "full", marks=pytest.mark.slow),
    ],
)
def test_the_transformers_of_flows_are_one_graph_too(request, flow, trainable, compiling):
    pair = transformer_on_a_pair(request.getfixturevalue(flow))
    check_one_arithmetic(trainable, True, compiling("aot_eager"), pair)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("trainable", "checkpointing"), [("full", True), ("lora", False)])
def test_the_first_margin_is_0_to_the_bit_where_the_compiler_fuses(trainable, checkpointing, compiling):
    """inductor rounds a forward that saves activations differently from one that doesn't."""
    check_one_arithmetic(trainable, checkpointing, compiling("inductor"))


@pytest.mark.parametrize(("has_gpu", "variable", "name"), [(False, "CXX", "g++"), (True, "CC", "gcc or clang")])
def test_compiling_without_a_compiler_is_refused_by_its_name(monkeypatch, tmp_path, has_gpu, variable, name):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match=rf"compute\.compile needs a C\S* compiler, and {re.escape(name)} is not found"
    ):
        check_compiler("compute.compile")
    monkeypatch.setenv(variable, sys.executable)
    check_compiler("compute.compile")
    monkeypatch.setenv(variable, "/nowhere/cc")
    with pytest.raises(ValueError, match=f"/nowhere/cc is not found; install it, name another one .* {variable}"):
        check_compiler("--compile")


def test_training_and_generation_ask_for_a_compiler_before_anything_is_opened(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    status, folder = run("run", "compute.compile=true", "data.path=nowhere")
    assert status == 1 and "error: compute.compile needs a C" in capsys.readouterr().err
    images = ["--model", "nowhere", "--prompts", "tinyprompts", "--output", str(tmp_path / "images"), "--compile"]
    assert generate.main(images) == 1
    assert "error: --compile needs a C" in capsys.readouterr().err
    assert not folder.exists() and not (tmp_path / "images").exists()


def test_the_adapter_is_back_whatever_happens_to_the_reference():
    training = Training("lora")
    outputs = {name: weight for name, weight in training.policy.named_parameters() if ".lora_B." in name}
    with torch.no_grad():
        torch._foreach_add_(list(outputs.values()), 1.0)
    with pytest.raises(RuntimeError, match="lost"), training.reference.running() as module:
        assert module is training.policy and all(not weight.any() for weight in outputs.values())
        raise RuntimeError("lost")
    assert outputs and all((weight == 1).all() for weight in outputs.values())


def test_a_policy_within_ddp_has_the_whole_graph_that_its_reference_has(compiling, monkeypatch, tmp_path):
    """Not one split at DDP's buckets, not even where the policy comes first, as with a reference from a cache."""
    graphs, training = compiling("aot_eager"), Training("full")
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 2**13)  # several for so small a network
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(training.policy, bucket_cap_mb=2**-6)
        with training.accelerator.autocast():
            known = SimpleNamespace(get=lambda positions, device: torch.zeros(2, 1))
            measure(wrapped, Recorded(training.reference, known, torch.device("cpu")), training.noisy, LOSS)
            errors = measure(wrapped, training.reference, training.noisy, LOSS).errors
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(torch.cat(errors[:2]), torch.cat(errors[2:])) and len(graphs) == 1


@pytest.mark.slow
def test_a_run_compiles_one_graph_however_often_it_evaluates_and_samples(
    run, compiling, small_pipeline, small_pairs, tmp_path
):
    """With the reference's errors computed ahead, through the same graph again, it is the same run."""
    from runpy import run_path

    graphs = compiling("eager")
    keys = ("compute.compile=true", "compute.precision=bf16", "model.trainable=lora", "model.lora_rank=4")
    keys += ("eval.every=2", "eval.pairs=3", "eval.draws=1", "samples.every=3", "optim.learning_rate=1e-2")
    status, folder = run("plain", *keys)
    margins = [row["margin"] for row in rows_of(folder) if "margin" in row]
    assert status == 0 and len(graphs) == 1
    assert margins[0] == 0 and all(margins[1:]) and len(list((folder / "samples").iterdir())) == 3

    keys += (f"cache.reference={tmp_path / 'reference'}",)
    ahead = run_path("scripts/cache_reference.py")["main"]
    assert ahead(command(small_pipeline, small_pairs, tmp_path / "x", *keys)) == 0
    status, cached = run("cached", *keys)
    assert status == 0
    assert_same_run(folder, cached)
    assert len(graphs) == 1
