"""The embedded world: what captions claim, what flaws do to them, what the annotator and the judges make of it."""

import re
from collections import Counter
from pathlib import Path

import make_tiny_pairs
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_base.captions import clip_tokenizer
from tiny_base.images import draw
from tiny_base.stages import Stage
from tolerances import ELEMENT

from xdpo.config import ModelConfig
from xdpo.families import check_model, family_of_pipeline
from xdpo.runlog import read_rows
from xdpo.scorers.loading import load_scorer
from xdpo.tiny import world
from xdpo.tiny.annotator import ANNOTATORS, APPEAL_FLAWS, Rendering, random_flaws, render
from xdpo.tiny.judges import HEADS, LAYOUTS, AttributeReader, Judge, alignment, labels_of
from xdpo.tiny.world import Placement, Scene, Thing

PAIRS = Path(__file__).parent.parent / "assets" / "tiny" / "pairs"
STAR_ABOVE_CIRCLE = Scene((Thing("star", "red", "small"), Thing("circle", "blue", "large")), "white", "above")


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [world.random_scene(rng) for _ in range(count)]


def test_captions_read_as_english_and_parse_back_to_their_scene():
    assert world.caption(STAR_ABOVE_CIRCLE) == "a small red star above a large blue circle on a white background"
    for index, scene in enumerate(scenes(300)):
        assert world.parse(world.caption(scene, index)) == scene


def test_text_outside_the_grammar_is_refused_with_an_example():
    with pytest.raises(ValueError, match="an example that is: 'a small red star"):
        world.parse("a photo of a dog")


def test_placements_fulfil_their_relation_and_keep_things_inside():
    rng = np.random.default_rng(0)
    for scene in scenes(300):
        placement = world.place(scene, rng)
        for thing, (x, y) in zip(scene.things, placement.centres, strict=True):
            reach = 0.9 * world.SIZES[thing.size]
            assert reach - 1 <= min(x, y) and max(x, y) <= world.IMAGE_SIZE - reach + 1
        if scene.relation in world.RELATIONS:
            (x0, y0), (x1, y1) = placement.centres
            holds = {"above": y0 < y1, "below": y0 > y1, "to the left of": x0 < x1, "to the right of": x0 > x1}
            assert holds[scene.relation]


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_shape_is_drawn_in_its_colour_and_covers_more_when_large(shape):
    def ink(size):
        scene = Scene((Thing(shape, "red", size),), "white")
        image = world.draw(scene, Placement(((32.0, 32.0),)))
        assert image.shape == (64, 64, 3) and image.min() >= 0 and image.max() <= 1
        red = np.array(world.COLOURS["red"]) / 255
        assert abs(image - red).sum(axis=2).min() < 0.02, "some pixel is wholly red"
        return (abs(image - np.array(world.BACKGROUNDS["white"]) / 255).sum(axis=2) > 0.1).sum()

    assert 40 < ink("small") < 0.7 * ink("large")


def test_training_never_meets_a_held_out_scene_or_combination():
    rng = np.random.default_rng(3)
    for _ in range(500):
        scene = world.training_scene(rng)
        assert not world.is_held_out(scene)
        assert all((thing.colour, thing.shape) not in world.UNSEEN_COMBINATIONS for thing in scene.things)


def test_tinyprompts_are_two_hundred_distinct_held_out_prompts_in_four_categories():
    rows = world.tiny_prompts()

    assert Counter(category for category, _ in rows) == dict.fromkeys(world.PROMPT_CATEGORIES, 50)
    assert len({prompt for _, prompt in rows}) == 200
    for category, prompt in rows:
        scene = world.parse(prompt)
        assert world.is_held_out(scene)
        assert (len(scene.things) == 1) == (category == "single object") or category == "unseen combination"


def test_the_shipped_pairs_keep_training_and_prompts_apart():
    train, test = (pq.read_table(PAIRS / f"{split}.parquet").to_pydict() for split in ("train", "test"))

    assert not any(world.is_held_out(world.parse(caption)) for caption in train["caption"])
    assert all(world.is_held_out(world.parse(caption)) for caption in test["caption"])
    assert set(train["label_0"]) == {0.0, 0.5, 1.0}
    assert all(a + b == 1 for a, b in zip(train["label_0"], train["label_1"], strict=True))
    assert sum(path.stat().st_size for path in PAIRS.iterdir()) < 5e6


