"""Waits of any length: one process is busy for longer than a collective's time-out, and the others wait for it."""

import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from forks import launch
from training_runs import SMALL_RUN

SHORT = 0.5  # seconds that a collective on the device has in these runs
BUSY = 1.0  # seconds for which the first process is busy in every scene
SCENES = (
    "loading pairs",
    "building a cache",
    "copying a cache",
    "recording the reference",
    "self-play",
    "generating",
    "stopping together",
)


@pytest.fixture(scope="module")
def waited(small_pipeline, small_pairs, tmp_path_factory):
    """Output of two processes that went through all scenes."""
    folder = tmp_path_factory.mktemp("waits")
    overrides = [*SMALL_RUN, f"model.pipeline={small_pipeline}", f"data.path={small_pairs}", f"output_dir={folder}/run"]
    return launch(__file__, [folder, *overrides], processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_who_is_busy_for_longer_than_a_collective_may_take_is_waited_for(waited, scene):
    for rank in (0, 1):
        assert f"process {rank} went through {scene}" in waited.stdout, waited.stderr[-3000:]


def busy_at_first(owner, name, state):
    """Have the first process take its time in the first call of a function."""
    original, calls = getattr(owner, name), []

    def slow(*arguments, **options):
        if state.is_main_process and not calls:
            time.sleep(BUSY)
        calls.append(name)
        return original(*arguments, **options)

    setattr(owner, name, slow)


def go_through_scenes(folder, overrides):

    import torch.distributed as dist
    from accelerate import PartialState

    import generate
    from xdpo import families, models, precompute, processes, recording
    from xdpo.compute import build_accelerator
    from xdpo.config import load_config
    from xdpo.data import Split
    from xdpo.families import PipelineParts
    from xdpo.feeds import SelfPlay
    from xdpo.reference import Reference
    from xdpo.sampling import images as sampling

    overrides += ["compute.precision=fp32", "data.source=parquet", f"cache.examples={folder}/cache"]
    overrides += [f"cache.local_copy={folder}/copy", "train.max_steps=3"]
    overrides += ["loss.name=seppo", "self_play.every=2", "self_play.batch_size=2", "self_play.num_inference_steps=1"]
    settings = load_config("configs/base.yaml", overrides)
    recorded = load_config("configs/base.yaml", [*overrides, "loss.name=xdpo", f"cache.reference={folder}/reference"])
    accelerator = build_accelerator(settings)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SHORT), dist.group.WORLD)
    say = accelerator.print

    def through(scene):
        print(f"process {accelerator.process_index} went through {scene}\n", end="", flush=True)

    busy_at_first(precompute.opening, "load_pairs", accelerator)
    precompute.load_table(settings, accelerator, Split.TRAIN, in_order=True)
    through("loading pairs")

    busy_at_first(PipelineParts, "encode_images", accelerator)
    precompute.build_missing_examples(settings, accelerator, say)
    through("building a cache")

    busy_at_first(precompute.opening, "copy_examples", accelerator)
    pairs = precompute.open_examples(settings, accelerator, Split.TRAIN)
    through("copying a cache")

    busy_at_first(Reference, "measure", accelerator)
    recording.fill(recorded, accelerator)
    through("recording the reference")

    parts = families.load_parts(settings.model)
    reference = models.make_reference(parts, settings.model, settings.compute)
    dataset = precompute.make_dataset(pairs, parts.tokenize, settings, Split.TRAIN)
    play = SelfPlay(settings, accelerator, parts, dataset, (4, 8, 8), reference, Path(settings.output_dir))
    busy_at_first(SelfPlay, "_sample", accelerator)
    play.begin_step(0, parts.denoiser)
    assert play.sampled_rejected(range(8)).shape == (8, 4, 8, 8)
    through("self-play")

    busy_at_first(models, "load_model", accelerator)
    busy_at_first(sampling, "sample_chunk", accelerator)
    Path(folder, "prompts.txt").write_text("one\ntwo\nthree\n")
    images = ["--model", settings.model.pipeline, "--prompts", f"{folder}/prompts.txt", "--output", f"{folder}/images"]
    options = generate.build_parser().parse_args([*images, "--steps=1", "--batch-size=1", "--image-size=16"])
    assert generate.make_missing(options, generate.build_settings(options), PartialState()) == 0
    through("generating")

    taken = []
    for number in processes.deal("numbers", range(100), lambda: accelerator.is_main_process and len(taken) == 1):
        taken.append(number)
        time.sleep(0.05)
    everybodys = [number for numbers in processes.gather(taken) for number in numbers]
    assert len(taken) > 0 and len(set(everybodys)) == len(everybodys) < 100
    through("stopping together")


if __name__ == "__main__":
    go_through_scenes(sys.argv[1], sys.argv[2:])
