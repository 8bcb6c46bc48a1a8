"""generate.py as its users run it: one definite image per prompt, on any number of processes and after any kill."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import forget_accelerators, held_elsewhere
from forks import launch
from PIL import Image
from tolerances import ELEMENT, assert_same_output
from training_runs import ROOT, slow_but

import generate
import train_xdpo
from xdpo import files, models
from xdpo.images.folder import read_manifest
from xdpo.models import ModelSpec, load_model, read_model_spec, resolve_model
from xdpo.sampling import images as sampling

QUICK = ["--steps", "2", "--batch-size", "4"]


@pytest.fixture
def make(small_pipeline, tmp_path, monkeypatch):
    """Generate in this process: make("name", "--limit", "3", …) → (exit status, folder)."""
    monkeypatch.chdir(tmp_path)

    def call(name, *options, model=small_pipeline, prompts=("tinyprompts",)):
        forget_accelerators()
        arguments = ["--model", str(model), "--prompts", *prompts, "--output", name, *QUICK, *options]
        return generate.main(arguments), tmp_path / name

    return call


def checksums(folder):
    """Every image's checksum, once as the manifest has it and once as the file has it; they must agree."""
    rows = read_manifest(folder)
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.suffix in (".png", ".jpg")}
    assert paths.keys() == {row.file for row in rows}
    for row in rows:
        assert files.file_sha256(paths[row.file]) == row.sha256
    return {row.file: row.sha256 for row in rows}


# --- one definite image, whatever happens ----------------------------------------------------------------

MANY = ["--limit", "14", "--images-per-prompt", "2"]  # 28 images in 8 chunks
KILLED = """
import os, signal, sys
import generate
from xdpo.images import folder
original, calls = folder.{name}, []
def deadly(*args, **kwargs):
    calls.append(1)
    if len(calls) == {count}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
folder.{name} = deadly
sys.exit(generate.main(sys.argv[1:]))
"""
TEAR = "path = args[0] / 'manifest.part-00000.jsonl'; path.open('a').write('{\"file\": \"sing')"


@pytest.fixture(scope="module")
def of_one_process(small_pipeline, tmp_path_factory):
    """Checksums of what one uninterrupted process makes."""
    folder = tmp_path_factory.mktemp("one") / "images"
    arguments = ["--model", small_pipeline, "--prompts", "tinyprompts", "--output", str(folder), *QUICK, *MANY]
    forget_accelerators()
    assert generate.main(arguments) == 0
    return checksums(folder / "tinyprompts")


def test_two_processes_make_the_images_of_one(small_pipeline, tmp_path, of_one_process):
    arguments = ["--model", small_pipeline, "--prompts", "tinyprompts", "--output", "two", *QUICK, *MANY]
    ended = launch(ROOT / "generate.py", arguments, processes=2, cwd=tmp_path)

    assert ended.returncode == 0, ended.stderr[-3000:]
    assert checksums(tmp_path / "two" / "tinyprompts") == of_one_process
    saved = json.loads((tmp_path / "two" / "tinyprompts" / "settings.json").read_text())
    assert saved["starts"][0]["processes"] == 2


@pytest.mark.parametrize(
    ("name", "count", "before", "resumed_by"),
    [
        pytest.param("save_image", 10, "pass", 2, marks=pytest.mark.slow),  # in the third of eight chunks
        ("record", 4, TEAR, 1),  # its images written, its row half
    ],
    ids=["between two images, resumed by two processes", "within a row, resumed by one"],
)
def test_a_killed_run_goes_on_to_the_same_images(
    make, small_pipeline, tmp_path, of_one_process, name, count, before, resumed_by
):
    arguments = ["--model", small_pipeline, "--prompts", "tinyprompts", "--output", "killed", *QUICK, *MANY]
    script = KILLED.format(name=name, count=count, before=before)
    ended = launch(script, arguments, cwd=tmp_path)
    folder = tmp_path / "killed" / "tinyprompts"
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
    assert read_manifest(folder) == [] and list(folder.glob("manifest.part*"))
    before_resuming = {path: path.stat().st_mtime_ns for path in list(folder.rglob("*.png"))[:8]}

    if resumed_by == 2:
        ended = launch(ROOT / "generate.py", arguments, processes=2, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr[-3000:]
    else:
        assert make("killed", *MANY)[0] == 0
    assert checksums(folder) == of_one_process
    assert sum(path.stat().st_mtime_ns == time for path, time in before_resuming.items()) >= 4, "finished ones stay"
    assert not list(folder.rglob("*.part*"))


def test_a_shorter_run_lengthened_equals_the_whole(make, of_one_process):
    assert make("short", "--limit", "6")[0] == 0
    status, folder = make("short", *MANY)

    assert status == 0
    assert checksums(folder / "tinyprompts") == of_one_process


def test_a_finished_folder_is_left_alone_and_no_model_loaded(make, monkeypatch, capsys):
    _, folder = make("done", "--limit", "3")
    first = (folder / "tinyprompts" / "single_object" / "00000.png").stat().st_mtime_ns
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("a model was loaded"))

    assert make("done", "--limit", "3")[0] == 0
    assert (folder / "tinyprompts" / "single_object" / "00000.png").stat().st_mtime_ns == first
    assert "3 images in" in capsys.readouterr().out