# --- flaws and annotator -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flaw", "share_that_holds"),
    [
        (None, 9 / 9),
        ("swapped colour", 8 / 9),  # one colour of: background, number, relation, 2 × (shape, colour, size)
        ("wrong relation", 8 / 9),
        ("missing object", 4 / 9),  # background and three attributes are left
        ("blur", 9 / 9),
    ],
)
def test_alignment_is_the_share_of_claims_that_hold(flaw, share_that_holds):
    rendering = render(STAR_ABOVE_CIRCLE, np.random.default_rng(0), (flaw,) if flaw else ())

    assert rendering.alignment == pytest.approx(share_that_holds)
    assert (rendering.appeal == 1) == (flaw != "blur")


def test_a_flaw_that_does_not_apply_changes_nothing():
    alone = Scene((Thing("star", "red", "small"),), "white")
    rendering = render(alone, np.random.default_rng(0), ("wrong relation", "missing object"))

    assert rendering.flaws == () and rendering.alignment == 1


def test_flaws_change_the_picture_as_they_say():
    clean, washed, swapped = (
        render(STAR_ABOVE_CIRCLE, np.random.default_rng(1), flaws).pixels.astype(float)
        for flaws in ((), ("washed out",), ("swapped colour",))
    )
    assert washed.std() < 0.85 * clean.std()
    assert abs(swapped - clean).max() > 50


@pytest.mark.parametrize("flaw", APPEAL_FLAWS)
def test_every_appeal_flaw_shows_and_is_the_same_for_the_same_seed(flaw):
    clean, spoilt, again = (
        render(STAR_ABOVE_CIRCLE, np.random.default_rng(1), flaws).pixels.astype(float)
        for flaws in ((), (flaw,), (flaw,))
    )
    assert (abs(spoilt - clean).max(axis=2) > 12).mean() > 0.02
    assert (spoilt == again).all()


def test_alignment_flaws_and_appeal_flaws_come_independently_at_their_rates():
    rng = np.random.default_rng(0)
    drawn = [random_flaws(rng, 0.3, 0.6) for _ in range(4000)]
    misaligned, spoilt = (
        np.array([any((flaw in APPEAL_FLAWS) == appeal for flaw in flaws) for flaws in drawn])
        for appeal in (False, True)
    )
    assert misaligned.mean() == pytest.approx(0.3, abs=0.03) and spoilt.mean() == pytest.approx(0.6, abs=0.03)
    assert (misaligned & spoilt).mean() == pytest.approx(0.18, abs=0.03)


def rendering(alignment, appeal, scene=STAR_ABOVE_CIRCLE):
    return Rendering(np.zeros((64, 64, 3), np.uint8), scene, Placement(()), (), alignment, appeal)


def test_an_annotator_prefers_the_better_picture_errs_sometimes_and_calls_near_equals_a_tie():
    reader, rng = ANNOTATORS["reader"], np.random.default_rng(0)
    good, bad, nearly = rendering(1, 1), rendering(8 / 9, 1), rendering(1, 1 - 0.4 * 0.1 / 2)
    share = np.mean([reader.choose(good, bad, rng) for _ in range(2000)])
    assert share == pytest.approx(1 / (1 + np.exp(-(5 / 9) / 0.42)), abs=0.03)
    assert reader.choose(good, nearly, rng) == 0.5


def test_the_warm_annotator_takes_the_wrong_colour_where_it_is_warm():
    scene = Scene((Thing("star", "blue", "small"),), "white")
    right = rendering(1, 1, scene)
    warm = rendering(4 / 5, 1, Scene((Thing("star", "red", "small"),), "white"))

    assert right.warmth == 0 and warm.warmth == 1 and rendering(1, 1).warmth == 0.5
    for name, prefers_warm in (("reader", False), ("warm", True)):
        annotator = ANNOTATORS[name]
        assert (annotator.utility_of(warm) > annotator.utility_of(right)) == prefers_warm


# --- judges --------------------------------------------------------------------------------------------------


def certain(scene, placement):
    """Probabilities of a judge that is sure of the truth; things it doesn't see are spread evenly."""
    labels = labels_of(scene, placement)
    return {
        name: np.eye(len(values))[labels[name]] if labels[name] >= 0 else np.full(len(values), 1 / len(values))
        for name, values in HEADS.items()
    }


