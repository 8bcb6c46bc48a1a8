"""Which image is made from which seed in which chunk, what a kill leaves of a folder, and how sheets are laid out."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from xdpo import models, sampling
from xdpo.config import ModelConfig
from xdpo.files import StorageError
from xdpo.prompts import load_prompts
from xdpo.sampling import SCHEDULERS, SamplingSettings
from xdpo.sampling.folder import MANIFEST, SETTINGS

QUICK = SamplingSettings(num_inference_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def pipeline(small_pipeline):
    parts = models.load_parts(ModelConfig(pipeline=small_pipeline))
    return models.pipeline_with(parts, parts.unet)


def pixels(images):
    return [np.asarray(image).tobytes() for image in images]


# --- images --------------------------------------------------------------------------------------------


def test_seeds_and_files_follow_from_position_and_number():
    prompts = load_prompts("tinyprompts", categories=["relation"], limit=5).prompts
    chunks = sampling.plan_chunks(prompts, images_per_prompt=2, seed=7, batch_size=4, suffix=".png")

    assert [len(chunk) for chunk in chunks] == [4, 1, 4, 1]
    first, again = chunks[0][1], chunks[2][1]
    assert (first.file, first.seed) == ("relation/00101.png", 7 + 101)
    assert (again.file, again.seed) == ("relation/00101_1.png", 7 + 101 + 1_000_000)


def test_neither_more_prompts_nor_more_images_move_an_image_to_another_place_in_its_chunk():
    def places(limit, images):
        prompts = load_prompts("tinyprompts", limit=limit).prompts
        chunks = sampling.plan_chunks(prompts, images, 0, 8, ".png")
        return {task.file: (slot, task.seed) for chunk in chunks for slot, task in enumerate(chunk)}

    few, many = places(11, 1), places(200, 3)
    assert few.items() <= many.items() and len(many) == 600


def test_seeds_beyond_what_a_generator_can_tell_apart_are_refused():
    prompts = load_prompts("tinyprompts", limit=2).prompts
    with pytest.raises(ValueError, match="between 0 and 2³² − 1"):
        sampling.plan_chunks(prompts, 1, 2**32 - 1, 4, ".png")
    assert sampling.plan_chunks(prompts, 1, 2**32 - 2, 4, ".png")


def test_an_image_does_not_depend_on_what_fills_the_rest_of_its_chunk(pipeline):
    prompts, seeds = ["a", "b", "c d", "e"], [3, 4, 5, 6]
    whole = sampling.sample_chunk(pipeline, prompts, seeds, QUICK)

    assert pixels(sampling.sample_chunk(pipeline, prompts[:3], seeds[:3], QUICK)) == pixels(whole)[:3]
    other = sampling.sample_chunk(pipeline, ["a", "x", "y", "z"], [3, 90, 91, 92], QUICK)
    assert pixels(other)[0] == pixels(whole)[0]
    assert len(set(pixels(whole) + pixels(other))) == 7


def test_a_chunk_is_what_the_pipeline_itself_makes(pipeline):
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    theirs = pipeline(["a", "b"], num_inference_steps=2, guidance_scale=7.5, generator=seeds).images
    settings = SamplingSettings(num_inference_steps=2, batch_size=2)
    assert pixels(sampling.sample_chunk(pipeline, ["a", "b"], [3, 4], settings)) == pixels(theirs)


@pytest.mark.parametrize(
    ("part", "layer", "value", "fault"),
    [
        ("unet", "conv_in", float("nan"), "latents"),
        ("unet", "conv_out", float("inf"), "latents"),
        ("vae", "decoder.conv_out", float("inf"), "pixels"),  # which the pipeline itself would clamp to white
        ("text_encoder", "final_layer_norm", float("nan"), "latents"),
    ],
)
def test_numbers_that_are_not_finite_are_no_image(small_pipeline, capsys, part, layer, value, fault):
    parts = models.load_parts(ModelConfig(pipeline=small_pipeline))
    getattr(parts, part).get_submodule(layer).bias.data[0] = value
    pipeline = models.pipeline_with(parts, parts.unet)

    with pytest.raises(sampling.NotFiniteError, match=rf"2 of 2 .* the {fault} of 'a prompt' .* in fp32"):
        sampling.sample_chunk(pipeline, ["a prompt", "b"], [3, 4], QUICK)
    assert len(sampling.sample_images(pipeline, ["a prompt"] * 5, seed=3, num_inference_steps=2)) == 5
    assert f"5 of 5 sample images are not finite: {fault} of 'a prompt'" in capsys.readouterr().err


def test_sampling_a_list_uses_one_seed_per_prompt_in_order(pipeline):
    images = sampling.sample_images(pipeline, ["a"] * 5, seed=3, num_inference_steps=2)

    assert len(set(pixels(images))) == 5
    assert pixels(sampling.sample_images(pipeline, ["a"], seed=7, num_inference_steps=2))[0] == pixels(images)[4]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples_from_its_generators_alone(small_pipeline, name):
    parts = models.load_parts(ModelConfig(pipeline=small_pipeline))
    settings = SamplingSettings(num_inference_steps=3, scheduler=name, batch_size=2)
    pipeline = sampling.prepare_pipeline(models.pipeline_with(parts, parts.unet), settings, torch.device("cpu"))

    first, second = (sampling.sample_chunk(pipeline, ["a", "b"], [1, 2], settings) for _ in range(2))
    assert type(pipeline.scheduler).__name__ == SCHEDULERS[name][0]
    assert pixels(first) == pixels(second) and np.asarray(first[0]).std() > 0


@pytest.mark.parametrize("name", ["pipeline", "euler", "unipc", "dpm++"])
def test_more_steps_than_timesteps_are_refused(small_pipeline, name):
    """Whatever a scheduler would do with them: raise, assert, or sample noise."""
    parts = models.load_parts(ModelConfig(pipeline=small_pipeline), encoders=False)
    settings = SamplingSettings(num_inference_steps=1001, scheduler=name)
    with pytest.raises(ValueError, match="1001 sampling steps are more than the 1000 timesteps"):
        sampling.prepare_pipeline(models.pipeline_with(parts, parts.unet), settings, torch.device("cpu"))


def test_half_precision_changes_pixels_but_little(small_pipeline):
    images = {}
    for precision in ("fp32", "bf16"):
        parts = models.load_parts(ModelConfig(pipeline=small_pipeline))
        settings = SamplingSettings(num_inference_steps=2, precision=precision, batch_size=2)
        pipeline = sampling.prepare_pipeline(models.pipeline_with(parts, parts.unet), settings, torch.device("cpu"))
        images[precision] = np.asarray(sampling.sample_chunk(pipeline, ["a"], [1], settings)[0], np.float32)

    difference = abs(images["fp32"] - images["bf16"])
    assert 0 < difference.mean() < 16


@pytest.fixture
def switches():
    """PyTorch's switches of kernels as they were, afterwards."""
    places = [(torch.backends.cuda.matmul, "allow_tf32")]
    places += [(torch.backends.cudnn, name) for name in ("allow_tf32", "benchmark", "deterministic")]
    before = [getattr(*place) for place in places]
    yield
    for place, value in zip(places, before, strict=True):
        setattr(*place, value)


