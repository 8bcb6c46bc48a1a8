"""A reward model learns what pairs say, resumes, and is a scorer like the others."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
import train_reward_model as program
from conftest import encoded_image, forget_accelerators, pick_a_pic_row, write_pick_a_pic
from PIL import Image
from safetensors.torch import load_file
from tiny_base.images import draw
from train_tiny_clip import (
    WRONG_CLAIMS,
    contrastive,
    full_caption,
    ranked,
    save_clip,
    similarities,
    small_clip,
    wrong_captions,
)
from training_runs import ROOT, SMALL_RUN
from transformers import CLIPModel

from xdpo import runs
from xdpo.scorers.loading import load_scorer, scorer_version
from xdpo.scorers.reward_model import RewardModel
from xdpo.tiny import world

REDS, BLUES = ["red", "crimson", "tomato", "salmon"], ["blue", "navy", "royalblue", "teal"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Sixteen pairs for training and as many held out, of which the red image is preferred; four prompts."""
    rows = [
        pick_a_pic_row(number, jpg_0=encoded_image(red), jpg_1=encoded_image(blue), caption=f"a photo of {number % 4}")
        for number, (red, blue) in enumerate((red, blue) for red in REDS for blue in BLUES)
    ]
    return write_pick_a_pic(tmp_path_factory.mktemp("reward") / "pairs.parquet", rows)


@pytest.fixture(scope="module")
def base(small_pipeline, tmp_path_factory):
    """A folder of a small CLIP with random weights, in half precision, as published ones may be."""
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "clip"
    save_clip(*small_clip(CLIPTokenizer.from_pretrained(small_pipeline, subfolder="tokenizer"), 16), folder)
    return folder


@pytest.fixture
def train(pairs, small_pipeline, base, tmp_path, monkeypatch):
    """Train in this process: train("name", argument, …) → (exit status, output folder)."""
    monkeypatch.chdir(ROOT)

    def call(name, *arguments):
        forget_accelerators()
        output = tmp_path / name
        paths = [f"model.pipeline={small_pipeline}", f"data.path={pairs}", "output_dir=none", f"eval.path={pairs}"]
        options = ["--config", "configs/base.yaml", *SMALL_RUN, *paths, "--output", str(output)]
        given = {"--base": str(base), "--steps": "6", "--batch": "4", "--learning-rate": "3e-3"}
        given |= {"--checkpoint-every": "3", "--warmup-steps": "1"}
        overrides = [word for word in arguments if "=" in word]
        flags = [word for word in arguments if "=" not in word]
        given |= dict(zip(flags[::2], flags[1::2], strict=True))
        return program.main([*options, *overrides, *(word for item in given.items() for word in item)]), output

    return call


def weights_of(folder):
    return load_file(runs.finished_checkpoints(folder)[-1] / "policy.safetensors")


def test_it_learns_which_image_is_preferred_and_scores_as_evaluate_does(train, capsys):
    status, folder = train("run", "--steps", "40", "--checkpoint-every", "40")
    record = json.loads((folder / "reward_model" / "reward_model.json").read_text())
    assert status == 0 and record["held_out"]["accuracy"] == 1.0 and record["held_out"]["pairs"] == 16
    assert record["held_out"]["interval"][1] == 1.0 and "100.0%" in capsys.readouterr().out
    assert {weight.dtype for weight in weights_of(folder).values()} == {torch.float32}  # the base's file has float16

    scorer = load_scorer(str(folder / "reward_model"))
    images = [Image.new("RGB", (20, 24), colour) for colour in ("darkred", "darkblue")]
    red, blue = scorer.score(images, ["a photo of 1"] * 2)
    assert red > blue and "100.0% of held-out pairs" in scorer.scale
    assert scorer.version == scorer_version(str(folder / "reward_model"))


def test_its_loss_is_bradley_terrys_by_hand_and_a_tie_is_half_of_it_in_either_direction():
    margin, weights = torch.tensor([0.0, 2.0, -1.0, 2.0]), torch.tensor([1.0, 0.5, 1.5, 2.0])
    tied = torch.tensor([False, False, False, True])
    won, lost = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    expected = (math.log(2) + 0.5 * won + 1.5 * math.log(1 + math.exp(1)) + 2.0 * (won + lost) / 2) / 4
    assert program.bradley_terry(margin, tied, weights).item() == pytest.approx(expected, rel=1e-6)
    # PickScore's code: the cross-entropy of the two logits with the labels (½, ½).
    logits, halves = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    cross_entropy = torch.nn.functional.cross_entropy(logits, halves).item()
    assert program.bradley_terry(margin[3:], tied[3:], torch.ones(1)).item() == pytest.approx(cross_entropy, rel=1e-6)


