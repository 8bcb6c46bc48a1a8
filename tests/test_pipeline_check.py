"""What is said of pipelines that can't be used, before any weight is read; and the odd ones that can."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from xdpo.config import ModelConfig
from xdpo.families import check_model, check_pipeline_folder, checks, load_parts, part_checksum
from xdpo.models import read_model_spec, resolve_model

ROOT = Path(__file__).resolve().parent.parent
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def pipeline(small_pipeline, tmp_path):
    """A copy of the small pipeline to spoil."""
    return Path(shutil.copytree(small_pipeline, tmp_path / "mine"))


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rewrite(path, change):
    """Give every tensor of a file another name, or none where `change` returns None."""
    tensors = {change(name): tensor for name, tensor in load_file(path).items() if change(name)}
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(pipeline):
    with pytest.raises(ValueError) as refused:
        check_pipeline_folder(str(pipeline))
    return str(refused.value)


CONFIGS = {
    "Stable Diffusion XL": (
        "model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "it lacks tokenizer_2, text_encoder_2",
    ),
    "Stable Diffusion 3": (
        "model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "it lacks tokenizer_2, .* transformer",
    ),
    "FLUX.1": ("model_index.json", {"_class_name": "FluxPipeline"}, "it lacks tokenizer_2, .* transformer"),
    "FLUX.2": ("model_index.json", {"_class_name": "Flux2Pipeline"}, r"it is FLUX\.2"),
    "a family without a name here": (
        "model_index.json", {"_class_name": "NewPipeline", "transformer": ["diffusers", "NewTransformer"]},
        "says NewPipeline, which has transformer: another family",
    ),
    "a text encoder that is no CLIP": (
        "model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "text encoder T5EncoderModel",
    ),
    "an XL UNet": ("unet/config.json", {"addition_embed_type": "text_time"}, "has addition_embed_type 'text_time'"),
    "an upscaler's UNet": ("unet/config.json", {"num_class_embeds": 1000}, "unet has num_class_embeds 1000"),
    "another network": (
        "unet/config.json", {"_class_name": "UNetSpatioTemporalConditionModel"}, "unet is a UNetSpatioTemporal",
    ),
    "a distilled UNet": ("unet/config.json", {"time_cond_proj_dim": 256}, r"distilled to few steps \(LCM\)"),
    "a distilled model": (
        "scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, r"an LCMScheduler, .* few timesteps",
    ),
    "Turbo": (
        "scheduler/scheduler_config.json",
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, "as SD-Turbo's, which was distilled",
    ),
    "an inpainting UNet": ("unet/config.json", {"in_channels": 9}, r"takes 9 channels .* have 4.*inpainting"),
    "a UNet with a variance": ("unet/config.json", {"out_channels": 8}, r"gives 8 channels .* have 4"),
    "a wider text encoder": ("unet/config.json", {"cross_attention_dim": 24}, r"states are 16 wide .* attends to 24"),
    "widths that differ by block": (
        "unet/config.json", {"cross_attention_dim": [16, 24]}, r"states are 16 wide .* attends to 16 and 24",
    ),
    "another autoencoder's latents": ("vae/config.json", {"latent_channels": 16}, r"takes 4 channels .* have 16"),
    "an autoencoder that shifts": ("vae/config.json", {"shift_factor": 0.1}, "shifts its latents"),
    "an autoencoder without a posterior": ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
    "grey images": ("vae/config.json", {"in_channels": 1}, r"\(1, 3\) channels for images"),
    "a tokenizer without a limit": (
        "tokenizer/tokenizer_config.json", {"model_max_length": None}, r'"model_max_length": 8',
    ),
    "a tokenizer whose limit is none": (
        "tokenizer/tokenizer_config.json", {"model_max_length": int(1e30)}, r'"model_max_length": 8',
    ),
    "a tokenizer that gives too much": (
        "tokenizer/tokenizer_config.json", {"model_max_length": 77}, r"up to 77 tokens .* has 8 positions",
    ),
    "more words than embeddings": ("text_encoder/config.json", {"vocab_size": 100}, r"number 189 .* knows 100"),
    "flow matching": (
        "scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "has no alphas_cumprod",
    ),
    "no such scheduler": ("scheduler/scheduler_config.json", {"_class_name": "MyScheduler"}, "of the kind MyScheduler"),
    "noise predicted from noise": (
        "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "holds no signal",
    ),
    "images predicted": ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction type 'sample'"),
    "a config of another size": ("unet/config.json", {"block_out_channels": [32, 32]}, r"another shape than unet"),
    "a config of another depth": ("unet/config.json", {"layers_per_block": 2}, r"unet: \d+ of \d+ weights are missing"),
    "a deeper text encoder": ("text_encoder/config.json", {"num_hidden_layers": 2}, r"text_encoder: 16 of 36"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_parts_that_do_not_fit_are_told_by_what_they_are(pipeline, file, changes, message):
    edit(pipeline / file, **changes)
    with pytest.raises(ValueError, match=rf"(?s)can't be used:.*{message}"):
        check_pipeline_folder(str(pipeline))


def test_every_problem_is_told_at_once(pipeline):
    edit(pipeline / "unet/config.json", in_channels=9, cross_attention_dim=24)
    edit(pipeline / "tokenizer/tokenizer_config.json", model_max_length=None)
    assert len(refusal(pipeline).splitlines()) == 4


WEIGHTS = {
    "a prefix too many": (UNET, lambda name: f"model.{name}", r"unet: (\d+) of \1 weights are missing.*model\."),
    "some missing": (TEXT, lambda name: None if "final" in name else name, "text_encoder: 2 of 20 weights are missing"),
}


@pytest.mark.parametrize(("file", "change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_would_stay_random_are_refused(pipeline, file, change, message):
    rewrite(pipeline / file, change)
    with pytest.raises(ValueError, match=message):
        check_pipeline_folder(str(pipeline))


def test_weights_by_another_name_are_told_by_the_names_found(pipeline):
    (pipeline / UNET).rename(pipeline / "unet/my_unet.safetensors")
    assert "found there: config.json, my_unet.safetensors" in refusal(pipeline)


def test_a_pointer_of_git_lfs_is_told_from_a_file(pipeline):
    (pipeline / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n")
    assert "git lfs pull" in refusal(pipeline)


def test_no_weight_is_read_by_the_check(pipeline, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr("torch.nn.Module.load_state_dict", lambda *_, **__: pytest.fail("weights were loaded"))
    check_pipeline_folder(str(pipeline))


def test_the_names_of_a_parts_weights_are_compared_once(pipeline, monkeypatch):
    compared, twins = [], checks._twins
    monkeypatch.setattr(checks, "_twins", lambda module, actual: compared.append(module) or twins(module, actual))
    check_pipeline_folder(str(pipeline))
    assert len(compared) == 3  # UNet, autoencoder and text encoder; for each weight it takes minutes of a large model


@pytest.mark.parametrize("script", ["cache_examples", "cache_reference"])
def test_caches_are_refused_the_same_models(pipeline, script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    edit(pipeline / "unet/config.json", in_channels=9)
    main = runpy.run_path(f"scripts/{script}.py")["main"]
    caches = [f"cache.examples={tmp_path / 'examples'}", f"cache.reference={tmp_path / 'reference'}"]
    keys = ["data.horizontal_flip=false", "data.sample_latents=false", f"model.pipeline={pipeline}", *caches]
    assert main(["--config", "configs/base.yaml", *keys]) == 1
    assert "takes 9 channels (in_channels)" in capsys.readouterr().err
    assert main(["--config", "configs/base.yaml", *keys, f"model.pipeline={pipeline / UNET}"]) == 1
    assert "is a single file with a UNet's weights" in capsys.readouterr().err
    assert not (tmp_path / "examples").exists() and not (tmp_path / "reference").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickled_weights_alone_are_not_opened(pipeline, part, monkeypatch):
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("it was unpickled"))
    (file,) = (pipeline / part).glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    assert f"lacks {part}/*.safetensors" in (said := refusal(pipeline)) and "Pickled weights are not opened" in said


def test_a_unet_of_another_size_or_of_xl_is_refused_after_unet_too(small_pipeline, pipeline):
    """As in a pipeline of its own: the same check."""
    for changes, message in (
        ({"addition_embed_type": "text_time"}, "as Stable Diffusion XL's is"),
        ({"out_channels": 8}, r"gives 8 channels"),
        ({"_class_name": "UNetSpatioTemporalConditionModel"}, "unet is a UNetSpatioTemporal"),
        ({"block_out_channels": [32, 32]}, "another shape than unet/config.json says"),
    ):
        before = (pipeline / "unet/config.json").read_text()
        edit(pipeline / "unet/config.json", **changes)
        with pytest.raises(ValueError, match=rf"(?s)model\.unet: .*doesn't fit its pipeline:.*{message}"):
            resolve_model(*read_model_spec(small_pipeline, unet=str(pipeline)))
        (pipeline / "unet/config.json").write_text(before)


# --- odd and good --------------------------------------------------------------------------------------------


def only_variant(pipeline, *parts, variant="fp16"):
    for part in parts:
        (file,) = (pipeline / part).glob("*.safetensors")
        tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(tensors, file.with_name(f"{file.stem}.{variant}.safetensors"), metadata={"format": "pt"})
        file.unlink()


def shard(pipeline):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet")
    (pipeline / UNET).unlink()
    unet.save_pretrained(pipeline / "unet", max_shard_size="100KB")
    assert len(list((pipeline / "unet").glob("*-of-*.safetensors"))) > 1


def old_attention(pipeline):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def older(name):
        for now, then in new.items():
            name = name.replace(f"mid_block.attentions.0.{now}", f"mid_block.attentions.0.{then}")
        return name

    rewrite(pipeline / "vae/diffusion_pytorch_model.safetensors", older)
    assert any(".proj_attn." in name for name in load_file(pipeline / "vae/diffusion_pytorch_model.safetensors"))


def junk_beside(pipeline):
    (pipeline / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant that nobody reads")
    (pipeline / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"nor this")


ODD = {
    "shards": shard,
    "variants beside the main weights": junk_beside,
    "a text encoder of older libraries": lambda pipeline: rewrite(
        pipeline / TEXT, lambda name: f"text_model.{name.removeprefix('text_model.')}"
    ),
    "an autoencoder of older libraries": old_attention,
    "v predicted, without signal at the last step": lambda pipeline: edit(
        pipeline / "scheduler/scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "saved by an image-to-image pipeline": lambda pipeline: edit(
        pipeline / "model_index.json", _class_name="StableDiffusionImg2ImgPipeline"
    ),
    "an index that names a safety checker": lambda pipeline: edit(
        pipeline / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]
    ),
    "the same width for each block": lambda pipeline: edit(pipeline / "unet/config.json", cross_attention_dim=[16, 16]),
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_an_odd_pipeline_that_is_good_is_loaded_whole(small_pipeline, pipeline, change):
    change(pipeline)
    check_pipeline_folder(str(pipeline))
    parts, plain = load_parts(ModelConfig(pipeline=str(pipeline))), load_parts(ModelConfig(pipeline=small_pipeline))
    for part in ("unet", "vae", "text_encoder"):
        expected = plain.modules[part].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in parts.modules[part].state_dict().items())


def test_a_pipeline_of_links_is_good(small_pipeline, tmp_path):
    for path in Path(small_pipeline).rglob("*.*"):
        link = tmp_path / "links" / path.relative_to(small_pipeline)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert load_parts(ModelConfig(pipeline=str(tmp_path / "links"))).denoiser.dtype == torch.float32


@pytest.mark.parametrize("parts", [("unet",), ("unet", "vae", "text_encoder")])
def test_a_variant_that_is_alone_is_loaded_as_float32_and_said(small_pipeline, pipeline, capsys, parts):
    only_variant(pipeline, *parts)
    loaded, whole = (load_parts(ModelConfig(pipeline=str(folder))) for folder in (pipeline, small_pipeline))

    assert f"holds {', '.join(f'{part} as fp16' for part in parts)} alone" in capsys.readouterr().err
    for part in ("unet", "vae", "text_encoder"):
        for value, exact in zip(loaded.modules[part].parameters(), whole.modules[part].parameters(), strict=True):
            assert value.dtype == torch.float32
            assert torch.equal(value, exact.half().float() if part in parts else exact)


def test_a_checksum_covers_the_variant_that_is_read_and_no_other(small_pipeline, pipeline):
    config, before = ModelConfig(pipeline=str(pipeline)), part_checksum(ModelConfig(pipeline=small_pipeline), "unet")
    junk_beside(pipeline)
    assert part_checksum(config, "unet") == before
    for junk in (pipeline / "unet").glob("*.*.safetensors"):
        junk.unlink()
    only_variant(pipeline, "unet")
    alone = part_checksum(config, "unet")
    rewrite(pipeline / "unet/diffusion_pytorch_model.fp16.safetensors", lambda name: f"{name}x")
    assert len({before, alone, part_checksum(config, "unet")}) == 3


def test_a_shard_that_is_missing_is_named(pipeline):
    shard(pipeline)
    gone = sorted((pipeline / "unet").glob("*-of-*.safetensors"))[1]
    gone.unlink()
    assert f"lacks unet/{gone.name}" in refusal(pipeline)


# --- a UNet of one's own -------------------------------------------------------------------------------------


def test_a_unet_is_checked_against_the_pipeline_that_it_goes_with(small_pipeline, pipeline):
    unet = pipeline / "unet"
    edit(unet / "config.json", in_channels=9)
    with pytest.raises(ValueError, match=r"model\.unet: .* doesn't fit its pipeline:\n.* takes 9 channels"):
        resolve_model(*read_model_spec(small_pipeline, unet=str(unet)))
    edit(unet / "config.json", in_channels=4, cross_attention_dim=768)
    with pytest.raises(ValueError, match=r"states are 16 wide .* attends to 768"):
        resolve_model(*read_model_spec(small_pipeline, unet=str(pipeline)))
    edit(unet / "config.json", cross_attention_dim=16)
    rewrite(pipeline / UNET, lambda name: f"unet.{name}")
    with pytest.raises(ValueError, match=r"weights are missing"):
        resolve_model(*read_model_spec(small_pipeline, unet=str(unet)))


def test_a_unet_of_pickled_weights_is_refused_and_not_opened(small_pipeline, pipeline, cached, monkeypatch):
    from xdpo.models import load_model

    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("it was unpickled"))
    weights = load_file(pipeline / UNET)
    (pipeline / UNET).unlink()
    with pytest.raises(ValueError, match=r"lacks unet/\*\.safetensors .* found there: config\.json\. Save it"):
        resolve_model(*read_model_spec(small_pipeline, unet=str(pipeline)))
    torch.save(weights, pipeline / "unet/diffusion_pytorch_model.bin")
    for unet in (pipeline, pipeline / "unet"):
        with pytest.raises(
            ValueError, match=r"(?s)model\.unet: .*diffusion_pytorch_model\.bin.*Pickled weights are not"
        ):
            resolve_model(*read_model_spec(small_pipeline, unet=str(unet)))

    cached(pipeline, "org/pickled")
    model = resolve_model(*read_model_spec(small_pipeline, unet="org/pickled"))
    with pytest.raises(ValueError, match=r"can't load unet weights of org/pickled: .*safetensors"):
        load_model(model)


def test_a_unet_as_a_variant_alone_is_loaded(small_pipeline, pipeline):
    from xdpo.models import load_model

    only_variant(pipeline, "unet")
    model = load_model(resolve_model(*read_model_spec(small_pipeline, unet=str(pipeline / "unet"))))
    assert model.unet.dtype == torch.float32


# --- files ---------------------------------------------------------------------------------------------------

FILES = {
    "a whole checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": 1}, r"from_single_file\('.*'\)"),
    "a checkpoint of XL": (
        {"model.diffusion_model.out.0.weight": 1, "conditioner.embedders.1.model.ln_final.bias": 1},
        r"from diffusers import StableDiffusionXLPipeline as P; P\.from_single_file\('.*'\)",
    ),
    "a checkpoint of FLUX": ({"double_blocks.0.img_attn.proj.weight": 1}, "single file of FLUX"),
    "a UNet": ({"down_blocks.0.resnets.0.conv1.weight": 1}, "single file with a UNet's weights"),
    "LoRA weights": ({"lora_unet_mid_block.lora_up.weight": 1}, "LoRA weights; give it with --lora"),
    "something else": ({"layers.0.weight": 1}, r"single file of 1 weights \(layers\.0\.weight"),
}


@pytest.mark.parametrize(("names", "message"), FILES.values(), ids=FILES)
def test_a_file_in_place_of_a_folder_is_told_by_what_it_is(tmp_path, small_pipeline, names, message):
    file = tmp_path / "v1-5.safetensors"
    save_file({name: torch.zeros(size) for name, size in names.items()}, file)
    with pytest.raises(ValueError, match=rf"model\.pipeline: .*{message}"):
        check_pipeline_folder(str(file))
    with pytest.raises(ValueError, match=rf"model: .*{message}"):
        read_model_spec(str(file))
    with pytest.raises(ValueError, match=rf"model\.unet: .*{message}"):
        resolve_model(*read_model_spec(small_pipeline, unet=str(file)))


def test_a_pickled_file_is_not_opened(tmp_path):
    class Deadly:
        def __reduce__(self):
            return pytest.fail, ("it was unpickled",)

    torch.save({"weights": Deadly()}, tmp_path / "v1-5.ckpt")
    with pytest.raises(ValueError, match=r"pickled weights, which may run any code"):
        check_pipeline_folder(str(tmp_path / "v1-5.ckpt"))


# --- models of the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """cached(folder, "owner/name"): put a pipeline into a hub cache of the test's own, as if it was downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder, name, patterns=("*",)):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("a" * 40)
        for path in {path for pattern in patterns for path in Path(folder).rglob(pattern) if path.is_file()}:
            target = snapshot / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text("a" * 40)

    return put


