"""Flawed renderings, and a simulated annotator who chooses between two of them.

Web images do not always show what their caption says, or show it badly. `render` draws a scene with such flaws
and records how much of the caption is still true (alignment) and how clean the picture is (appeal). The
annotator's utility is a weighted sum of the two; its choices follow Bradley–Terry (paper Eq. 2).
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from xdpo.tiny.world import COLOURS, RELATIONS, Placement, Scene, draw, place

ALIGNMENT_FLAWS = ("swapped colour", "missing object", "wrong relation")
APPEAL_FLAWS = ("washed out", "blur", "speckle")

ALIGNMENT_WEIGHT = 5.0  # utility of a caption wholly true over one wholly false
APPEAL_WEIGHT = 2.0  # utility of a clean picture over a spoilt one
CHOICE_TEMPERATURE = 0.42  # of the Bradley–Terry choice, in units of utility
TIE_WIDTH = 0.1  # utilities closer than this are a tie


@dataclass(frozen=True)
class Rendering:
    """A picture and its true attributes.

    pixels: (32, 32, 3) uint8. `shown` and `placement` are what was drawn, `flaws` what went wrong. `alignment` is the
    share of the caption's claims that hold; `appeal` is 1 for a clean picture and 0 for a spoilt one.
    """

    pixels: np.ndarray
    shown: Scene
    placement: Placement
    flaws: tuple[str, ...]
    alignment: float
    appeal: float

    @property
    def utility(self) -> float:
        """The annotator's utility of the picture."""
        return utility(self.alignment, self.appeal)


def utility(alignment: float, appeal: float) -> float:
    """The annotator's utility of a picture with this alignment and appeal, both in [0, 1]."""
    return ALIGNMENT_WEIGHT * alignment + APPEAL_WEIGHT * appeal


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
            severity = float(rng.uniform(0.3, 1.0))
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
        share = 0.75 * severity
        return image * (1 - share) + 0.72 * share
    if flaw == "blur":
        picture = Image.fromarray((image * 255).round().astype(np.uint8))
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(0.5 + 1.3 * severity))) / 255
    hit = rng.random(image.shape[:2]) < 0.02 + 0.1 * severity
    return np.where(hit[..., None], rng.random(image.shape), image)


def random_flaws(rng: np.random.Generator, flawless_share: float) -> tuple[str, ...]:
    """No flaw with probability `flawless_share`, else one, and in a quarter of those a second one."""
    if rng.random() < flawless_share:
        return ()
    count = 1 + int(rng.random() < 0.25)
    return tuple(str(flaw) for flaw in rng.permutation(ALIGNMENT_FLAWS + APPEAL_FLAWS)[:count])


def choose(first: Rendering, second: Rendering, rng: np.random.Generator) -> float:
    """The annotator's label of `first`: 1.0 chosen, 0.0 rejected, 0.5 a tie."""
    gap = first.utility - second.utility
    if abs(gap) < TIE_WIDTH:
        return 0.5
    return float(rng.random() < 1 / (1 + np.exp(-gap / CHOICE_TEMPERATURE)))