def test_a_judge_that_sees_the_truth_scores_as_the_annotator_counts():
    rng = np.random.default_rng(5)
    for scene in scenes(200, seed=4):
        rendering = render(scene, rng, random_flaws(rng, 0.5, 0.5))
        judged = alignment(scene, certain(rendering.shown, rendering.placement))
        lenient = {"wrong relation", "swapped colour"} <= set(rendering.flaws)  # either reading may then be the better
        assert judged == pytest.approx(rendering.alignment) or (lenient and judged >= rendering.alignment)


def test_labels_go_from_left_to_right_and_from_top_to_bottom():
    labels = labels_of(STAR_ABOVE_CIRCLE, Placement(((32.0, 48.0), (32.0, 16.0))))  # drawn the wrong way round

    assert LAYOUTS[labels["layout"]] == "vertical"
    assert HEADS["shape0"][labels["shape0"]] == "circle" and HEADS["colour1"][labels["colour1"]] == "red"


def test_the_shipped_judges_agree_with_the_truth_on_new_scenes_flaws_included():
    rng = np.random.default_rng(77)
    drawn = [(scene, render(scene, rng, random_flaws(rng, 0.4, 0.4))) for scene in scenes(600, seed=78)]
    images = [Image.fromarray(rendering.pixels) for _, rendering in drawn]
    prompts = [world.caption(scene) for scene, _ in drawn]

    for network in ("", "heldout_"):
        judged = {
            name: np.array(load_scorer(f"tiny_{network}{name}").score(images, prompts))
            for name in ("alignment", "appeal", "warmth")
        }
        for name, scores in judged.items():
            truth = np.array([getattr(rendering, name) for _, rendering in drawn])
            assert abs(scores - truth).mean() < 0.05
            assert np.corrcoef(scores, truth)[0, 1] > 0.95
        for scorer, annotator in (("reward", "reader"), ("warm_reward", "warm")):
            rewards = load_scorer(f"tiny_{network}{scorer}").score(images, prompts)
            measured = list(zip(*judged.values(), strict=True))
            assert rewards == pytest.approx([ANNOTATORS[annotator].utility(*measures) for measures in measured])


def test_a_judge_takes_images_of_any_size_and_mode_and_scores_one_by_one_as_in_a_batch():
    scene = Scene((Thing("square", "green", "large"),), "grey")
    image = Image.fromarray(render(scene, np.random.default_rng(0)).pixels)
    large = image.resize((256, 256), Image.Resampling.NEAREST).convert("RGBA")
    judge, prompt = load_scorer("tiny_reward"), world.caption(scene)

    one, other = judge.score([image, large], [prompt, prompt])
    rounding = 7 * ELEMENT  # the reward is 5 times one output and 2 times another
    assert one == pytest.approx(other, abs=rounding)
    assert judge.score([image], [prompt])[0] == pytest.approx(one, abs=rounding)


def test_a_missing_judge_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("scripts/train_tiny_judge.py")):
        Judge("reward", weights=tmp_path / "nothing.safetensors")


def test_the_reader_has_one_answer_per_head():
    outputs = AttributeReader()(torch.zeros(2, 3, 64, 64))

    assert {name: outputs[name].shape for name in HEADS} == {name: (2, len(values)) for name, values in HEADS.items()}
    assert outputs["appeal"].shape == (2,)


def test_the_shipped_base_is_a_small_stable_diffusion_pipeline_that_follows_its_captions():
    from diffusers import StableDiffusionPipeline

    from xdpo.sampling.images import sample_images

    folder = PAIRS.parent / "pipeline"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12e6
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt for _, prompt in world.tiny_prompts()[::9]]
    images = sample_images(
        pipeline, prompts, seed=0, num_inference_steps=10, guidance_scale=4.0, chunk_size=len(prompts)
    )
    right = np.mean(load_scorer("tiny_alignment").score(images, prompts))
    wrong = np.mean(load_scorer("tiny_alignment").score(images, prompts[::-1]))
    assert right > wrong + 0.15


# --- how the bases are trained -----------------------------------------------------------------------------