def test_on_a_gpu_float32_is_float32_in_products_and_convolutions(switches):
    class Pipeline:
        scheduler = DDIMScheduler()

        def to(self, *_):
            return self

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sampling.prepare_pipeline(Pipeline(), SamplingSettings(), torch.device("cuda"))
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_a_prompt_is_truncated_where_its_tokens_are_more_than_are_read(tiny_tokenizer):
    assert not sampling.is_truncated(tiny_tokenizer, "a b c d e f")  # 6 and the two ends: 8
    assert sampling.is_truncated(tiny_tokenizer, "a b c d e f g")


# --- folders -------------------------------------------------------------------------------------------

SETTINGS_A = {"sampling.seed": 0, "model.base": "a", "file.quality": None}


def row(number, **changes):
    return {"file": f"x/{number:05d}.png", "position": number, "image": 0, "prompt": "“é”"} | changes


def opened(folder, numbers=()):
    sampling.open_image_folder(folder, SETTINGS_A, {"device": "cpu"})
    for number in numbers:
        sampling.save_image(folder / row(number)["file"], Image.new("RGB", (4, 4)), 75)
    return folder


def test_a_saved_image_has_the_checksum_that_is_returned_and_leaves_nothing_else(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    for name in ("a.png", "a.jpg"):
        checksum = sampling.save_image(tmp_path / "deep" / name, image, quality=30)
        assert checksum == hashlib.sha256((tmp_path / "deep" / name).read_bytes()).hexdigest()

    assert pixels([Image.open(tmp_path / "deep" / "a.png")]) == pixels([image])
    rough, fine = (tmp_path / "deep" / "a.jpg").stat().st_size, tmp_path / "fine.jpg"
    sampling.save_image(fine, image, quality=95)
    assert fine.stat().st_size > rough
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.jpg", "a.png"]


def test_parts_are_collected_in_order_and_removed(tmp_path):
    folder = opened(tmp_path / "set", range(4))
    sampling.record(folder, 1, [row(3), row(1)])
    sampling.record(folder, 0, [row(0), row(2)])

    assert sampling.read_manifest(folder) == []
    assert [kept["position"] for kept in sampling.collect_manifest(folder)] == [0, 1, 2, 3]
    assert sampling.read_manifest(folder) == [row(number) for number in range(4)]
    assert not list(folder.glob("manifest.part*"))


def test_a_line_torn_by_a_kill_is_dropped_and_so_is_a_row_without_its_image(tmp_path):
    folder = opened(tmp_path / "set", [0, 1, 2])
    sampling.record(folder, 0, [row(0), row(1)])
    part = next(folder.glob("manifest.part*"))
    torn = json.dumps(row(2), ensure_ascii=False).encode()
    part.write_bytes(part.read_bytes() + torn[: torn.index("é".encode()) + 1])  # in the midst of a character
    (folder / row(1)["file"]).unlink()

    assert sampling.collect_manifest(folder) == [row(0)]


def test_a_kill_between_manifest_and_parts_counts_nothing_twice(tmp_path):
    folder = opened(tmp_path / "set", [0, 1])
    sampling.record(folder, 0, [row(0)])
    sampling.collect_manifest(folder)
    sampling.record(folder, 0, [row(0), row(1)])

    assert sampling.collect_manifest(folder) == [row(0), row(1)]


def test_a_folder_of_other_settings_is_refused_with_the_keys_that_differ(tmp_path):
    folder = opened(tmp_path / "set", [0])
    sampling.check_image_folder(folder, SETTINGS_A)

    with pytest.raises(sampling.ImageFolderError) as refused:
        sampling.check_image_folder(folder, {"sampling.seed": 1, "model.base": "a", "sampling.new": True})
    message = str(refused.value)
    assert "sampling.seed: 0 there, 1 asked for" in message and "sampling.new: None there, True" in message
    assert "model.base" not in message


def test_a_folder_without_an_image_takes_other_settings(tmp_path):
    folder = opened(tmp_path / "set")
    (folder / "x").mkdir()
    (folder / "x" / "00000.png.1f.part").write_bytes(b"half an image")
    other = SETTINGS_A | {"sampling.seed": 1}

    sampling.check_image_folder(folder, other)
    assert sampling.open_image_folder(folder, other, {"device": "gpu"}) == []
    saved = json.loads((folder / SETTINGS).read_text())
    assert saved["settings"] == other and [start["device"] for start in saved["starts"]] == ["gpu"]


def test_an_image_that_is_not_yet_recorded_binds_its_folder(tmp_path):
    folder = opened(tmp_path / "set", [0])
    with pytest.raises(sampling.ImageFolderError, match=r"sampling\.seed"):
        sampling.check_image_folder(folder, SETTINGS_A | {"sampling.seed": 1})


def test_a_folder_that_is_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("")

    with pytest.raises(sampling.ImageFolderError, match=r"chapter\.tex"):
        sampling.check_image_folder(tmp_path / "thesis", SETTINGS_A)
    with pytest.raises(StorageError, match="is a file"):
        sampling.check_image_folder(tmp_path / "file" / "set", SETTINGS_A)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_what_was_written_aside_before_a_kill_does_not_make_a_folder_something_else(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / f"{SETTINGS}.0123456789ab.part").write_text('{"sett')
    sampling.check_image_folder(tmp_path / "set", SETTINGS_A)


def test_images_and_manifests_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        sampling.open_image_folder(tmp_path / "set", {}, {})
        sampling.save_image(tmp_path / "set" / "a" / "0.png", Image.new("RGB", (8, 8)))
        sampling.record(tmp_path / "set", 0, [{"file": "a/0.png", "image": 0, "position": 0}])
        sampling.collect_manifest(tmp_path / "set")
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 3 and {path.stat().st_mode & 0o777 for path in made} == {0o640}


def test_a_full_disk_is_said_of_an_image_and_of_the_manifest(tmp_path, full_disk):
    with pytest.raises(StorageError, match=r"could not write .*00000\.png: the disk is full"):
        sampling.save_image(tmp_path / "cats" / "00000.png", Image.new("RGB", (8, 8)), 90)
    assert not any((tmp_path / "cats").iterdir())
    (tmp_path / "manifest.part-00000.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="the disk is full"):
        sampling.record(tmp_path, 0, [row(0)])


@pytest.mark.parametrize(("name", "content"), [(SETTINGS, "{"), (SETTINGS, "[]"), (SETTINGS, '{"settings": {}}')])
def test_damaged_settings_are_refused(tmp_path, name, content):
    folder = opened(tmp_path / "set")
    (folder / name).write_text(content)
    with pytest.raises(sampling.ImageFolderError, match="is damaged"):
        sampling.check_image_folder(folder, SETTINGS_A)


def test_a_damaged_manifest_is_named_with_the_line(tmp_path):
    folder = opened(tmp_path / "set")
    (folder / MANIFEST).write_text(json.dumps(row(0)) + "\n{nonsense\n")
    with pytest.raises(sampling.ImageFolderError, match="line 2 is damaged"):
        sampling.read_manifest(folder)


def test_going_on_with_another_device_is_said_and_remembered(tmp_path):
    folder = opened(tmp_path / "set")

    assert sampling.open_image_folder(folder, SETTINGS_A, {"device": "cpu"}) == []
    assert sampling.open_image_folder(folder, SETTINGS_A, {"device": "gpu"}) == ["device: cpu, now gpu"]
    saved = json.loads((folder / SETTINGS).read_text())
    assert [start["device"] for start in saved["starts"]] == ["cpu", "cpu", "gpu"]


# --- sheets --------------------------------------------------------------------------------------------


def test_a_sheet_has_a_cell_for_every_model_and_prompt():
    columns = {"one": [Image.new("RGB", (128, 128), "red")] * 2, "two": [Image.new("RGB", (128, 128), "blue")] * 2}
    sheet = sampling.contact_sheet(columns, ["a prompt", "another"])

    colours = [sheet.getpixel((8 + 64 + column * 136, 26 + 64)) for column in range(2)]
    assert colours == [(255, 0, 0), (0, 0, 255)]
    assert sheet.width == 8 + 2 * 136
    taller = sampling.contact_sheet(columns, ["a prompt", "many words " * 20], caption_lines=3)
    assert taller.height == sheet.height + 2 * 15


def test_small_images_are_enlarged_to_sharp_pixels_and_large_ones_reduced_smoothly():
    checks = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    enlarged = sampling.contact_sheet({"a": [checks.crop((0, 0, 2, 2))]}, [""], cell=128)
    reduced = sampling.contact_sheet({"a": [checks]}, [""], cell=64)

    assert {enlarged.getpixel((x, 60)) for x in range(8, 136)} == {(0, 0, 0), (255, 255, 255)}
    assert all(100 < reduced.getpixel((x, 60))[0] < 155 for x in range(12, 68))
