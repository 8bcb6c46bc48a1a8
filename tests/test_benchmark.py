"""The benchmark: counted FLOPs against published ones, modes that do the same work, tables and records of them."""

import json
import os
import shutil
from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmarks import counting, data, flops, loading, memory, reports, steps
from benchmarks.folders import working_folder
from benchmarks.modes import BASE_CONFIG, MODES, call, set_up
from benchmarks.pairs import WRITERS, make_pairs
from benchmarks.pipelines import (
    DOWNSCALING,
    LATENT_CHANNELS,
    TOKENS,
    build_networks,
    thin_shapes,
    without_contents,
)
from benchmarks.results import Criterion, Spread, ratios, time_in_turn
from benchmarks.true_models import COUNTABLE, TRUE_MODELS, Model, is_counted, of_shapes, scorer_network
from test_sdxl import build_xl_pipeline
from training_runs import BITSANDBYTES

from xdpo import step
from xdpo.batch import Batch, Conditioning, LatentMoments, Tokens
from xdpo.compute import build_accelerator
from xdpo.config import load_config
from xdpo.data import load_pairs
from xdpo.families import load_parts
from xdpo.learner import build_reference
from xdpo.models import make_policy, make_reference
from xdpo.noise import DiffusionProcess
from xdpo.noisy import NoisyBatchMaker
from xdpo.reference import Recorded
from xdpo.scorers.metrics import ARCHITECTURES, METRICS

RESOLUTION = 16


# --- results -------------------------------------------------------------------------------------------


def test_a_spread_is_the_median_and_both_ends():
    assert str(Spread.of([3.0, 1.0, 2.0, 10.0])) == "2.5 (1–10)"


def test_ratios_are_taken_round_by_round():
    assert ratios([2.0, 20.0], [1.0, 10.0]) == Spread(2.0, 2.0, 2.0)


def test_jobs_take_turns_and_the_first_round_is_not_counted():
    calls = []
    seconds = time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)

    assert calls == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_criterion_that_fails_cannot_be_overlooked():
    assert str(Criterion("at most 1", 2.0, holds=False)) == "DOES NOT HOLD: at most 1; measured 2.000"


def test_the_working_folder_and_its_settings_are_gone_afterwards():
    before = os.environ["HF_DATASETS_CACHE"]
    with working_folder() as folder:
        assert os.environ["HF_DATASETS_CACHE"].startswith(str(folder))
    assert os.environ["HF_DATASETS_CACHE"] == before and not folder.exists()