def test_an_image_that_was_removed_is_made_again(make):
    _, folder = make("holes", "--limit", "6")
    whole = checksums(folder / "tinyprompts")
    (folder / "tinyprompts" / "single_object" / "00002.png").unlink()

    assert make("holes", "--limit", "6")[0] == 0
    assert checksums(folder / "tinyprompts") == whole


# --- what a folder says ------------------------------------------------------------------------------------


def test_a_manifest_says_everything_about_an_image(make):
    _, folder = make("images", "--categories", "relation", "--limit", "1", "--seed", "5", "--guidance", "3")
    (row,) = read_manifest(folder / "tinyprompts")

    assert row.file == "relation/00100.png" and row.set == "tinyprompts"
    assert (row.category, row.index, row.position, row.image) == ("relation", 100, 100, 0)
    assert row.seed == 105 and row.truncated and row.batch_size == 4
    assert row.model == "epsilon" and row.revision.startswith("sha256:")
    assert row.settings["guidance_scale"] == 3 and row.settings["num_inference_steps"] == 2
    assert Image.open(folder / "tinyprompts" / row.file).size == (16, 16), "the pipeline's own size"


def test_empty_and_truncated_prompts_are_counted_and_still_made(make, tmp_path, capsys):
    (tmp_path / "odd.json").write_text(json.dumps(["a", "", " ", "a b c d e f g h i"]))
    status, folder = make("odd", prompts=["odd.json"])

    assert status == 0
    assert "odd: 4 of 4 prompts, 2 empty, 1 longer than the 8 tokens" in capsys.readouterr().out
    assert [row.truncated for row in read_manifest(folder / "odd")] == [False, False, False, True]


def test_several_sets_go_to_a_folder_each_and_jpegs_have_their_quality(make):
    status, folder = make(
        "jpegs", "--limit", "2", "--format", "jpg", "--quality", "20", "--image-size", "64",
        prompts=["tinyprompts", "paper_figures"],
    )  # fmt: skip

    assert status == 0
    assert sorted(checksums(folder / "paper_figures")) == ["figure_1/00000.jpg", "figure_1/00001.jpg"]
    with Image.open(folder / "tinyprompts" / "single_object" / "00000.jpg") as image:
        assert image.size == (64, 64) and image.format == "JPEG"


def test_other_settings_are_refused_by_name_before_a_model_is_loaded(make, monkeypatch, capsys, v_prediction_pipeline):
    make("images", "--limit", "2")
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    changes = {
        "sampling.seed: 0 there, 1 asked for": ["--seed", "1"],
        "sampling.batch_size: 4 there, 2 asked for": ["--batch-size", "2"],
        "sampling.scheduler: 'pipeline' there, 'ddim' asked for": ["--scheduler", "ddim"],
        "prompts.sample: None there, 2 asked for": ["--sample", "2"],
        "file.format: 'png' there, 'jpg' asked for": ["--format", "jpg"],
    }
    for message, options in changes.items():
        assert make("images", "--limit", "2", *options)[0] == 1
        assert message in capsys.readouterr().err
    assert make("images", "--limit", "2", model=v_prediction_pipeline)[0] == 1  # the same weights, another scheduler
    assert "model.base_revision: 'sha256:" in capsys.readouterr().err