def test_a_hub_model_is_checked_by_its_small_files_alone(pipeline, cached):
    edit(pipeline / "unet/config.json", in_channels=9)
    cached(pipeline, "org/inpainting", ["*.json", "*.txt"])
    with pytest.raises(ValueError, match=r"'org/inpainting' can't be used:\n.* takes 9 channels"):
        check_pipeline_folder("org/inpainting")


def test_a_hub_model_from_the_cache_is_loaded_and_its_weights_checked(small_pipeline, pipeline, cached):
    cached(small_pipeline, "org/good")
    check_pipeline_folder("org/good")
    parts = load_parts(ModelConfig(pipeline="org/good"), encoders=False)
    assert not parts.encoders and parts.denoiser.dtype == torch.float32
    local = ModelConfig(pipeline=small_pipeline)
    assert part_checksum(ModelConfig(pipeline="org/good"), "unet", "vae") == part_checksum(local, "unet", "vae")

    cached(small_pipeline, "org/configs", ["*.json", "*.txt"])
    check_pipeline_folder("org/configs")
    for use in (load_parts, lambda config: part_checksum(config, "vae")):
        with pytest.raises(ValueError, match=r"could not load 'org/configs': .* not all of it.*no weights of .*vae"):
            use(ModelConfig(pipeline="org/configs"))

    rewrite(pipeline / UNET, lambda name: f"model.{name}")
    cached(pipeline, "org/prefixed")
    with pytest.raises(ValueError, match=r"could not load 'org/prefixed':\n  unet: \d+ of \d+ weights are missing"):
        load_parts(ModelConfig(pipeline="org/prefixed"))