def test_a_tie_pulls_its_two_rewards_together():
    margin = torch.tensor([2.0, 0.0, -2.0], requires_grad=True)
    program.bradley_terry(margin, torch.tensor([True] * 3), torch.ones(3)).backward()
    # (½ − σ(−m))/3 for each
    assert margin.grad.tolist() == pytest.approx([(0.5 - 1 / (1 + math.exp(m))) / 3 for m in (2, 0, -2)], abs=1e-7)


def test_ties_are_trained_on_and_not_counted_in_the_accuracy(train, tmp_path, monkeypatch, capsys):
    seen, bradley_terry = [], program.bradley_terry

    def see_loss(margin, tied, weights):
        seen.append((tied, weights))
        return bradley_terry(margin, tied, weights)

    monkeypatch.setattr(program, "bradley_terry", see_loss)
    tie = {"label_0": 0.5, "label_1": 0.5}
    rows = [pick_a_pic_row(number, caption="often" if number < 6 else "once") for number in range(7)]
    rows += [pick_a_pic_row(7, caption="often", **tie)]
    path = write_pick_a_pic(tmp_path / "ties.parquet", rows)
    status, folder = train("run", f"data.path={path}", f"eval.path={path}", "--steps", "2")
    assert status == 0 and "8 pairs to train on, 1 of them ties; 7 held out" in capsys.readouterr().out
    # Two prompts of seven pairs and one: 8/2 times 1/7 and 1.
    tied, weights = (torch.cat(column) for column in zip(*seen, strict=True))
    assert tied.tolist().count(True) == 1 and weights[tied].tolist() == pytest.approx([4 / 7])
    assert sorted(weights.tolist()) == pytest.approx([4 / 7] * 7 + [4.0])
    record = json.loads((folder / "reward_model" / "reward_model.json").read_text())
    assert record["held_out"]["pairs"] == 7


def test_the_first_step_goes_down_that_loss(train, monkeypatch):
    """The loss of a step is that of the rewards of its own images, the preferred ones first."""
    seen, rewards_of, bradley_terry = [], program.rewards_of, program.bradley_terry

    def see_rewards(*arguments):
        seen.append(rewards_of(*arguments))
        return seen[-1]

    def see_loss(margin, tied, weights):
        seen.append((margin, weights))
        return bradley_terry(margin, tied, weights)

    monkeypatch.setattr(program, "rewards_of", see_rewards)
    monkeypatch.setattr(program, "bradley_terry", see_loss)
    assert train("run", "--steps", "1")[0] == 0
    (chosen, rejected), (margin, weights) = seen[:2]
    assert torch.equal(margin, chosen - rejected) and torch.equal(weights, torch.ones(4))  # four pairs of each prompt


def test_unreadable_pairs_are_counted_and_too_many_end_it(train, tmp_path, capsys):
    rows = [pick_a_pic_row(number, jpg_0=b"no image") for number in range(4)]
    rows += [pick_a_pic_row(number, jpg_1=encoded_image(BLUES[number % 4])) for number in range(4, 8)]
    path = write_pick_a_pic(tmp_path / "damaged.parquet", rows)
    status, _ = train("run", f"data.path={path}")
    assert (
        status == 1
        and "pairs read have unreadable images, more than data.max_unreadable_share" in capsys.readouterr().err
    )
    assert train("allowed", f"data.path={path}", "data.max_unreadable_share=1")[0] == 0


def test_the_folder_of_another_training_is_not_gone_on_with(train, capsys):
    train("run", "--steps", "3")
    status, _ = train("run", "--steps", "3", "--learning-rate", "1e-4")
    assert status == 1 and "holds another training (learning_rate: 0.003 → 0.0001)" in capsys.readouterr().err
    assert train("run", "--steps", "3")[0] == 0  # measured and written again


def test_prompts_with_many_pairs_weigh_less():
    class Table:
        def captions(self):
            return ["often", "often", "often", "once"]

    weights = program.RewardPairs(Table(), None, range(4)).weights
    assert weights == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0]) and sum(weights) / 4 == pytest.approx(1)


def test_a_training_that_was_stopped_resumes_bit_for_bit(train, monkeypatch):
    _, whole = train("whole")
    original, calls = program.rewards_of, []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(program, "rewards_of", dying)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
    status, parts = train("parts")
    first, second = weights_of(whole), weights_of(parts)
    assert status == 0 and all(torch.equal(first[name], second[name]) for name in first)