BAD_INPUT = {
    "unknown prompt set": (["--prompts", "hpsv3"], "did you mean 'hpsv2'"),
    "unknown model": (
        ["--model", "sd51"],
        "choose from diffusion_dpo, diffusion_kto, sd15, sdxl, seppo, tiny_flow, xdpo",
    ),
    "unknown category": (["--categories", "photo"], "choose from single object"),
    "fp16 without a GPU": (["--precision", "fp16"], "needs a GPU"),
    "a set twice": (["--prompts", "tinyprompts", "tinyprompts"], "names a set twice"),
    "one path for two sets": (["--prompts", "hpsv2", "tinyprompts", "--prompts-path", "x"], "is for one set"),
    "a size that latents don't have": (["--image-size", "60"], "multiple of 8"),
    "a quality beyond JPEG's": (["--quality", "101"], "between 1 and 100"),
    "a seed beyond a generator's": (["--seed", str(2**32)], "between 0 and 2³² − 1"),
    "a folder that is something else": (["--output", "."], "holds something else"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_in_a_few_lines_before_weights_are_loaded(
    make, monkeypatch, tmp_path, capsys, options, message
):
    if "fp16" in options and torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "tinyprompts").mkdir()
    (tmp_path / "tinyprompts" / "thesis.tex").write_text("")
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("weights were loaded"))

    assert make("images", *options)[0] == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.splitlines()) < 10
    assert not (tmp_path / "images").exists()


def test_prompts_that_were_edited_since_are_other_prompts(make, tmp_path, capsys):
    prompts = tmp_path / "mine[1].txt"
    prompts.write_text("a cat\na dog\n")
    status, folder = make("images", prompts=[str(prompts)])
    before = checksums(folder / "mine[1]")
    prompts.write_text("a cat\na fox\n")
    assert status == 0 and make("images", prompts=[str(prompts)])[0] == 1
    assert "prompts.sha256: " in capsys.readouterr().err
    prompts.write_text("a cat\na dog\n")
    assert make("images", prompts=[str(prompts)])[0] == 0 and checksums(folder / "mine[1]") == before


def test_its_own_output_gives_its_prompts_and_is_no_model(make, tmp_path, capsys):
    _, folder = make("images", "--limit", "2")
    manifest = folder / "tinyprompts" / "manifest.jsonl"
    status, again = make("again", prompts=[str(manifest)])
    prompts = {row.prompt: row.category for row in read_manifest(folder / "tinyprompts")}
    assert status == 0
    assert {row.prompt: row.category for row in read_manifest(again / "manifest")} == prompts
    refused = {
        "is no pipeline folder (model_index.json)": {"model": folder},
        "every prompt must be a string or an object": {"prompts": [str(folder / "tinyprompts" / "settings.json")]},
        "can't read prompts from .png": {"prompts": [str(next(folder.rglob("*.png")))]},
        "no prompt file": {"prompts": [str(folder)]},
    }
    for message, given in refused.items():
        assert make("new", **given)[0] == 1
        assert message in capsys.readouterr().err
    assert make(str(manifest))[0] == 1
    assert "manifest.jsonl is a file; choose another folder" in capsys.readouterr().err


