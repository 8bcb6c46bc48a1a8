"""Online pairs: rewards become pairs, rounds are made once whatever interrupts them, and training goes through them."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from tolerances import assert_same_but_for_rounding
from training_runs import assert_same_run, command, rows_of, slow_but

from xdpo.batch import Batch, LatentMoments, Tokens, join_pairs, take_pairs
from xdpo.config import ConfigError, load_config
from xdpo.feeds.online import OnlineImages, OnlinePairs
from xdpo.feeds.rewards import Choice, Moments, SampledPair, choose_pairs, mixture, optimality, shuffled

REWARDS = """
class Red:
    scale = "how red"

    def score(self, images, prompts):
        return [float(image.resize((1, 1)).getpixel((0, 0))[0]) for image in images]


class Long(Red):
    def score(self, images, prompts):
        return [float(len(prompt)) for prompt in prompts]


class Broken(Red):
    def score(self, images, prompts):
        return [float("nan")] * len(images)


class Sometimes(Red):
    def score(self, images, prompts):
        return [value if value % 2 < 1 else float("nan") for value in super().score(images, prompts)]
"""
NAN = float("nan")
ONLINE, IMAGES = ("feed.name=online_pairs",), ("feed.name=online_images", "loss.name=diffusion_nft")


# --- rewards -------------------------------------------------------------------------------------------


def test_running_moments_are_those_of_all_values_so_far_without_the_ones_that_are_not_finite():
    rounds = [np.array([1.0, 4.0, NAN]), np.array([[2.0], [8.0]]), np.array([np.inf]), np.array([-3.0])]
    moments = Moments()
    for values in rounds:
        moments = moments.with_values(values)
    everything = np.array([1.0, 4.0, 2.0, 8.0, -3.0])
    assert moments.number == 5
    assert moments.mean == pytest.approx(everything.mean(), rel=1e-14)
    assert moments.deviation == pytest.approx(everything.std(), rel=1e-14)
    assert Moments().deviation == 0


def test_rewards_are_normalised_before_they_are_added():
    scores = {"small": np.array([[0.0, 2.0]]), "large": np.array([[1000.0, 3000.0]]), "equal": np.array([[5.0, 5.0]])}
    moments = {name: Moments().with_values(values) for name, values in scores.items()}
    # (0 − 1)/1 · 1 + (1000 − 2000)/1000 · 3 = −4; a reward that was always equal adds nothing.
    assert mixture(scores, {"small": 1.0, "large": 3.0, "equal": 9.0}, moments).tolist() == [[-4.0, 4.0]]


def test_the_best_and_the_worst_image_of_a_prompt_are_its_pair_if_they_differ_by_more_than_the_margin():
    rewards = np.array([[0.1, 0.7, 0.4], [0.5, 0.5, 0.5], [0.3, NAN, 0.2], [NAN, 0.9, NAN], [0.0, 0.0, 1.0]])
    assert choose_pairs(rewards, "best_worst", 0.0) == Choice(
        [SampledPair(0, 1, 0), SampledPair(2, 0, 2), SampledPair(4, 2, 1)], skipped_prompts=2, not_finite=3
    )
    assert choose_pairs(rewards, "best_worst", 0.6).pairs == [SampledPair(4, 2, 1)]
    with pytest.raises(ValueError, match="choose from best_worst, all"):
        choose_pairs(rewards, "worst", 0.0)


def test_all_pairs_beyond_the_margin_can_be_taken():
    rewards = np.array([[0.1, 0.7, 0.4], [0.5, 0.5, NAN]])
    assert choose_pairs(rewards, "all", 0.0).pairs == [SampledPair(0, 1, 2), SampledPair(0, 1, 0), SampledPair(0, 2, 0)]
    assert choose_pairs(rewards, "all", 0.35).pairs == [SampledPair(0, 1, 0)]
    assert choose_pairs(rewards, "all", 0.35).skipped_prompts == 1


def test_an_image_is_as_good_as_its_advantage_in_deviations_of_the_round():
    rewards = np.array([[1.0, 3.0, NAN], [5.0, 5.0, 5.0], [0.0, 0.0, 6.0], [2.0, NAN, NAN]])
    # Distances from the prompts' means: −1, 1 and −2, −2, 4; their deviation over the round is √(26/5).
    deviation = np.sqrt(26 / 5)
    expected = 0.5 + 0.5 * np.array([-1, 1, -2, -2, 4]) / deviation / 5
    good = optimality(rewards, 5.0)
    assert good[[0, 0, 2, 2, 2], [0, 1, 0, 1, 2]] == pytest.approx(expected)
    assert np.isnan(good[1]).all() and np.isnan(good[3]).all() and np.isnan(good[0, 2])
    assert optimality(rewards, 0.5)[[0, 2, 2], [0, 1, 2]] == pytest.approx([0.5 - 1 / deviation, 0, 1])
    assert np.isnan(optimality(np.ones((2, 3)), 5.0)).all() and np.isnan(optimality(np.full((2, 3), NAN), 5.0)).all()


def test_a_rounds_pairs_are_shuffled_by_seed_and_round():
    pairs = [SampledPair(number, 0, 1) for number in range(20)]
    assert sorted(shuffled(pairs, 0, 0)) == pairs != shuffled(pairs, 0, 0) == shuffled(pairs, 0, 0)
    assert len({tuple(shuffled(pairs, seed, number)) for seed in (0, 1) for number in (0, 1)}) == 4


# --- batches -------------------------------------------------------------------------------------------


def batch_of(positions, stds=True):
    """A batch whose tensors say which pair they belong to: p for the chosen image, −p for the rejected one."""
    values = torch.tensor([*positions, *(-position for position in positions)], dtype=torch.float32)
    means = values.view(-1, 1, 1, 1)
    return Batch(
        positions=torch.tensor(positions),
        rows=torch.tensor(positions) * 10,
        pair_ids=[f"pair {position}" for position in positions],
        images=LatentMoments(means, means / 2 if stds else None, scaling_factor=1.0),
        captions=Tokens(input_ids=torch.tensor(positions).view(-1, 1)),
        truncated=len(positions),
        sizes=torch.cat([values.view(-1, 1)] * 4, dim=1) if stds else None,
        unreadable=list(positions),
    )


@pytest.mark.parametrize("stds", [True, False])
def test_pairs_of_two_batches_are_joined_in_the_order_of_their_positions(stds):
    whole = batch_of([3, 4, 5, 6], stds)
    joined = join_pairs([batch_of([4, 6], stds), batch_of([3, 5], stds)])
    assert joined.positions.tolist() == whole.positions.tolist() and joined.rows.tolist() == whole.rows.tolist()
    assert joined.pair_ids == whole.pair_ids and sorted(joined.unreadable) == whole.unreadable
    assert torch.equal(joined.images.means, whole.images.means) and joined.truncated == 4
    assert joined.images.stds is None if not stds else torch.equal(joined.images.stds, whole.images.stds)
    assert torch.equal(joined.captions["input_ids"], whole.captions["input_ids"])
    assert joined.sizes is None if not stds else torch.equal(joined.sizes, whole.sizes)

    taken = take_pairs(whole, [1, 3])
    assert torch.equal(taken.images.means, batch_of([4, 6]).images.means) and taken.pair_ids == ["pair 4", "pair 6"]
    pixels = take_pairs(whole._replace(images=whole.images.means), [1])
    assert pixels.images.flatten().tolist() == [4, -4]


# --- runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def online(rewards):
    """Overrides of a run with two rounds of three prompts with three images each, sampled four at a time."""
    return [
        "train.max_steps=4",
        "feed.name=online_pairs",
        "online.every=2",
        "online.prompts_per_round=3",
        "online.images_per_prompt=3",
        "online.num_inference_steps=2",
        "online.batch_size=4",
        f"online.rewards=[{rewards}:Red]",
        f"online.held_out_rewards=[{rewards}:Long]",
    ]


@pytest.fixture
def trained(monkeypatch):
    """The batches that were trained on, from round to round, with the latents of their round."""
    batches, original = [], OnlinePairs.batch

    def see(self, positions):
        batch = original(self, positions)
        batches.append((self.round_number, batch, self.samples.latents(self.round_number)))
        return batch

    monkeypatch.setattr(OnlinePairs, "batch", see)
    return batches


def test_a_run_trains_on_the_best_and_the_worst_of_its_own_images(run, online, rewards, trained):
    status, folder = run("run", *online)
    assert status == 0
    records = [json.loads((folder / "online" / f"{number:05d}.json").read_text()) for number in range(2)]
    red = [np.array(record["scores"][f"{rewards}:Red"]).reshape(3, 3) for record in records]
    assert records[0]["prompts"] != records[1]["prompts"]  # rounds go on through the captions
    assert len(trained) == 4 * 2
    for round_number, batch, _ in trained:
        for name in batch.pair_ids:
            words = name.replace(",", "").split()
            prompt, chosen, rejected = int(words[3]), int(words[5]), int(words[7])
            group = red[round_number][prompt]
            assert words[1] == str(round_number + 1) and group[chosen] == group.max() > group[rejected] == group.min()
    rounds = [row for row in rows_of(folder) if "online/items" in row]
    assert [row["step"] for row in rounds] == [1, 3]
    for row, scores, record in zip(rounds, red, records, strict=True):
        assert row[f"online/reward/{rewards}:Red"] == pytest.approx(scores.mean())
        assert row[f"online/reward_spread/{rewards}:Red"] == pytest.approx(scores.std(axis=1).mean())
        lengths = [len(prompt) for prompt in record["prompts"]]
        assert row[f"online/held_out_reward/{rewards}:Long"] == pytest.approx(np.mean(lengths))
    assert (folder / "samples" / "round_00001.png").is_file() and not (folder / "online_samples").exists()


def test_the_moments_of_a_round_are_those_of_all_rounds_so_far(run, online, rewards):
    _, folder = run("run", *online)
    records = [json.loads((folder / "online" / f"{number:05d}.json").read_text()) for number in range(2)]
    name = f"{rewards}:Red"
    so_far = np.concatenate([record["scores"][name] for record in records])
    count, mean, squares = records[1]["moments"][name]
    assert (count, mean) == (18, pytest.approx(so_far.mean())) and squares == pytest.approx(so_far.var() * 18)


def test_a_run_that_ends_within_a_round_resumes_bit_for_bit(run, online):
    _, whole = run("whole", *online)
    run("parts", *online, "train.max_steps=3", "checkpoint.every=1")
    status, parts = run("parts", *online)
    assert status == 0
    assert_same_run(whole, parts)


@pytest.mark.parametrize("place", slow_but(("_images",), ("_sample", "_images", "_write_record")))
def test_a_run_killed_while_it_makes_a_round_makes_the_rest_and_ends_the_same(run, online, monkeypatch, place):
    _, whole = run("whole", *online)
    original, calls = getattr(OnlinePairs, place), []

    def counting(self, *arguments):
        calls.append(arguments)
        if deadly and len(calls) == deadly:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(OnlinePairs, place, counting)
    deadly = {"_sample": 5, "_images": 6, "_write_record": 2}[place]  # each in the second round
    assert run("parts", *online, "checkpoint.every=2")[0] == 128 + signal.SIGINT
    deadly, made = 0, len(calls)
    status, parts = run("parts", *online, "checkpoint.every=2")
    assert status == 0
    assert_same_run(whole, parts)
    # Whatever was finished isn't made again: 3 batches a round are sampled and scored, and a sheet drawn.
    every = {"_sample": 2 * 3, "_images": 2 * 4, "_write_record": 2}[place]
    assert made + len(calls[made:]) == every + 1


@pytest.mark.slow
def test_one_process_and_two_make_the_same_rounds(run, online, small_pipeline, small_pairs, tmp_path):
    from forks import launch

    online = [*online, "train.micro_batch_pairs=1"]
    _, one = run("one", *online)
    ended = launch("train_xdpo.py", command(small_pipeline, small_pairs, tmp_path / "two", *online), processes=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, second = ((folder / "online" / "00000.json").read_bytes() for folder in (one, tmp_path / "two"))
    assert first == second
    assert_same_but_for_rounding(one, tmp_path / "two")


def test_a_share_of_the_pairs_can_be_the_datas(run, online, monkeypatch):
    from xdpo.learner import Learner

    seen, original = [], Learner.micro_step

    def see(self, batch):
        seen.extend(batch.pair_ids)
        return original(self, batch)

    monkeypatch.setattr(Learner, "micro_step", see)
    status, _ = run("run", *online, "online.offline_share=0.5", "train.total_batch_pairs=8")
    sampled = [name for name in seen if name.startswith("round ")]
    assert status == 0 and len(seen) == 32 and 8 < len(sampled) < 24


@pytest.mark.slow
def test_a_renewed_reference_is_the_policy_where_a_round_begins(run, online):
    _, folder = run("run", *online, "online.renew_reference=true", "optim.learning_rate=1e-3")
    rows = [row for row in rows_of(folder) if "margin" in row]
    assert [row["margin"] == 0 for row in rows] == [True, False] * 2
    _, fixed = run("fixed", *online, "optim.learning_rate=1e-3")
    assert [row["margin"] == 0 for row in rows_of(fixed) if "margin" in row] == [True] + [False] * 3


@pytest.mark.slow
def test_a_renewed_reference_is_resumed(run, online):
    online = [*online, "online.renew_reference=true"]
    _, whole = run("whole", *online)
    run("parts", *online, "train.max_steps=3")
    _, parts = run("parts", *online)
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_the_average_of_the_weights_can_sample_and_training_goes_on_with_the_policy(run, online):
    options = ["model.ema_decay=0.9", "optim.learning_rate=1e-2"]
    _, policy = run("policy", *online, *options)
    _, average = run("average", *online, *options, "online.sampler=average")
    records = [[json.loads(path.read_text()) for path in sorted(f.glob("online/*.json"))] for f in (policy, average)]
    assert records[0][0] == records[1][0]  # nothing has been learnt yet
    assert records[0][1]["scores"] != records[1][1]["scores"]
    _, again = run("again", *online, *options, "online.sampler=average")
    assert_same_run(average, again)


@pytest.mark.parametrize("objective", slow_but(("mapo",), ("diffusion_dpo", "ipo", "mapo", "sft")))
def test_any_objective_on_pairs_trains_online(run, online, objective):
    status, folder = run("run", *online, f"loss.name={objective}", "train.max_steps=2")
    assert status == 0 and all(np.isfinite(row["loss"]) for row in rows_of(folder) if "loss" in row)


@pytest.mark.slow
def test_cached_examples_give_the_captions(run, online, tmp_path):
    status, folder = run("run", *online, f"cache.examples={tmp_path / 'cache'}", "cache.dtype=fp32")
    _, uncached = run("uncached", *online)
    assert status == 0
    assert_same_run(uncached, folder)


def test_prompts_of_a_file_are_trained_on(run, online, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red house\na boat\na dog\na cat\n")
    status, folder = run("run", *online, f"online.prompts={tmp_path / 'prompts.txt'}")
    prompts = json.loads((folder / "online" / "00000.json").read_text())["prompts"]
    assert status == 0 and len(set(prompts)) == 3 and set(prompts) < {"a red house", "a boat", "a dog", "a cat"}


@pytest.fixture
def images_of(online):
    """Overrides of a run on single images."""
    return [*(option for option in online if "feed.name" not in option), *IMAGES]


def test_images_are_trained_on_one_by_one_each_as_good_as_its_reward(run, images_of, rewards, monkeypatch):
    batches, original = [], OnlineImages.batch

    def see(self, positions):
        batches.append((self.round_number, original(self, positions)))
        return batches[-1][1]

    monkeypatch.setattr(OnlineImages, "batch", see)
    status, folder = run("run", *images_of)
    assert status == 0 and len(batches) == 8
    for round_number, batch in batches:
        record = json.loads((folder / "online" / f"{round_number:05d}.json").read_text())
        scores = np.array(record["scores"][f"{rewards}:Red"]).reshape(3, 3)
        expected = optimality(scores, 5.0).ravel()
        names = [name for pair in zip(*(name.split(", ") for name in batch.pair_ids), strict=True) for name in pair]
        numbers = [int(name.split()[1]) for name in names]
        assert batch.single.optimality.tolist() == pytest.approx(expected[numbers], rel=1e-6)
        assert batch.single.desirable.tolist() == [bool(value > 0.5) for value in expected[numbers]]
    assert [row["online/items"] for row in rows_of(folder) if "online/items" in row] == [9, 9]


AS_PUBLISHED = "diffusion_nft loss.error_weight=self_normalized loss.kl_weight=0.1"


@pytest.mark.parametrize("objective", slow_but((AS_PUBLISHED,), (AS_PUBLISHED, "diffusion_kto")))
@pytest.mark.slow
def test_a_decayed_old_policy_can_sample_and_a_run_on_images_resumes_bit_for_bit(run, images_of, objective):
    """DiffusionNFT then also pulls to the base model, a third network."""
    moving = ["model.reference_decay=0.5", "online.sampler=reference", "optim.learning_rate=1e-2"]
    options = [*images_of, *moving, *f"loss.name={objective}".split()]
    _, whole = run("whole", *options)
    run("parts", *options, "train.max_steps=3")
    status, parts = run("parts", *options)
    assert status == 0
    assert_same_run(whole, parts)
    _, policy = run("policy", *options, "online.sampler=policy", "train.max_steps=3")
    records = [(folder / "online" / "00001.json").read_text() for folder in (whole, policy)]
    assert records[0] != records[1]


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("Broken", "no two images of a prompt differ in their reward by more than online.margin=0, .* 9 of 9 rewards"),
        ("Long", "no two images of a prompt differ .* 0 of 9 rewards are not finite.*try another reward"),
    ],
)
def test_rewards_that_give_no_pair_end_the_run_and_say_so(run, online, rewards, capsys, reward, message):
    held_out = f"online.held_out_rewards=[{rewards}:Red]"
    status, _ = run("run", *online, f"online.rewards=[{rewards}:{reward}]", held_out)
    error = capsys.readouterr().err
    assert status == 1
    assert re.search(message, error), error


def test_images_whose_reward_is_not_finite_are_in_no_pair_and_counted(run, online, rewards):
    status, folder = run("run", *online, f"online.rewards=[{rewards}:Sometimes]", "online.images_per_prompt=6")
    rounds = [row for row in rows_of(folder) if "online/items" in row]
    records = [json.loads((folder / "online" / f"{number:05d}.json").read_text()) for number in range(2)]
    assert status == 0
    for row, record in zip(rounds, records, strict=True):
        assert row["online/not_finite"] == sum(np.isnan(record["scores"][f"{rewards}:Sometimes"]))
    assert sum(row["online/not_finite"] for row in rounds) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["online.rewards=[pickscor]"], "unknown scorer 'pickscor'.*did you mean 'pickscore'"),
        (["online.rewards=[gone.py:Red]"], "no file 'gone.py'"),
        (["online.prompts=EMPTY"], "prompt set 'empty' is empty"),
    ],
)
def test_a_mistake_is_told_before_weights_are_loaded(run, online, tmp_path, monkeypatch, capsys, options, message):
    from xdpo import families

    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.setattr(families, "load_parts", lambda *_, **__: pytest.fail("weights were loaded"))
    status, _ = run("run", *online, *(option.replace("EMPTY", str(tmp_path / "empty.txt")) for option in options))
    error = capsys.readouterr().err
    assert status == 1 and re.search(message, error), error


def test_a_round_whose_images_are_gone_is_not_resumed_within(run, online, tmp_path, capsys):
    run("run", *online, "train.max_steps=3")
    shutil.rmtree(tmp_path / "run" / "online_samples")
    status, folder = run("run", *online)
    assert status == 1
    error = capsys.readouterr().err
    assert "within the round that began at step 2" in error and "remove the checkpoints after step 2" in error
    shutil.rmtree(folder / "checkpoints" / "step_00000003")
    assert run("run", *online)[0] == 0


@pytest.mark.parametrize("content", [None, "{"])
def test_a_record_that_is_gone_or_damaged_is_named(run, online, capsys, content):
    _, folder = run("run", *online, "train.max_steps=2")
    record = folder / "online" / "00000.json"
    record.unlink() if content is None else record.write_text(content)
    status, _ = run("run", *online)  # the next round is normalised by it
    error = capsys.readouterr().err
    assert status == 1 and "gone or damaged" in error and str(record) in error and "after step 0" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*ONLINE, "online.images_per_prompt=1"), "online.images_per_prompt: must be at least 2"),
        ((*ONLINE, "online.rewards=[]"), "rewards is empty"),
        ((*ONLINE, "online.reward_weights=[1, 2]"), "reward_weights has 2 numbers for 1 rewards"),
        ((*ONLINE, "online.held_out_rewards=[pickscore]"), "pickscore is named twice"),
        ((*ONLINE, "loss.name=diffusion_kto"), "feed.name=online_pairs: loss.name=diffusion_kto trains on images"),
        (("feed.name=online_images",), "feed.name=online_images: loss.name=xdpo trains on pairs"),
        ((*ONLINE, "online.sampler=reference", "model.trainable=lora"), "needs a reference with weights of its own"),
        ((*IMAGES, "online.offline_share=0.5"), "online.offline_share mixes pairs with pairs"),
        ((*ONLINE, "loss.name=seppo"), "loss.name=seppo samples its own rejected images"),
        ((*ONLINE, "loss.margin_weight=10"), "loss.margin_weight weighs the data's pairs"),
        ((*ONLINE, "cache.reference=here"), "cache.reference keeps errors on the data's pairs"),
        ((*ONLINE, "cache.examples=here", "online.prompts=p.txt"), "no text encoder for online.prompts"),
        ((*ONLINE, "online.sampler=average"), "needs model.ema_decay"),
        ((*ONLINE, "online.renew_reference=true", "loss.name=sft"), "no reference, which online.renew_reference"),
        ((*ONLINE, "online.renew_reference=true", "model.reference_decay=0.9"), "both decide what the ref"),
        (
            (*ONLINE, "online.renew_reference=true", "model.trainable=lora"),
            "online.renew_reference moves the reference",
        ),
        (("online.every=3",), "online.every is for online feeds, and feed.name is offline"),
    ],
)
def test_a_config_that_can_not_be_online_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("configs/base.yaml", overrides)


# --- families ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["small_pipeline", "sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_what_is_scored_are_the_images_that_the_families_pipeline_draws(run, online, request, monkeypatch, model):
    from xdpo import noise
    from xdpo.families import pipeline_with

    scored, expected = [], []
    sample, images = OnlinePairs._sample, OnlinePairs._images

    def draw_whole(self, numbers):
        latents = sample(self, numbers)
        pipeline = pipeline_with(self.learner.parts, self.learner.bare_policy)
        start = noise.draw_noise(self.settings.seed, numbers, self.latent_shape, stream="online")[: len(numbers)]
        drawn = pipeline(
            [self.prompts.text(number // 3) for number in numbers],
            latents=self.learner.parts.family.pack(start),
            num_inference_steps=2,
            guidance_scale=self.settings.online.guidance_scale,
            height=32,
            width=32,
        )
        expected.extend(drawn.images)
        return latents

    def see(self, *arguments):
        scored.append(images(self, *arguments))
        return scored[-1]

    monkeypatch.setattr(OnlinePairs, "_sample", draw_whole)
    monkeypatch.setattr(OnlinePairs, "_images", see)
    size = ["data.resolution=32", "train.max_steps=1", "online.prompts_per_round=4"]
    status, _ = run("run", f"model.pipeline={request.getfixturevalue(model)}", *online, *size)
    assert status == 0
    drawn = [image for batch in scored[:-1] for image in batch]  # the last ones are the sheet's
    assert len(drawn) == len(expected) == 12
    for one, other in zip(drawn, expected, strict=True):
        difference = np.abs(np.asarray(one, dtype=int) - np.asarray(other))
        assert difference.max() <= 1  # decoded one at a time: half a level may round to either side
