"""Statistics of pixels against known images and other implementations, and the panel on reward hacking."""

import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv
from PIL import Image
from scipy import ndimage
from scored_images import rows_of

from xdpo.report import curves, hacking
from xdpo.scores.image_statistics import distance, measure
from xdpo.scores.results import benchmarks_of


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def grey(luma):
    """Luma from 0 to 1 → pixels."""
    return np.repeat(np.round(255 * luma).astype(np.uint8)[..., None], 3, axis=2)


def wave(cycles_per_pixel):
    return grey(np.tile(0.5 + 0.5 * np.cos(2 * np.pi * cycles_per_pixel * np.arange(80)), (80, 1)))


def test_saturation_is_that_of_hsv(noise):
    assert measure(noise)["saturation"] == pytest.approx(rgb_to_hsv(noise / 255)[..., 1].mean(), abs=1e-6)
    assert measure(np.full((4, 4, 3), (255, 0, 0), np.uint8))["saturation"] == 1
    assert measure(np.zeros((4, 4, 3), np.uint8))["saturation"] == 0


def test_contrast_and_sharpness_are_those_of_pillows_grey_and_scipys_laplacian(noise):
    luma = np.asarray(Image.fromarray(noise).convert("L"), np.float64) / 255  # rounded to a byte
    assert measure(noise)["contrast"] == pytest.approx(luma.std(), abs=0.002)
    assert measure(noise)["sharpness"] == pytest.approx(ndimage.laplace(luma, mode="nearest").std(), rel=0.01)


def test_high_frequencies_are_the_fine_waves_share_of_the_variance():
    assert measure(wave(0.4))["high frequencies"] == pytest.approx(1, abs=0.001)
    assert measure(wave(0.1))["high frequencies"] == pytest.approx(0, abs=0.001)
    both = (wave(0.4).astype(int) + wave(0.1)) // 2
    assert measure(both.astype(np.uint8))["high frequencies"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("width", [30, 31])
def test_the_fine_share_is_that_of_the_whole_spectrum(noise, width):
    pixels = np.pad(noise, ((0, 0), (0, 1), (0, 0)), mode="reflect")[:, :width]
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    power = np.abs(np.fft.fft2(luma - luma.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(40)[:, None], np.fft.fftfreq(width))
    assert measure(pixels)["high frequencies"] == pytest.approx(power[frequency > 0.25].sum() / power.sum(), abs=1e-5)


def test_an_image_of_one_colour_has_no_contrast_and_no_detail():
    found = measure(np.full((9, 7, 3), 77, np.uint8))
    assert {name: round(value, 6) for name, value in found.items()} == dict.fromkeys(found, 0)


def test_the_distance_is_of_channels_from_0_to_1_and_of_images_of_any_size():
    first, second = (Image.new("RGB", (8, 8), (value, value, value)) for value in (51, 102))
    assert distance(first, second) == pytest.approx(0.2)
    assert distance(first.resize((20, 12)), second) == pytest.approx(0.2)
    assert distance(first, first) == 0


def panel(trained_on=("clip",)):
    """The reward `clip` rises by two standard deviations, `hpsv2` falls by one, saturation rises by half of one."""
    base = {0: 1.0, 1: 3.0}  # mean 2, standard deviation 1
    moved = {"clip": 2.0, "hpsv2": -1.0, "saturation": 0.5}

    def benchmark(*names):
        rows = []
        for name in names:
            model = {number: value + moved[name] for number, value in base.items()}
            rows += rows_of({"sd15": base, "xdpo@1": model, "xdpo": model}, scorer=name)
        return benchmarks_of(rows, ["sd15", "xdpo@1", "xdpo"], names)[0]

    return hacking.Panel(benchmark("clip", "hpsv2"), benchmark("saturation"), "sd15", trained_on)


def test_a_sentence_sets_what_training_used_against_what_it_did_not():
    assert hacking.in_words(panel())[::2] == (
        "Changes against sd15, in standard deviations over its prompts.",
        "xdpo: rewards trained on +2.00, other rewards −1.00, saturation +0.50. What it was trained on rises, and no "
        "other reward does.",
    )
    assert hacking.in_words(panel(("hpsv2",)))[2].endswith("other rewards +2.00, saturation +0.50.")
    assert hacking.in_words(panel(()))[2] == "xdpo: rewards +0.50, saturation +0.50."


def test_the_panel_has_a_part_for_each_group_and_one_for_each_run():
    points = [(curves.Progress(pairs, 0.0), name) for pairs, name in ((0, "sd15"), (10, "xdpo@1"), (20, "xdpo"))]
    figure = hacking.draw(panel(), [curves.Curve("xdpo", tuple(points))])
    figure.canvas.draw()
    assert [axes.get_title("left") for axes in figure.axes] == [
        "rewards trained on",
        "other rewards",
        "image statistics",
        "xdpo",
    ]
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[-1].lines[:3]}
    assert lines == {"rewards trained on": [0, 2, 2], "other rewards": [0, -1, -1], "saturation": [0, 0.5, 0.5]}