def test_a_start_that_failed_binds_its_folder_to_nothing(make, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(models, "load_model", lambda *_: (_ for _ in ()).throw(ValueError("can't load")))
        assert make("images", "--limit", "2", "--seed", "1")[0] == 1
    status, folder = make("images", "--limit", "2", "--seed", "2")

    assert status == 0 and len(checksums(folder / "tinyprompts")) == 2
    saved = json.loads((folder / "tinyprompts" / "settings.json").read_text())
    assert saved["settings"]["sampling.seed"] == 2 and len(saved["starts"]) == 1
    assert make("images", "--limit", "2", "--seed", "1")[0] == 1
    assert "sampling.seed: 2 there, 1 asked for" in capsys.readouterr().err


# --- images that are none ----------------------------------------------------------------------------------


def test_weights_that_are_not_finite_end_the_run_with_nothing_recorded(make, small_pipeline, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(small_pipeline, tmp_path / "broken"))
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"].fill_(float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})
    status, folder = make("images", "--limit", "2", model=broken)

    error = capsys.readouterr().err
    assert status == 1 and "Traceback" not in error
    assert "model 'broken': 2 of 2 images" in error and "in fp32" in error and "'a white background with" in error
    assert read_manifest(folder / "tinyprompts") == [] and not list(folder.rglob("*.png"))
    assert make("images", "--limit", "2")[0] == 0, "the folder is still free"


def test_images_that_were_none_are_made_by_the_next_run(make, monkeypatch):
    whole, original, calls = make("whole", "--limit", "10")[1], sampling.sample_chunk, []

    def sample_chunk(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise sampling.NotFiniteError("no images")
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(sampling, "sample_chunk", sample_chunk)
        status, folder = make("images", "--limit", "10")
    assert status == 1 and len(list(folder.rglob("*.png"))) == 4
    assert make("images", "--limit", "10")[0] == 0
    assert checksums(folder / "tinyprompts") == checksums(whole / "tinyprompts")


# --- memory ------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch):
    """More than two images at once don't fit."""
    original = sampling.sample_chunk

    def sample_chunk(pipeline, prompts, seeds, settings, batch_size):
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(pipeline, prompts, seeds, settings, batch_size)

    monkeypatch.setattr(sampling, "sample_chunk", sample_chunk)


def test_memory_that_is_short_ends_the_run_with_what_to_do(make, little_memory, capsys):
    assert make("images", "--limit", "4")[0] == 1
    error = capsys.readouterr().err
    assert "out of memory with 4 images at once" in error and "--allow-oom-halving" in error


def test_chunks_are_halved_where_the_user_allowed_it_and_the_manifest_says_so(make, little_memory):
    status, folder = make("images", "--limit", "7", "--allow-oom-halving")

    rows = read_manifest(folder / "tinyprompts")
    assert status == 0 and len(checksums(folder / "tinyprompts")) == 7
    assert {row.batch_size for row in rows} == {2}
    assert [row.seed for row in rows] == list(range(7))


# --- models ------------------------------------------------------------------------------------------------


def train(small_pipeline, small_pairs, folder, *overrides):
    """A finished run of two steps with checkpoints after each."""
    forget_accelerators()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    settings = [
        "compute.precision=fp32", "data.source=parquet", "data.resolution=16", "data.num_workers=0",
        "optim.learning_rate=1e-2", "optim.scale_lr=false", "optim.warmup_steps=0", "train.total_batch_pairs=2",
        "train.micro_batch_pairs=2", "train.max_steps=2", "checkpoint.every=1", "eval.every=0", "samples.every=0",
        "log.trackers=[]", f"model.pipeline={small_pipeline}", f"data.path={small_pairs}", f"output_dir={folder}",
    ]  # fmt: skip
    try:
        assert train_xdpo.main(["--config", str(ROOT / "configs" / "base.yaml"), *settings, *overrides]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return folder


def prediction(pipeline):
    """The UNet's output for one fixed input: two models are the same where it is."""
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 8, 16, generator=generator)
    with torch.no_grad():
        return pipeline.unet(latents, 500, text).sample


def loaded(name, **options):
    return load_model(resolve_model(*read_model_spec(str(name), **options)))


def assert_loaded_as_cast(model, precision):
    """A model that is loaded in a precision, and one that is cast to it from float32, are the same to the bit."""
    settings, dtype = sampling.SamplingSettings(precision=precision), sampling.DTYPES[precision]
    cast, as_wanted = (
        sampling.prepare_pipeline(load_model(model, loaded_as), settings, torch.device("cpu"))
        for loaded_as in (torch.float32, dtype)
    )
    assert cast.components.keys() == as_wanted.components.keys()
    for name, module in cast.components.items():
        if isinstance(module, torch.nn.Module):
            weights, others = module.state_dict(), as_wanted.components[name].state_dict()
            assert weights.keys() == others.keys() and {dtype} == {each.dtype for each in others.values()}
            assert all(torch.equal(weight, others[key]) for key, weight in weights.items()), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("pipeline", ["small_pipeline", "sd3", "flux"])
def test_a_model_is_loaded_in_the_precision_it_is_sampled_in(request, pipeline, precision):
    assert_loaded_as_cast(resolve_model(*read_model_spec(request.getfixturevalue(pipeline))), precision)


RUNS = {
    "full": [],
    "lora": ["model.trainable=lora", "model.lora_rank=4", "model.lora_alpha=16"],
    "ema": ["model.ema_decay=0.5"],
}


@pytest.mark.parametrize("overrides", slow_but(("lora",), RUNS))
@pytest.mark.slow
def test_a_run_its_export_and_its_last_checkpoint_are_one_model(small_pipeline, small_pairs, tmp_path, overrides):
    run = train(small_pipeline, small_pairs, tmp_path / "run", *overrides)
    base, first, last = (
        prediction(loaded(name))
        for name in (small_pipeline, *(run / "checkpoints" / f"step_{step:08d}" for step in (1, 2)))
    )
    exported = prediction(loaded(run))

    assert_same_output(exported, last)
    assert torch.equal(exported, prediction(loaded(run / "export")))
    rounding = ELEMENT * exported.abs().max()
    assert (exported - first).abs().max() > 10 * rounding < (first - base).abs().max()
    names = [read_model_spec(str(path))[0] for path in (run, run / "export", run / "checkpoints" / "step_00000001")]
    assert names == ["run", "run", "run_step_00000001"]

    # The same weights named apart from the run: a UNet or LoRA folder on its base.
    kind = "lora" if "model.trainable=lora" in overrides else "unet"
    assert torch.equal(prediction(loaded(small_pipeline, **{kind: str(run / "export")})), exported)
    revisions = {resolve_model(*read_model_spec(str(path))).revision for path in (run, run / "export")}
    assert len(revisions) == 1 and revisions.pop().startswith("sha256:")

    for path in (run, run / "checkpoints" / "step_00000002"):
        assert_loaded_as_cast(resolve_model(*read_model_spec(str(path))), "bf16")


def test_a_run_without_an_export_names_its_checkpoints(small_pipeline, small_pairs, tmp_path, make, capsys):
    run = train(small_pipeline, small_pairs, tmp_path / "run")
    shutil.rmtree(run / "export")

    assert make("images", model=run)[0] == 1
    assert "step_00000002" in capsys.readouterr().err
    status, folder = make("images", "--limit", "1", model=run / "checkpoints" / "step_00000002")
    assert status == 0
    assert read_manifest(folder / "tinyprompts")[0].model == "run_step_00000002"


@pytest.mark.parametrize("subfolder", ["unet", ""])
def test_hub_models_are_found_in_the_cache_and_pinned_to_their_commit(
    small_pipeline, v_prediction_pipeline, tmp_path, monkeypatch, subfolder
):
    commits = {"org/base": "a" * 40, "org/unet": "b" * 40}
    sources = {"org/base": Path(small_pipeline), "org/unet": Path(v_prediction_pipeline) / "unet"}
    for name, commit in commits.items():
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        inside = subfolder if name == "org/unet" else ""
        shutil.copytree(sources[name], folder / "snapshots" / commit / inside)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path), raising=False)

    model = resolve_model("hub", ModelSpec(base="org/base", unet="org/unet"))
    assert (model.base_revision, model.revision, model.subfolder) == ("a" * 40, "b" * 40, subfolder or None)
    assert model.identity["base"] == "org/base"
    with pytest.raises(ValueError, match=r"model.unet: can't find .* of 'org/unet'"):
        resolve_model("hub", ModelSpec(base="org/base", unet="org/unet", revision="c" * 40))


