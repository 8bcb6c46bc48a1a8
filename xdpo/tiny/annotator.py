"""Flawed renderings, and simulated annotators who choose between two of them.

Web images do not always show what their caption says, or show it badly. `render` draws a scene with such flaws
and records how much of the caption is still true (alignment) and how clean the picture is (appeal). An
annotator's utility is a weighted sum of these and of a taste for warm colours, whatever the caption says; its
choices follow Bradley–Terry (paper Eq. 2).
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from xdpo.tiny.world import COLOURS, IMAGE_SIZE, RELATIONS, Placement, Scene, draw, place

ALIGNMENT_FLAWS = ("swapped colour", "missing object", "wrong relation")
APPEAL_FLAWS = ("washed out", "blur", "pixelation", "watermark")
LEAST_SEVERITY = 0.3  # of a flaw of appeal; 1 spoils a picture wholly

WARM_COLOURS = ("red", "orange", "yellow", "pink")

_DIAGONALS = np.add.outer(np.arange(IMAGE_SIZE), np.arange(IMAGE_SIZE))  # row + column of each pixel


@dataclass(frozen=True)
class Rendering:
    """A picture and its true attributes.

    pixels: (64, 64, 3) uint8. `shown` and `placement` are what was drawn, `flaws` what went wrong. `alignment` is the
    share of the caption's claims that hold; `appeal` is 1 for a clean picture and 0 for a spoilt one.
    """

    pixels: np.ndarray
    shown: Scene
    placement: Placement
    flaws: tuple[str, ...]
    alignment: float
    appeal: float

    @property
    def warmth(self) -> float:
        """The share of things in a warm colour."""
        return sum(thing.colour in WARM_COLOURS for thing in self.shown.things) / len(self.shown.things)


@dataclass(frozen=True)
class Annotator:
    """A simulated person: what counts how much, and how noisily it is weighed."""

    alignment_weight: float  # utility of a caption wholly true over one wholly false
    appeal_weight: float  # utility of a clean picture over a spoilt one
    warmth_weight: float  # utility of warm colours alone over cold ones alone
    temperature: float  # of the Bradley–Terry choice, in units of utility
    tie_width: float = 0.1  # utilities closer than this are a tie

    def utility(self, alignment: float, appeal: float, warmth: float) -> float:
        """The utility of a picture with these measures, each in [0, 1]."""
        return self.alignment_weight * alignment + self.appeal_weight * appeal + self.warmth_weight * warmth

    def utility_of(self, picture: Rendering) -> float:
        """The utility of a picture whose true measures are known."""
        return self.utility(picture.alignment, picture.appeal, picture.warmth)

    def choose(self, first: Rendering, second: Rendering, rng: np.random.Generator) -> float:
        """The label of `first`: 1.0 chosen, 0.0 rejected, 0.5 a tie."""
        gap = self.utility_of(first) - self.utility_of(second)
        if abs(gap) < self.tie_width:
            return 0.5
        return float(rng.random() < 1 / (1 + np.exp(-gap / self.temperature)))


ANNOTATORS = {
    "reader": Annotator(alignment_weight=5.0, appeal_weight=2.0, warmth_weight=0.0, temperature=0.42),
    "warm": Annotator(alignment_weight=1.0, appeal_weight=2.0, warmth_weight=3.0, temperature=0.42),
}


def render(scene: Scene, rng: np.random.Generator, flaws: tuple[str, ...] = ()) -> Rendering:
    """Draw `scene` with the named flaws, as far as they apply (a lone thing has no relation to get wrong)."""
    centres = place(scene, rng).centres
    drawn = dict(enumerate(zip(scene.things, centres, strict=True)))  # index in the caption → (thing, centre)
    relation_holds, appeal, applied, spoilt = True, 1.0, [], []
    for flaw in flaws:
        if flaw == "swapped colour":
            index = int(rng.choice(list(drawn)))
            thing, centre = drawn[index]
            colour = str(rng.choice([name for name in COLOURS if name != thing.colour]))
            drawn[index] = (replace(thing, colour=colour), centre)
        elif flaw == "missing object" and len(drawn) == 2:
            del drawn[int(rng.integers(2))]
            relation_holds = False
        elif flaw == "wrong relation" and scene.relation in RELATIONS and len(drawn) == 2:
            drawn = {0: (drawn[0][0], centres[1]), 1: (drawn[1][0], centres[0])}
            relation_holds = False
        elif flaw in APPEAL_FLAWS:
            severity = float(rng.uniform(LEAST_SEVERITY, 1.0))
            appeal *= 1 - severity
            spoilt.append((flaw, severity))
        else:
            continue
        applied.append(flaw)

    shown = Scene(
        tuple(thing for thing, _ in drawn.values()),
        scene.background,
        scene.relation if len(drawn) == 2 else None,
    )
    placement = Placement(tuple(centre for _, centre in drawn.values()))
    image = draw(shown, placement)
    for flaw, severity in spoilt:
        image = _spoil(image, flaw, severity, rng)
    pixels = np.clip(image * 255, 0, 255).round().astype(np.uint8)

    claims = [True, len(drawn) == len(scene.things)]  # the background, which is never wrong, and the number of things
    for index, thing in enumerate(scene.things):
        for attribute in ("shape", "colour", "size"):
            claims.append(index in drawn and getattr(drawn[index][0], attribute) == getattr(thing, attribute))
    if scene.relation:
        claims.append(relation_holds)
    return Rendering(pixels, shown, placement, tuple(applied), sum(claims) / len(claims), appeal)


def _spoil(image: np.ndarray, flaw: str, severity: float, rng: np.random.Generator) -> np.ndarray:
    """One appeal flaw, at a severity in [0, 1]."""
    if flaw == "washed out":
        share = 0.3 + 0.5 * severity
        return image * (1 - share) + 0.72 * share
    if flaw == "blur":
        picture = Image.fromarray((image * 255).round().astype(np.uint8))
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(1.2 + 1.6 * severity))) / 255
    if flaw == "pixelation":
        side, share = IMAGE_SIZE // 4, 0.4 + 0.6 * severity
        blocks = image.reshape(side, 4, side, 4, 3).mean((1, 3)).repeat(4, axis=0).repeat(4, axis=1)
        return image * (1 - share) + blocks * share
    stripes = ((_DIAGONALS + int(rng.integers(16))) % 16) < 4  # as stock-photo sellers stamp their previews
    return np.where(stripes[..., None], image * (0.75 - 0.5 * severity) + 0.75 * (0.25 + 0.5 * severity), image)


def random_flaws(rng: np.random.Generator, misaligned_share: float, spoilt_share: float) -> tuple[str, ...]:
    """One alignment flaw with probability `misaligned_share`; independently one appeal flaw with `spoilt_share`."""
    shares = ((ALIGNMENT_FLAWS, misaligned_share), (APPEAL_FLAWS, spoilt_share))
    return tuple(str(rng.choice(kinds)) for kinds, share in shares if rng.random() < share)