# --- flops ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flops_record(tmp_path_factory):
    path = tmp_path_factory.mktemp("flops") / "flops.json"
    assert benchmark.main(["flops", "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_stable_diffusion_costs_what_is_known_of_it(flops_record):
    assert flops_record["measurements"]["parts"] == pytest.approx(
        {
            "denoiser_forward": 0.803,
            "full_forward_backward": 2.407,
            "full_forward_backward_checkpointed": 3.002,
            "lora_forward_backward": 1.765,
            "lora_forward_backward_checkpointed": 2.371,
            "lora_forward_adapter_off": 0.803,
            "autoencoder": 1.117,
            "text_encoder": 0.013,
        },
        abs=5e-4,
    )


@pytest.mark.slow
def test_caches_save_what_they_should(flops_record):
    costs = {
        (mode["trained"], mode["cached"]): mode
        for mode in flops_record["measurements"]["modes"]
        if not mode["gradient_checkpointing"]
    }
    assert costs["full", "nothing"]["total"] == pytest.approx(2 * 2.407 + 2 * 0.803 + 2 * 1.117 + 0.013, abs=2e-3)
    assert costs["full", "examples and reference"]["ratio"] == pytest.approx(0.555, abs=1e-3)
    assert costs["lora", "examples and reference"]["ratio"] == pytest.approx(0.407, abs=1e-3)
    assert [criterion["holds"] for criterion in flops_record["criteria"]] == [True, True]


@pytest.mark.parametrize(
    ("model", "billions"),
    [("sd15", 0.860), ("sdxl", 2.567), ("sd35_medium", 2.24), ("sd35_large", 8.06), ("flux", 11.9)],
)
def test_a_true_model_has_the_weights_that_are_published(model, billions):
    with without_contents():
        denoiser = TRUE_MODELS[model].build().denoiser
    assert sum(weight.numel() for weight in denoiser.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.slow
def test_a_record_says_how_to_repeat_it(flops_record):
    assert flops_record["benchmark"] == "flops" and flops_record["settings"] == {
        "model": "sd15",
        "resolution": None,
        "lora_rank": 64,
    }
    assert {"processor", "cores", "threads", "memory_gb"} <= set(flops_record["machine"])
    assert flops_record["versions"]["torch"] == torch.__version__
    assert flops_record["measurements"]["cache_bytes"] == {"image": 2 * 4 * 64 * 64, "caption": 2 * 77 * 768}
    assert flops_record["table"].count("\n| ") == 1 + 2 * 2 * 3  # the rule below the head, then the modes


@pytest.fixture(scope="module")
def thin_parts():
    caption = TRUE_MODELS["sd15"].captions()
    return flops.count_parts(build_networks(thin_shapes()), caption, resolution=64, lora_rank=4)


@pytest.mark.parametrize("caches", flops.CACHES)
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_the_training_step_itself_costs_the_sum_of_its_parts(thin_parts, trainable, caches):
    resolution = 64
    networks = build_networks(thin_shapes())
    settings = load_config(
        BASE_CONFIG, [f"model.trainable={trainable}", "model.lora_rank=4", f"data.resolution={resolution}"]
    )
    network = make_reference(networks, settings.model, settings.compute)
    policy = make_policy(networks, settings.model, settings.compute)
    reference = build_reference(settings, network, policy)
    process = DiffusionProcess(torch.linspace(0.99, 0.01, 1000), "epsilon")
    make_noisy = NoisyBatchMaker(networks, process, settings, torch.device("cpu"))
    has_examples, has_reference = flops.CACHES[caches]
    if has_reference:
        reference = Recorded(reference, counting.FullCache(1), torch.device("cpu"))
    images, captions = torch.zeros(2, 3, resolution, resolution), Tokens(input_ids=torch.ones(1, TOKENS).long())
    if has_examples:
        moments = torch.zeros(2, LATENT_CHANNELS, resolution // DOWNSCALING, resolution // DOWNSCALING)
        images, captions = LatentMoments(moments, moments, 0.18215), Conditioning(text=torch.zeros(1, TOKENS, 768))
    batch = Batch(torch.tensor([0]), torch.tensor([0]), ["0"], images, captions, 0, [])

    def train_on_a_pair():
        measured = step.measure(policy, reference, make_noisy(batch, 0), settings.loss)
        step.preference_loss(measured.errors, settings.loss).loss.sum().backward()

    expected = flops.pair_costs(thin_parts, trainable, caches, gradient_checkpointing=False)
    assert flops.count_tflop(train_on_a_pair) == pytest.approx(expected.total, rel=1e-9)


# --- step and memory -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(small_pipeline):
    with working_folder() as working:
        built = set_up(
            working, small_pipeline, resolution=RESOLUTION, num_pairs=4, extra=["cache.dtype=fp32", "model.lora_rank=4"]
        )
        built.fill_caches(micro_batch=1, num_pairs=8)
        yield built


def settings_of(bench, name, micro_batch=1):
    return load_config(BASE_CONFIG, bench.overrides(MODES[name], micro_batch=micro_batch, total_batch=2, max_steps=4))


@pytest.mark.parametrize(
    ("name", "cached"),
    [("full", "full-examples"), ("full", "full-cached"), ("lora", "lora-examples"), ("lora", "lora-cached")],
)
@pytest.mark.slow
def test_the_modes_that_are_compared_train_alike(bench, name, cached):
    gradients = []
    for mode in (name, cached):
        settings = settings_of(bench, mode)
        accelerator = build_accelerator(settings)
        torch.manual_seed(0)
        networks = steps.build_networks(settings_of(bench, "full"), accelerator, {"full", MODES[mode].trainable})
        steps.training_job(settings, accelerator, networks)()
        policy = networks.policies[MODES[mode].trainable]
        gradients.append([parameter.grad for parameter in policy.parameters() if parameter.requires_grad])

    assert sum(gradient.abs().sum() for gradient in gradients[0]) > 0
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


@pytest.mark.slow
def test_every_mode_and_every_bare_part_is_timed_at_every_micro_batch(bench):
    options = SimpleNamespace(
        modes=["full", "full-cached"], micro_batches=[1, 2], pairs=2, rounds=1, pipeline="small", resolution=RESOLUTION
    )
    jobs = steps.build_jobs(bench, options.modes, options.micro_batches, options.pairs, rounds=2)
    outcome = steps.summarise(options, time_in_turn(jobs, rounds=1), peaks={("full", 1): 1.5})

    seconds = outcome.measurements["seconds_per_round"]
    assert set(seconds) == {"full", "full-cached", *steps.BARE_PARTS}
    assert all(len(seconds[name][size]) == 1 for name in seconds for size in (1, 2))
    assert len(outcome.table.rows) == 12 and outcome.table.rows[0][-1].text == "1.50"
    assert [criterion.claim.rpartition(" (")[2] for criterion in outcome.criteria] == [
        *["micro-batch 1)"] * 3,
        *["micro-batch 2)"] * 3,
    ]


@pytest.mark.slow
def test_a_gap_in_the_reference_cache_is_refused_and_not_timed(bench):
    settings = settings_of(bench, "full-cached")
    longer = settings.model_copy(update={"train": settings.train.model_copy(update={"max_steps": 100})})
    accelerator = build_accelerator(settings)
    networks = steps.build_networks(settings, accelerator, {"full"})

    with pytest.raises(ValueError, match="reference cache lacks pairs"):
        steps.training_job(longer, accelerator, networks)


@pytest.mark.slow
def test_peak_memory_is_that_of_the_training_program(bench):
    peak = bench.train_peak_memory_gb(MODES["lora-cached"], micro_batch=1)

    assert 0.1 < peak < 3
    assert not (bench.working / "run").exists()


def test_a_program_that_fails_is_named_with_what_it_said():
    with pytest.raises(ValueError, match=r"train_xdpo\.py ended with status 1:\n(.*\n)*.*loss\.bta: unknown key"):
        call("train_xdpo.py", "--config", str(BASE_CONFIG), "loss.bta=1")


def test_pairs_that_the_micro_batch_does_not_divide_are_refused_before_any_work(capsys):
    assert benchmark.main(["step", "--pairs", "3", "--micro-batches", "1", "2"]) == 1
    assert "--pairs 3 is no multiple of the micro-batch 2" in capsys.readouterr().err


# --- memory, counted -----------------------------------------------------------------------------------

CONFIGS = BASE_CONFIG.parent
SMALL = {
    "unet": thin_shapes()["unet"] | {"cross_attention_dim": 16},
    "vae": thin_shapes()["vae"],
    "text_encoder": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def count_small(*overrides, config="xdpo_sd15.yaml", processes=1, fake=False):
    settings = load_config(CONFIGS / config, ["data.resolution=16", "train.total_batch_pairs=4", *overrides])
    return counting.count(settings, of_shapes("small", SMALL), processes, fake=fake)


@pytest.fixture(scope="module")
def weights():
    """The small networks' weights as lists of tensors: UNet, and both encoders."""
    with torch.device("meta"):
        parts = build_networks(SMALL)
    encoders = [tensor for module in parts.encoders for tensor in (*module.parameters(), *module.buffers())]
    return list(parts.denoiser.parameters()), encoders


def allocated(tensors):
    """Bytes of tensors, each rounded up as CUDA's allocator does."""
    return sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)


def test_a_meter_adds_up_what_is_alive():
    meter, placed = counting.Meter(), torch.zeros(1000)  # 4,000 bytes take 4,096
    with meter, meter.phase("work"):
        meter.place([placed])
        held = placed + 1
        del held
        kept = placed.view(10, 100) * 2
        kept[0].add_(1)  # a view and in place: nothing new
    assert meter.phases["work"] == counting.Phase(2 * 4096, 2 * 4096, "aten.add.Tensor")
    with meter, meter.phase("less"):
        del kept
        meter.remove([placed])
    assert meter.phases["less"] == counting.Phase(0, 2 * 4096, "at rest")


@pytest.mark.parametrize("trainable", ["full", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_tensors_without_contents_count_as_those_with(trainable):
    overrides = [f"model.trainable={trainable}", "model.lora_rank=4"]
    assert count_small(*overrides, fake=True) == count_small(*overrides)


@pytest.mark.slow
def test_frozen_weights_in_bf16_are_counted_as_the_training_holds_them(flux):
    overrides = ["data.resolution=32", "model.trainable=lora", "model.lora_rank=4"]
    plain = load_config(BASE_CONFIG, [f"model.pipeline={flux}", *overrides])
    halved = load_config(BASE_CONFIG, [f"model.pipeline={flux}", *overrides, "model.frozen_precision=bf16"])
    parts = load_parts(halved.model)
    policy = make_policy(parts, halved.model, halved.compute)
    held = [tensor for module in (policy, *parts.encoders) for tensor in (*module.parameters(), *module.buffers())]
    tokens = {name: len(ids) for name, ids in parts.tokenize("a cat")[0].items()}
    model = Model("flux", 32, lambda: load_parts(plain.model), tokens)
    counted = counting.count(halved, model, fake=False)
    assert counted["start"].at_rest == allocated(held)
    assert counted["backward"].peak < counting.count(plain, model, fake=False)["backward"].peak
    small = [*overrides[1:], "model.frozen_precision=bf16"]
    assert count_small(*small, fake=True) == count_small(*small)


def test_what_lies_still_is_what_it_is_on_paper(weights):
    unet, encoders = map(allocated, weights)
    alone, of_two = count_small(), count_small(processes=2)
    counters = 512 * len(weights[0])  # of AdamW's steps, one beside each weight
    assert alone["start"].at_rest == 2 * unet + encoders
    assert alone["save"].at_rest == 4 * unet + encoders + counters  # two moments, no gradients
    assert of_two["save"].at_rest == 5 * unet + encoders + counters  # the gradients are DDP's buckets
    assert of_two["resume"].peak - of_two["resume"].at_rest == max(allocated([weight]) for weight in weights[0])


@pytest.mark.slow
def test_what_the_config_adds_or_saves_is_counted(weights):
    unet, encoders = map(allocated, weights)
    plain = count_small()["save"].at_rest
    assert count_small("model.ema_decay=0.99")["save"].at_rest == plain + unet
    assert count_small("optim.name=adamw8bit")["save"].at_rest < plain
    assert count_small("optim.name=adafactor")["save"].at_rest < plain
    moving = ["loss.name=diffusion_nft", "model.reference_decay=0.9", "samples.every=0", "eval.every=0"]
    pulled = count_small(*moving, "loss.kl_weight=0.1")["save"].at_rest
    assert pulled - count_small(*moving)["save"].at_rest == unet  # the base model, which the reference leaves
    cached = count_small("cache.examples=cache", "cache.reference=cache")
    assert plain - cached["save"].at_rest == unet + encoders
    assert cached["samples"].peak - cached["save"].at_rest > encoders  # they visit the device


def test_the_scorers_of_online_training_are_counted_whether_they_stay_or_come_and_go(monkeypatch):
    import metric_fixtures

    for name in ("blip_vit_l_16", "clip_vit_l_14", "clip_vit_h_14"):  # small ones
        sizes = {
            part: ARCHITECTURES[name].get(part, {}) | small
            for part, small in metric_fixtures.SIZES[name].items()
            if isinstance(small, dict)
        }
        monkeypatch.setitem(ARCHITECTURES, name, ARCHITECTURES[name] | sizes)
    rewards, held_out = ["image_reward", "pickscore"], ["aesthetic", "mine.py:Mine"]
    online = ["feed.name=online_pairs", "samples.every=0", "eval.every=0", f"online.rewards=[{','.join(rewards)}]"]
    online += [f"online.held_out_rewards=[{','.join(held_out)}]"]
    kept, freed = (count_small(*online, f"online.keep_scorers={keep}") for keep in ("true", "false"))
    networks = [scorer_network(name) for name in (*rewards, held_out[0])]
    sizes = allocated([tensor for one in networks for tensor in (*one.parameters(), *one.buffers())])
    for name, phase in kept.items():
        assert phase.at_rest - freed[name].at_rest == sizes
    assert freed["online"].peak > freed["online"].at_rest + sizes
    assert kept["backward"].peak - freed["backward"].peak == sizes
    settings = load_config(BASE_CONFIG, online)
    assert counting.uncounted_scorers(settings) == ["mine.py:Mine"]
    one_fewer = load_config(BASE_CONFIG, [*online[:-1], "online.held_out_rewards=[aesthetic]"])
    assert counting.shape_of(settings, 1) != counting.shape_of(one_fewer, 1)


def test_a_scorer_is_counted_at_its_true_shape():
    with torch.device("meta"):
        sizes = {name: allocated(scorer_network(name).parameters()) / 1e9 for name in METRICS if is_counted(name)}
    assert {name: round(size, 2) for name, size in sizes.items()} == {
        **dict.fromkeys(("pickscore", "hpsv2", "hpsv2.1", "clip", "ict"), 3.94),
        **{"aesthetic": 1.22, "image_reward": 1.78, "hp": 2.53},
    }


@pytest.mark.parametrize("family", ["sd3", "flux", "xl"])
def test_the_memory_of_other_families_is_counted_in_every_phase(request, tiny_tokenizer, tmp_path, family):
    folder = build_xl_pipeline(tmp_path / "xl", tiny_tokenizer) if family == "xl" else request.getfixturevalue(family)
    overrides = [f"model.pipeline={folder}", "data.resolution=32", "train.micro_batch_pairs=2"]
    settings = load_config(BASE_CONFIG, overrides)
    parts = load_parts(settings.model)
    tokens = {name: len(ids) for name, ids in parts.tokenize("a cat")[0].items()}
    phases = counting.count(settings, Model(family, 32, lambda: load_parts(settings.model), tokens), fake=False)

    policy, encoders = (
        allocated([tensor for module in modules for tensor in (*module.parameters(), *module.buffers())])
        for modules in ((parts.denoiser,), parts.encoders)
    )
    assert phases["start"].at_rest == 2 * policy + encoders  # the policy and its reference
    assert phases["backward"].peak > phases["save"].at_rest > 3 * policy + encoders  # and the moments
    assert phases["samples"].peak > phases["save"].at_rest


@pytest.mark.parametrize("name", ["diffusion_kto", "seppo", "sft", "diffusion_sdpo"])
def test_every_kind_of_objective_is_counted(name):
    phases = count_small("samples.every=0", "eval.every=0", config=f"baselines/{name}.yaml")
    expected = ["start", *memory.STEP, *(["self-play"] if name == "seppo" else []), "save", "resume"]
    assert list(phases) == expected


def test_autocast_is_cudas_only_while_counting():
    values = torch.ones(2, 4, 4, 4)
    with counting.without_a_device(fake=False), torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.group_norm(values.bfloat16(), 2).dtype == torch.float32
        assert values.bfloat16().softmax(-1).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.group_norm(values.bfloat16(), 2).dtype == torch.bfloat16


def test_eight_bit_moments_are_of_the_size_of_bitsandbytes_own(monkeypatch):
    monkeypatch.syspath_prepend(BITSANDBYTES)
    optimizers = pytest.importorskip("bitsandbytes.optim")
    for size in (100, 4096, 10_000):
        parameter = torch.nn.Parameter(torch.ones(size))
        parameter.grad = torch.ones(size)
        theirs, ours = optimizers.AdamW8bit([parameter]), counting.EightBitStates([parameter], {})
        theirs.step()
        ours.step()
        moments = [value for key, value in theirs.state[parameter].items() if key.startswith(("state", "absmax"))]
        assert sorted(t.nbytes for t in ours.state[parameter]) == sorted(t.nbytes for t in moments)


def test_configs_that_take_the_same_memory_share_a_row(tmp_path, capsys, monkeypatch):
    configs = [str(CONFIGS / name) for name in ("xdpo_sd15.yaml", "diffusion_dpo_sd15.yaml")]
    small = of_shapes("small", SMALL)
    monkeypatch.setitem(COUNTABLE, "small", small)
    here = lambda settings, pipeline, processes: counting.count(settings, small, processes, fake=False)  # noqa: E731
    monkeypatch.setattr(counting, "count_apart", here)  # the same, sooner
    arguments = ["memory", "--pipeline", "small", "--count", *configs, "--grid", "train.micro_batch_pairs=1,2"]
    path = tmp_path / "memory.json"
    settings = ["--set", "data.resolution=16", "samples.every=0", "eval.every=0", "--json", str(path)]
    assert benchmark.main([*arguments, *settings]) == 0

    record = json.loads(path.read_text(encoding="utf-8"))
    first, second = record["measurements"]["counted"]
    assert first["configs"] == "xdpo_sd15 train.micro_batch_pairs=1, diffusion_dpo_sd15 train.micro_batch_pairs=1"
    assert second["bytes"]["forward"]["peak"] > first["bytes"]["forward"]["peak"]
    assert [criterion["holds"] for criterion in record["criteria"]] == [True, True]
    assert "at most 20.5 GB at any moment" in capsys.readouterr().out


def test_a_single_config_is_shown_phase_by_phase(monkeypatch, capsys):
    phases = {name: counting.Phase(10**9, 2 * 10**9, "aten.add") for name in ("start", "encoding", "resume")}
    phases["backward"] = counting.Phase(10**9, 21 * 10**9, "aten.mul")
    monkeypatch.setattr(counting, "count_apart", lambda settings, pipeline, processes: phases)
    assert benchmark.main(["memory", "--count", str(CONFIGS / "xdpo_sd15.yaml"), "--processes", "2"]) == 0

    said = capsys.readouterr().out
    assert "any moment" in said and "21.00   aten.mul" in said
    assert "DOES NOT HOLD: xdpo_sd15 on each of 2 GPUs takes at most 20.5 GB" in said


def test_the_tokens_that_t5_reads_are_counted():
    for name, part, tokens in (("flux", "tokenizer_2", 512), ("sd35_medium", "tokenizer_3", 256)):
        model = TRUE_MODELS[name]
        lengths = [len(model.with_t5_tokens(count).captions()[part][0]) for count in (None, 100)]
        assert lengths == [tokens, 100]
    assert TRUE_MODELS["sd15"].with_t5_tokens(None) == TRUE_MODELS["sd15"]


def test_only_known_shapes_are_counted(capsys):
    arguments = ["memory", "--pipeline", "owner/name", "--count", str(CONFIGS / "base.yaml")]
    assert benchmark.main(arguments) == 1
    error = capsys.readouterr().err
    assert "--count knows the shapes of sd15, " in error and ", flux and not of 'owner/name'" in error


@pytest.mark.slow
def test_what_is_counted_is_what_the_training_takes(tmp_path):
    arguments = ["memory", "--pipeline", "quarter", "--modes", "full", "--resolution", "128"]  # in half the time of 256
    assert benchmark.main([*arguments, "--json", str(tmp_path / "memory.json")]) == 0
    (criterion,) = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))["criteria"]
    assert criterion["holds"], criterion


def _crash(*_):
    os.abort()


def test_a_count_that_crashes_is_an_error_and_no_number(monkeypatch):
    monkeypatch.setattr(counting, "count", _crash)
    with pytest.raises(ValueError, match="ended abnormally"):
        counting.count_apart(load_config(BASE_CONFIG, []), "thin")


@pytest.mark.slow
def test_the_papers_run_leaves_room_on_24_gb(tmp_path):
    path = tmp_path / "memory.json"
    config = str(CONFIGS / "xdpo_sd15.yaml")
    assert benchmark.main(["memory", "--count", config, "--processes", "2", "--json", str(path)]) == 0
    (criterion,) = json.loads(path.read_text(encoding="utf-8"))["criteria"]
    assert criterion["holds"] and criterion["value"] == pytest.approx(18.96, abs=0.05)


# --- loader, sample, score -----------------------------------------------------------------------------


def test_every_layout_holds_the_same_pairs(tmp_path):
    pairs = make_pairs(3, 16)
    tables = {}
    for source, write in WRITERS.items():
        overrides = [f"data.source={source}", f"data.path={write(tmp_path / source, pairs)}"]
        tables[source] = load_pairs(load_config(BASE_CONFIG, overrides).data)

    for table in tables.values():
        assert table.columns("caption")["caption"] == [pair.caption for pair in pairs]
        assert table.chosen_side.tolist() == [0, 0, 0]


@pytest.mark.slow
def test_the_loader_is_timed_on_every_source_and_the_cache(small_pipeline, tmp_path, capsys):
    arguments = ["--pairs", "4", "--micro-batch", "2", "--image-side", "24", "--resolution", "16", "--rounds", "1"]
    status = benchmark.main(
        ["loader", "--pipeline", small_pipeline, *arguments, "--json", str(tmp_path / "loader.json")]
    )

    assert status == 0
    measured = json.loads((tmp_path / "loader.json").read_text(encoding="utf-8"))["measurements"]
    assert list(measured) == [*WRITERS, loading.CACHE]
    assert measured[loading.CACHE]["0"]["pairs_per_round"] == 4 * loading.CACHE_EPOCHS
    assert "one process reads at least 2000 pairs/s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_large_source_is_measured_on_its_way_to_batches(small_pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "pipeline_folder", lambda name, working: small_pipeline)
    monkeypatch.setattr(data, "apart", data.measure)  # in this process
    arguments = ["--rows", "60", "--files", "2", "--workers", "1", "--json", str(tmp_path / "data.json")]
    assert benchmark.main(["data", *arguments]) == 0

    measured = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))["measurements"]
    assert len(measured) == 8 and all(each["seconds"] > 0 for each in measured.values())
    assert measured["first batch from the cache"]["worker"] > 0 == measured[data.OPENING]["worker"]
    assert "opening a cache takes at most 3 s" in capsys.readouterr().out


def test_generate_and_the_plain_loop_make_the_same_images_and_are_both_timed(small_pipeline, tmp_path):
    arguments = ["--images", "4", "--batch-size", "2", "--image-size", "16", "--steps", "2", "--rounds", "1"]
    status = benchmark.main(
        ["sample", "--pipeline", small_pipeline, *arguments, "--json", str(tmp_path / "sample.json")]
    )

    assert status == 0
    measured = json.loads((tmp_path / "sample.json").read_text(encoding="utf-8"))["measurements"]
    assert set(measured["seconds_per_round"]) == {"generate.py", "plain loop"}


@pytest.mark.slow
def test_the_scorer_is_timed_against_the_bare_work(tmp_path):
    assert benchmark.main(["score", "--images", "2", "--rounds", "1", "--json", str(tmp_path / "score.json")]) == 0

    measured = json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))["measurements"]
    assert set(measured["seconds_per_round"]) == {"scorer", "bare work"}


@pytest.mark.slow
def test_the_reports_size_and_time_to_open_are_measured(tmp_path):
    if not any(map(shutil.which, reports.BROWSERS)):
        pytest.skip("needs chromium or chrome")
    options = ["--models", "2", "--prompts", "20", "--metrics", "1", "--rounds", "1", "--embed-mb", "0.1"]
    assert benchmark.main(["report", *options, "--json", str(tmp_path / "report.json")]) == 0
    measured = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["measurements"]
    assert 0.1 < measured["megabytes"] < 10
    assert measured["loaded_seconds"][0] > 0