@pytest.mark.parametrize("source", ["vae", "."])
def test_an_autoencoder_of_the_hub_is_taken_from_the_top_of_its_repository_or_from_vae(small_pipeline, cached, source):
    cached(Path(small_pipeline) / source, "org/vae")
    model, own = ModelConfig(pipeline=small_pipeline, vae="org/vae"), ModelConfig(pipeline=small_pipeline)
    check_model(model)
    assert part_checksum(model, "vae") == part_checksum(own, "vae")
    expected = load_parts(own).vae.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load_parts(model).vae.state_dict().items())
    for name, message in (
        ("org/nothing", "not in the hub's cache"),
        (f"{small_pipeline}/unet", "latent_channels is None"),
    ):
        with pytest.raises(ValueError, match=rf"model\.vae: .*(?s:.)*{message}"):
            load_parts(ModelConfig(pipeline=small_pipeline, vae=name))


def test_a_hub_model_of_pickled_weights_is_told_from_one_out_of_reach(pipeline, monkeypatch):
    (pipeline / UNET).rename(pipeline / "unet/diffusion_pytorch_model.bin")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, dry_run=False, **__: [] if dry_run else pipeline
    )
    with pytest.raises(ValueError, match=r"'org/name' has no safetensors weights of unet"):
        part_checksum(ModelConfig(pipeline="org/name"), "unet")


@pytest.mark.parametrize("files", [("full", "fp16"), ("fp16",)])
def test_of_a_hub_model_the_weights_that_are_read_are_fetched_and_no_other(pipeline, monkeypatch, tmp_path, files):
    from types import SimpleNamespace

    suffixes = {"full": ".safetensors", "fp16": ".fp16.safetensors"}
    there = [f"unet/diffusion_pytorch_model{suffixes[file]}" for file in files]
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns, dry_run=False):
        asked.append(allow_patterns)
        return [SimpleNamespace(filename=name) for name in there] if dry_run else str(pipeline)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    if "full" not in files:
        only_variant(pipeline, "unet")
    part_checksum(ModelConfig(pipeline="org/name", revision="main"), "unet")
    assert [pattern for pattern in asked[-1] if pattern.endswith(".safetensors")] == there[:1]
