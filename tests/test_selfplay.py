"""Self-play: which pair, round and snapshot a position has, and the buffer of a round on the disk.

That it trains and resumes is in test_objective_runs.py.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import forget_accelerators
from training_runs import ROOT, SMALL_RUN

from xdpo import families, models, precompute
from xdpo.compute import build_accelerator
from xdpo.config import load_config
from xdpo.data import Split
from xdpo.feeds.rounds import Rounds
from xdpo.feeds.self_play import RoundOrder, SelfPlay, draw_snapshot, rounds_of
from xdpo.files import StorageError
from xdpo.noise import SampleOrder


def rounds_with(*overrides):
    return rounds_of(load_config("configs/base.yaml", ["self_play.every=3", "train.total_batch_pairs=4", *overrides]))


def test_a_round_has_an_image_for_each_of_its_pairs_unless_the_buffer_is_smaller():
    assert rounds_with() == Rounds(steps=3, positions=12, slots=12)
    assert rounds_with("self_play.buffer_pairs=5") == Rounds(steps=3, positions=12, slots=5)
    assert rounds_with("self_play.buffer_pairs=100").slots == 12


def test_a_buffer_is_gone_through_again_and_again_within_its_round():
    rounds = rounds_with("self_play.buffer_pairs=5")

    assert [rounds.slot(position) for position in range(12)] == [(0, slot) for slot in (0, 1, 2, 3, 4) * 2 + (0, 1)]
    assert rounds.slot(12) == (1, 0)


def test_rounds_take_their_pairs_one_after_another_from_the_training_order():
    order = SampleOrder(0, 7, shuffle=True)
    whole = RoundOrder(order, rounds_with())
    assert [whole[position] for position in range(30)] == [order[position] for position in range(30)]

    small = RoundOrder(order, rounds_with("self_play.buffer_pairs=5"))
    assert [small[position] for position in range(12, 17)] == [order[position] for position in range(5, 10)]


def test_the_reference_is_any_snapshot_so_far_the_latest_or_the_base():
    drawn = [draw_snapshot(0, 9, "random") for _ in range(3)]
    assert len(set(drawn)) == 1  # of seed and round alone
    assert {draw_snapshot(seed, 3, "random") for seed in range(60)} == {0, 1, 2, 3}
    assert [draw_snapshot(0, number, "random") for number in (0, 0)] == [0, 0]
    assert draw_snapshot(5, 9, "latest") == 9 and draw_snapshot(5, 9, "base") == 0
    with pytest.raises(ValueError, match="choose from random, latest, base"):
        draw_snapshot(0, 1, "newest")


@pytest.fixture
def begin(small_pipeline, small_pairs, tmp_path, monkeypatch):
    """begin("key=value", …): self-play over rounds of eight images, sampled three at a time, in one run folder."""
    monkeypatch.chdir(ROOT)

    def make(*overrides, **options):
        forget_accelerators()
        paths = [f"model.pipeline={small_pipeline}", f"data.path={small_pairs}", f"output_dir={tmp_path}"]
        rounds = ["loss.name=seppo", "self_play.every=2", "self_play.batch_size=3", "self_play.num_inference_steps=2"]
        settings = load_config("configs/base.yaml", [*SMALL_RUN, *paths, *rounds, *overrides])
        accelerator = build_accelerator(settings)
        parts = families.load_parts(settings.model)
        pairs = precompute.load_table(settings, accelerator, Split.TRAIN, in_order=True)
        reference = models.make_reference(parts, settings.model, settings.compute)
        reference = accelerator.prepare_model(reference, evaluation_mode=True)
        dataset = precompute.make_dataset(pairs, parts.tokenize, settings, Split.TRAIN)
        return SelfPlay(settings, accelerator, parts, dataset, (4, 8, 8), reference, tmp_path, **options)

    return make


@pytest.fixture
def sampled(monkeypatch):
    """The batches that were sampled, as lists of positions."""
    batches, original = [], SelfPlay._sample

    def counting(self, positions):
        latents = original(self, positions)
        batches.append(positions)
        return latents

    monkeypatch.setattr(SelfPlay, "_sample", counting)
    return batches


def killed_after(number, sampled, monkeypatch):
    """Have the run die after so many batches, before the next one is sampled."""
    counting = SelfPlay._sample

    def dying(self, positions):
        if len(sampled) == number:
            raise KeyboardInterrupt
        return counting(self, positions)

    monkeypatch.setattr(SelfPlay, "_sample", dying)


def test_a_round_goes_on_with_what_was_sampled_when_it_was_killed(begin, sampled, monkeypatch, tmp_path):
    whole = begin()
    whole.begin_step(0, whole.parts.denoiser)
    expected = whole.sampled_rejected(range(8))
    assert sampled == [[0, 1, 2], [3, 4, 5], [6, 7, 7]]
    whole.close()

    sampled.clear()
    with monkeypatch.context() as patched:
        killed_after(2, sampled, patched)
        killed = begin()
        with pytest.raises(KeyboardInterrupt):
            killed.begin_step(0, killed.parts.denoiser)
    said = []
    again = begin(say=said.append)
    assert again.begin_step(0, again.parts.denoiser)
    assert sampled == [[0, 1, 2], [3, 4, 5], [6, 7, 7]]
    assert torch.equal(again.sampled_rejected(range(8)), expected)
    assert said[0] == f"self-play round 1: sampling 2 of 8 images; 8.2e-06 GB in {tmp_path}/self_play/00000"

    another = begin()
    another.begin_step(1, another.parts.denoiser)  # within the round: nothing is sampled again
    assert len(sampled) == 3 and torch.equal(another.sampled_rejected([5]), expected[5:6])


@pytest.mark.parametrize(
    "change", ["seed=1", "self_play.guidance_scale=2", "self_play.num_inference_steps=1", "compute.precision=bf16"]
)
def test_what_another_config_sampled_is_not_gone_on_with(begin, sampled, monkeypatch, change):
    with monkeypatch.context() as patched:
        killed_after(2, sampled, patched)
        killed = begin()
        with pytest.raises(KeyboardInterrupt):
            killed.begin_step(0, killed.parts.denoiser)
    changed = begin(change)
    changed.begin_step(0, changed.parts.denoiser)
    assert len(sampled) == 2 + 3


def test_what_another_snapshot_sampled_is_not_gone_on_with(begin, sampled):
    one = begin("self_play.reference=latest")
    one.begin_step(0, one.parts.denoiser)
    before = one.sampled_rejected(range(8))
    for path in one.folder.glob("snapshots/*"):  # as where a run is begun anew from other weights
        path.rename(path.with_name("gone"))
    other = begin("self_play.reference=latest")
    with torch.no_grad():
        other.parts.denoiser.conv_out.bias.add_(1)
    other.begin_step(0, other.parts.denoiser)
    assert len(sampled) == 6 and not torch.equal(other.sampled_rejected(range(8)), before)


def test_a_run_that_is_asked_to_stop_keeps_what_it_has_sampled(begin, sampled):
    stopping = begin(is_asked_to_stop=lambda: len(sampled) == 1)
    assert not stopping.begin_step(0, stopping.parts.denoiser)
    assert sampled == [[0, 1, 2]]
    again = begin()
    assert again.begin_step(0, again.parts.denoiser)
    assert sampled == [[0, 1, 2], [3, 4, 5], [6, 7, 7]]


def test_rounds_stay_until_a_checkpoint_lies_behind_them(begin, tmp_path):
    play = begin()
    rounds = tmp_path / "self_play"
    for step_number in (0, 2):
        play.begin_step(step_number, play.parts.denoiser)
    assert sorted(path.name for path in rounds.iterdir()) == ["00000", "00001"]  # a killed run begins at step 0 again
    checkpoint = tmp_path / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text("{}")
    play.begin_step(4, play.parts.denoiser)
    assert sorted(path.name for path in rounds.iterdir()) == ["00001", "00002"]
    play.close()
    assert not rounds.exists()


def test_a_disk_that_is_too_small_or_fills_up_is_said_and_nothing_sampled_is_lost(begin, sampled, monkeypatch):
    play = begin()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=8000))
        with pytest.raises(StorageError, match=r"round 1 needs 0\.00 GB more in .*self_play/00000, and .* make room"):
            play.begin_step(0, play.parts.denoiser)
    assert not sampled

    original = SelfPlay._sample

    def full(self, positions):
        if sampled:
            monkeypatch.setattr("os.fsync", no_space)
        return original(self, positions)

    def no_space(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(SelfPlay, "_sample", full)
        with pytest.raises(ValueError, match=r"could not write .*latents_00001\.npy.*[Tt]he disk is full"):
            play.begin_step(0, play.parts.denoiser)
    monkeypatch.undo()
    assert play.begin_step(0, play.parts.denoiser)


def test_opponents_are_sampled_where_the_reference_is_with_encoders_elsewhere(begin, monkeypatch):
    """`meta` stands for the GPU."""
    play = begin()
    where = []

    def see(pipeline, **_):
        where.append(pipeline._execution_device.type)
        return SimpleNamespace(images=torch.zeros(3, 4, 8, 8))

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.__call__", see)
    play.reference.to("meta")
    play._sample([0, 1, 2])
    assert where == ["meta"]


def test_guidance_is_added_in_float32_whatever_the_precision(begin, monkeypatch):
    from diffusers import DDIMScheduler

    play, original, types = begin("compute.precision=bf16"), DDIMScheduler.step, []

    def see(self, model_output, *arguments, **options):
        types.append(model_output.dtype)
        return original(self, model_output, *arguments, **options)

    monkeypatch.setattr(DDIMScheduler, "step", see)
    with play.accelerator.autocast(), torch.no_grad():
        play._sample([0, 1, 2])
    assert types == [torch.float32] * 2