MODEL_CONFIGS = sorted((ROOT / "configs" / "models").glob("*.yaml"))


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=[path.stem for path in MODEL_CONFIGS])
def test_every_shipped_model_is_known_by_name_and_pinned_where_its_commit_is_known(path):
    name, spec = read_model_spec(path.stem)

    assert name == path.stem
    bases = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0", "tiny_flow": "assets/tiny/flow_pipeline"}
    assert spec.run or spec.base == bases.get(name, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    pinned = [revision for revision in (spec.base_revision, spec.revision) if revision]
    assert all(len(revision) == 40 for revision in pinned)
    assert len(pinned) == {"sd15": 1, "sdxl": 1, "diffusion_kto": 1, "xdpo": 0, "tiny_flow": 0}.get(name, 2)


BAD_SPECS = {
    "nothing": ("{}", "must be a mapping|give either base"),
    "both": ("{base: a/b, run: c}", "give either base"),
    "two kinds": ("{base: a/b, unet: c/d, lora: e/f}", "give unet or lora"),
    "a revision of nothing": ("{base: a/b, revision: main}", "base_revision"),
    "a misspelt key": ("{base: a/b, untet: c/d}", "untet"),
    "a list": ("[a]", "must be a mapping"),
    "not YAML": ("{", "can't read .*line 1"),
    "a value that its tag does not fit": ("base: !!bool maybe", "can't read .*does not fit its `!!` tag"),
    "digits without end": (f"base: {'9' * 5000}", "can't read .*not valid YAML"),
    "a character that YAML forbids": ("base: a\x01b", "can't read .*not valid YAML"),
    "no UTF-8": ("base: a/b # caf\udce9", "can't read .*0xe9"),
    "a key twice": ("base: a/b\nbase: c/d", r"line 2: key 'base' is given twice"),
    "brackets without end": ("[" * 5000, "can't read .*nested too deeply"),
}


@pytest.mark.parametrize(("text", "message"), BAD_SPECS.values(), ids=BAD_SPECS)
def test_a_model_file_that_names_no_model_is_refused(tmp_path, text, message):
    (tmp_path / "model.yaml").write_text(text, "utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as refused:
        read_model_spec(str(tmp_path / "model.yaml"))
    assert "model.yaml" in str(refused.value)


def test_a_folder_that_is_no_model_says_how_weights_are_named(small_pipeline, tmp_path):
    with pytest.raises(ValueError, match="--model PIPELINE --unet or --lora"):
        read_model_spec(str(Path(small_pipeline) / "unet"))
    with pytest.raises(ValueError, match=r"has no unet/config.json or config.json"):
        resolve_model(*read_model_spec(small_pipeline, unet=str(tmp_path)))
    with pytest.raises(ValueError, match=r"model\.lora: .* has no pytorch_lora_weights.safetensors"):
        resolve_model(*read_model_spec(small_pipeline, lora=str(tmp_path)))


# --- sheets ------------------------------------------------------------------------------------------------


def test_a_grid_shows_the_prompts_that_all_models_have(make, tmp_path, capsys):
    make("one", "--limit", "5")
    make("two", "--limit", "4", "--seed", "9")
    arguments = ["grid", "--images", "one", "two", "--prompts", "tinyprompts", "--rows", "3", "--output", "g/sheet.png"]

    assert generate.main([*arguments, "--cell", "32"]) == 0
    said = capsys.readouterr()
    assert "4 of 5 prompts shown" in said.out
    assert "note: all models, tinyprompts: images made with different seed (0: one; 9: two)\n" in said.err
    first, second = Image.open(tmp_path / "g" / "sheet.png"), Image.open(tmp_path / "g" / "sheet_2.png")
    assert first.width == second.width == 8 + 2 * 40 and first.height > second.height
    shown = np.asarray(first)[26 : 26 + 32, 8 : 8 + 32]
    made = np.asarray(Image.open(tmp_path / "one" / "tinyprompts" / "single_object" / "00000.png"))
    assert (shown == made.repeat(2, axis=0).repeat(2, axis=1)).all()


GRIDS = {
    "no such set": (["--images", "one", "--prompts", "hpsv2"], "sets there: tinyprompts"),
    "no such folder": (["--images", "nowhere", "--prompts", "tinyprompts"], "sets there: none"),
    "titles for others": (["--images", "one", "--prompts", "tinyprompts", "--titles", "a", "b"], "--titles"),
    "the same folder twice": (["--images", "one", "one", "--prompts", "tinyprompts"], "--titles"),
    "no image of that number": (["--images", "one", "--prompts", "tinyprompts", "--indices", "7"], "--indices"),
}


def test_a_grid_of_nothing_is_refused_by_name(make, capsys):
    make("one", "--limit", "1")
    for arguments, message in GRIDS.values():
        assert generate.main(["grid", *arguments, "--output", "sheet.png"]) == 1
        assert message in capsys.readouterr().err


def test_a_full_disk_is_said_of_a_sheet_and_leaves_none(make, request, capsys):
    make("images", "--limit", "2")
    request.getfixturevalue("full_disk")
    for name in ("sheet.png", "sheet.JPEG"):
        assert generate.main(["grid", "--images", "images", "--prompts", "tinyprompts", "--output", name]) == 1
        assert f"could not write {name}: the disk is full" in capsys.readouterr().err
        assert not Path(name).exists()
    assert generate.main(["grid", "--images", "images", "--prompts", "tinyprompts", "--output", "sheet.gif"]) == 1
    assert "--output must end in .png or .jpg, got 'sheet.gif'" in capsys.readouterr().err


def test_a_second_generate_in_a_folder_is_refused_by_the_name_of_the_first(make, tmp_path, capsys):
    with held_elsewhere(tmp_path / "images" / "tinyprompts", "generate.py") as holder:
        assert make("images", "--limit", "1")[0] == 1
    assert f"is in use: generate.py, process {holder.pid} on " in capsys.readouterr().err
    assert make("images", "--limit", "1")[0] == 0