def test_a_head_is_trained_on_frozen_embeddings(train, tmp_path):
    _, base = train("base")
    before = load_file(base / "reward_model" / "model.safetensors")
    status, folder = train("head", "--base", str(base / "reward_model"), "--recipe", "head")
    after = load_file(folder / "reward_model" / "model.safetensors")
    assert status == 0 and all(torch.equal(before[name], after[name]) for name in before)
    assert set(weights_of(folder)) == {
        f"head.{layer}.{kind}" for layer in ("hidden", "output") for kind in ("weight", "bias")
    }
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    assert len(set(load_scorer(str(folder / "reward_model")).score(images, ["a photo of 1"] * 2))) == 2


def test_a_reward_model_is_the_cosine_of_the_library():
    from transformers import CLIPConfig

    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 19, **layers}
    vision = {"image_size": 8, "patch_size": 4, **layers}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    pixels, ids = torch.randn(2, 3, 3, 8, 8), torch.tensor([[1, 2, 19, 0], [3, 4, 5, 19], [6, 19, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        rewards = RewardModel(clip, "clip").eval()(pixels, ids, mask)
        for side in (0, 1):
            whole = clip(input_ids=ids, attention_mask=mask, pixel_values=pixels[side])
            torch.testing.assert_close(rewards[side], whole.logits_per_image.diagonal())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "gone/clip"), "no CLIP in transformers' format at gone/clip"),
        (("--learning-rate", "-1"), "--learning-rate must be above 0, got -1.0"),
        (("--learning-rate", "1e30"), "the loss is not finite; try a smaller --learning-rate"),
    ],
)
def test_what_can_not_be_trained_is_said(train, capsys, arguments, message):
    status, folder = train("run", *arguments)
    assert status == 1 and message in capsys.readouterr().err and not (folder / "reward_model").exists()


def test_a_damaged_reward_model_is_named(train):
    _, folder = train("run")
    (folder / "reward_model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="reward_model"):
        load_scorer(str(folder / "reward_model"))


def test_a_clip_is_taught_by_the_two_cross_entropies_of_its_scaled_cosines(base):
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32).eval()
    pixels, ids = torch.rand(3, 3, 16, 16), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(20))
        logits = similarities(clip, pixels, ids)
        torch.testing.assert_close(logits, clip(input_ids=ids, pixel_values=pixels).logits_per_image)
        clip.logit_scale.fill_(math.log(200))
        torch.testing.assert_close(similarities(clip, pixels, ids), 5 * logits)  # 100 at most
    of_two = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows, columns = math.log(1 + math.exp(-2)), (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))) / 2
    assert contrastive(of_two).item() == pytest.approx((rows + columns) / 2)
    with_wrong = torch.tensor([[2.0, 0.0, 1.5], [1.0, 3.0, -1.0]])  # a wrong caption, which belongs to no image
    rows = (math.log(1 + math.exp(-2) + math.exp(-0.5)) + math.log(1 + math.exp(-2) + math.exp(-4))) / 2
    assert contrastive(with_wrong).item() == pytest.approx((rows + columns) / 2)


def test_wrong_captions_are_ranked_by_the_likelihood_of_plackett_and_luce():
    ranks = torch.tensor([[3.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    first = math.log(1 + math.exp(-2) + math.exp(-2.5)) + math.log(1 + math.exp(-0.5))
    assert ranked(ranks).item() == pytest.approx((first + math.log(3) + math.log(2)) / 2)


def test_the_captions_of_the_clip_say_what_is_shown_and_wrong_ones_differ_in_more_and_more_claims():
    _, captions = draw(0, seed=0, misaligned_share=0, describe=full_caption)
    flaws = Counter(claims(caption)[-1] for caption in captions)
    assert len(flaws) == 13 and 350 < flaws[None] < 450
    rng, changed = np.random.default_rng(0), Counter()
    for caption in captions:
        before = right = claims(caption)
        for wrong, number in zip(wrong_captions(caption, rng), WRONG_CLAIMS, strict=True):
            differ = [index for index, claim in enumerate(claims(wrong)) if claim != right[index]]
            assert len(differ) == number, (caption, wrong)
            assert {index for index, claim in enumerate(before) if claim != right[index]} < set(differ)
            before = claims(wrong)
            changed.update(differ)
    assert set(changed) == set(range(9))


def claims(caption):
    """What a full caption says: the flaw last."""
    text, flaw = re.fullmatch(r"(.*?)(?:, ((?:slight|clear|strong) .*))?", caption).groups()
    scene = world.parse(text)
    things = [claim for thing in scene.things for claim in (thing.shape, thing.colour, thing.size)]
    return [scene.background, *things, *([scene.relation] if scene.relation in world.RELATIONS else []), flaw]