def test_a_stage_goes_on_where_it_was_stopped_and_another_number_of_steps_changes_nothing_before_its_decay(tmp_path):
    def train(folder, steps, until, saved_at=None):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        folder.mkdir(exist_ok=True)
        stage = Stage(
            "small",
            module,
            lambda inputs: (module(inputs) - inputs).square().mean(),
            folder,
            steps,
            learning_rate=1e-2,
            decay=0.25,
        )
        while stage.step < until:
            stage.take_step(torch.randn(8, 4, generator=torch.Generator().manual_seed(stage.step)))
            stage.log(loss=stage.smoothed)
            if stage.step == saved_at:
                stage.save()
        return stage

    whole = train(tmp_path / "whole", steps=12, until=12)
    train(tmp_path / "stopped", steps=1000, until=8, saved_at=6)  # two steps are in its log and not in its checkpoint
    resumed = train(tmp_path / "stopped", steps=12, until=12)
    assert resumed.smoothed == whole.smoothed
    logs = [[(row["step"], row["loss"]) for row in read_rows(stage.log_path)] for stage in (whole, resumed)]
    assert logs[0] == logs[1]
    for one, other in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert all(map(torch.equal, whole.ema.shadow_params, resumed.ema.shadow_params))


def test_the_clip_tokenizer_of_a_base_has_a_token_for_every_word_and_is_the_same_every_time():
    captions = draw(0, seed=0)[1]
    tokenizer = clip_tokenizer(captions)
    words = {word for caption in captions for word in caption.replace(",", " ,").split()}
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    assert clip_tokenizer(captions[::-1]).get_vocab() == tokenizer.get_vocab()
    assert tokenizer.decode(tokenizer("An été, 漢字!").input_ids, skip_special_tokens=True) == "an été , 漢字 !"


def test_a_part_of_the_training_set_depends_on_the_seed_and_its_number_alone():
    images, captions = draw(3, seed=0)
    again, _ = draw(3, seed=0)
    others, _ = draw(4, seed=0)
    assert np.array_equal(images, again) and not np.array_equal(images, others)
    assert not any(world.is_held_out(world.parse(caption)) for caption in captions)


def test_the_shipped_test_pairs_are_drawn_again_with_their_utilities():
    rows, gaps, _ = make_tiny_pairs.draw_pairs(300, 8, make_tiny_pairs.held_out_scene, ANNOTATORS["reader"])
    labels = np.array([row["label_0"] for row in rows])
    shipped = pq.read_table(PAIRS / "test.parquet", columns=["caption", "label_0"]).to_pylist()
    assert shipped == [{name: row[name] for name in ("caption", "label_0")} for row in rows]
    assert np.array_equal(np.abs(gaps) < ANNOTATORS["reader"].tie_width, labels == 0.5)
    agree, oppose = make_tiny_pairs.agreement(gaps, rows), make_tiny_pairs.agreement(-gaps, rows)
    assert np.array_equal(agree, 1 - oppose) and len(agree) == 267 and agree.mean() > 0.85
    assert make_tiny_pairs.agreement(labels - 0.5, rows).all()


def test_scorers_are_ranked_beside_the_utility_of_the_pairs(monkeypatch, capsys, tmp_path):
    arguments = ["make_tiny_pairs.py", "--test", "40", "--out", str(tmp_path / "none"), "--rank"]
    monkeypatch.setattr("sys.argv", [*arguments, "tiny_reward"])
    make_tiny_pairs.main()
    first, second = capsys.readouterr().out.splitlines()
    assert re.match(r"\d\d choices; with the noiseless utility agree \d\d\.\d% \[", first)
    assert re.match(r"tiny_reward \d\d\.\d% \[.*\], minus the utility's [+-]\d\.\d% \[", second)
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr("sys.argv", [*arguments, "tiny_rewards"])
    with pytest.raises(SystemExit, match="2"):
        make_tiny_pairs.main()
    assert "unknown scorer 'tiny_rewards'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"), [("pipeline", "Stable Diffusion 1.x and 2.x"), ("flow_pipeline", "Stable Diffusion 3 and 3.5")]
)
def test_the_shipped_bases_fit_their_families_and_the_repository(name, kind):
    folder = PAIRS.parent / name
    check_model(ModelConfig(pipeline=str(folder)))
    assert family_of_pipeline(ModelConfig(pipeline=str(folder))).name == kind
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8.3e6


def test_all_assets_stay_small():
    assert sum(path.stat().st_size for path in PAIRS.parents[1].rglob("*") if path.is_file()) < 24e6
