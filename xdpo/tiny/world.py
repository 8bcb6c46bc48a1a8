"""Scenes of one or two coloured shapes, their English captions, and their drawing.

A `Scene` says everything a caption claims. `caption` puts it into words, `parse` reads the words back, and
`draw` renders it at 64×64 pixels from signed distances, so edges are anti-aliased and every pixel is a
function of the scene and the placement alone.
"""

import itertools
import re
import zlib
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64  # pixels a side

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (222, 36, 36),
    "orange": (247, 142, 20),
    "yellow": (250, 218, 30),
    "green": (36, 160, 64),
    "cyan": (40, 205, 222),
    "blue": (36, 76, 214),
    "purple": (140, 56, 190),
    "pink": (248, 134, 186),
}
SIZES = {"small": 9.2, "large": 14.0}  # circumscribed radius in pixels
BACKGROUNDS = {"white": (244, 244, 244), "grey": (136, 136, 136), "black": (24, 24, 24)}
RELATIONS = {
    "to the left of": "horizontal",
    "to the right of": "horizontal",
    "above": "vertical",
    "below": "vertical",
}
_SECOND_COMES_FIRST = ("to the right of", "below")

# Colour and shape never meet in any training image; prompts of the category "unseen combination" ask for them.
UNSEEN_COMBINATIONS = frozenset(
    {
        ("red", "ring"),
        ("yellow", "triangle"),
        ("green", "star"),
        ("cyan", "cross"),
        ("blue", "square"),
        ("pink", "circle"),
    }
)


@dataclass(frozen=True)
class Thing:
    """One object, as a caption describes it."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Scene:
    """What a caption claims: one or two things, the position of the first relative to the second, and the background.

    `relation` is None for one thing, a key of RELATIONS, or "and" where any arrangement will do.
    """

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None


@dataclass(frozen=True)
class Placement:
    """The positions of a scene's things: centres in pixels, (x, y) per thing, in the scene's order."""

    centres: tuple[tuple[float, float], ...]


# --- words ---------------------------------------------------------------------------------------------

_THING = (
    rf"an? (?P<size{{i}}>{'|'.join(SIZES)}) (?P<colour{{i}}>{'|'.join(COLOURS)}) (?P<shape{{i}}>{'|'.join(SHAPES)})"
)
_JOINED = _THING.format(i=0) + rf"(?: (?P<relation>{'|'.join((*RELATIONS, 'and'))}) " + _THING.format(i=1) + ")?"
_BACKGROUND = rf"(?P<background>{'|'.join(BACKGROUNDS)})"
_PHRASINGS = (  # how a sentence is built, and how it is parsed
    ("{things} on a {background} background", re.compile(rf"{_JOINED} on a {_BACKGROUND} background")),
    ("a {background} background with {things}", re.compile(rf"a {_BACKGROUND} background with {_JOINED}")),
    ("{things}, {background} background", re.compile(rf"{_JOINED}, {_BACKGROUND} background")),
)


def caption(scene: Scene, phrasing: int = 0) -> str:
    """The scene in English; `phrasing` picks one of three sentence forms (taken modulo their number)."""
    things = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in scene.things]
    template = _PHRASINGS[phrasing % len(_PHRASINGS)][0]
    return template.format(things=f" {scene.relation} ".join(things), background=scene.background)


def parse(text: str) -> Scene:
    """The scene that a caption describes; the inverse of `caption` for every phrasing.

    Raises ValueError for text outside the grammar.
    """
    words = " ".join(text.lower().strip().rstrip(".").split())
    for _, pattern in _PHRASINGS:
        if match := pattern.fullmatch(words):
            got = match.groupdict()
            things = tuple(
                Thing(got[f"shape{i}"], got[f"colour{i}"], got[f"size{i}"]) for i in range(2) if got[f"shape{i}"]
            )
            return Scene(things, got["background"], got["relation"])
    raise ValueError(
        f"not a caption of the embedded world: {text!r}; an example that is: {caption(EXAMPLE_SCENE)!r} "
        "(the grammar is in xdpo/tiny/world.py)"
    )


# --- which scenes there are ----------------------------------------------------------------------------


def is_held_out(scene: Scene) -> bool:
    """Whether a scene is kept out of all training: an unseen combination, or one in ten of the others."""
    if any((thing.colour, thing.shape) in UNSEEN_COMBINATIONS for thing in scene.things):
        return True
    return zlib.crc32(caption(scene).encode()) % 10 == 0


def random_thing(rng: np.random.Generator) -> Thing:
    return Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), str(rng.choice(list(SIZES))))


def random_scene(rng: np.random.Generator, two_things: bool | None = None, relation: str | None = None) -> Scene:
    """A scene drawn uniformly; it has two different things in 60 % of draws, unless `two_things` decides."""
    background = str(rng.choice(list(BACKGROUNDS)))
    if two_things is None:
        two_things = rng.random() < 0.6
    if not two_things:
        return Scene((random_thing(rng),), background)
    first = second = random_thing(rng)
    while second.colour == first.colour and second.shape == first.shape:
        second = random_thing(rng)
    return Scene((first, second), background, relation or str(rng.choice([*RELATIONS, "and"])))


def training_scene(rng: np.random.Generator) -> Scene:
    """A random scene that is not held out."""
    while is_held_out(scene := random_scene(rng)):
        pass
    return scene


def place(scene: Scene, rng: np.random.Generator) -> Placement:
    """Random centres that fulfil the scene's relation and keep things apart and inside the image."""
    middle, jitter = IMAGE_SIZE / 2, rng.uniform(-1, 1, size=(2, 2))
    if scene.relation is None:
        x, y = middle + 10.0 * jitter[0]
        return Placement(((float(x), float(y)),))
    axis = RELATIONS.get(scene.relation) or str(rng.choice(["horizontal", "vertical"]))
    along = np.array([17.0, 47.0]) + 1.6 * jitter[0]
    across = middle + 10.0 * jitter[1]
    if not first_comes_first(scene.relation) or (scene.relation == "and" and rng.random() < 0.5):
        along = along[::-1]
    pairs = zip(along, across, strict=True)
    return Placement(tuple((float(a), float(b)) if axis == "horizontal" else (float(b), float(a)) for a, b in pairs))


def first_comes_first(relation: str) -> bool:
    """Whether the first thing named is the left or the upper one."""
    return relation not in _SECOND_COMES_FIRST


def layout(placement: Placement) -> str:
    """How a placed scene is arranged: "single", "horizontal" or "vertical"."""
    if len(placement.centres) == 1:
        return "single"
    (x0, y0), (x1, y1) = placement.centres
    return "horizontal" if abs(x0 - x1) > abs(y0 - y1) else "vertical"


# --- pictures ------------------------------------------------------------------------------------------

_ROWS, _COLUMNS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float64) + 0.5


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the outline, negative inside; x to the right, y down, from the centre."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9 * radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.73 * radius) - 0.25 * radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.8 * radius
    if shape == "cross":
        long, short = 0.95 * radius, 0.32 * radius
        bar = np.maximum(abs(x) - long, abs(y) - short)
        return np.minimum(bar, np.maximum(abs(x) - short, abs(y) - long))
    if shape == "triangle":  # equilateral, pointing up: three half-planes
        y = y - 0.15 * radius
        return np.maximum(y, abs(x) * np.sqrt(3) / 2 - y / 2) - 0.52 * radius
    if shape == "star":  # five points: one edge, folded round the centre
        fifth = 2 * np.pi / 5
        angle = abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
        distance, inner, outer = np.hypot(x, y), 0.45 * radius, 1.08 * radius
        edge = np.array([inner * np.cos(fifth / 2) - outer, inner * np.sin(fifth / 2)])
        normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
        return (distance * np.cos(angle) - outer) * normal[0] + distance * np.sin(angle) * normal[1]
    raise ValueError(f"unknown shape {shape!r}; choose from {', '.join(SHAPES)}")


def draw(scene: Scene, placement: Placement) -> np.ndarray:
    """The scene as pixels: (64, 64, 3) float64 in [0, 1]."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3))
    image[:] = np.array(BACKGROUNDS[scene.background]) / 255
    for thing, (x, y) in zip(scene.things, placement.centres, strict=True):
        distance = _signed_distance(thing.shape, _COLUMNS - x, _ROWS - y, SIZES[thing.size])
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        image = image * (1 - cover) + np.array(COLOURS[thing.colour]) / 255 * cover
    return image


EXAMPLE_SCENE = Scene((Thing("star", "red", "small"), Thing("circle", "blue", "large")), "white", "above")


# --- the prompt set ------------------------------------------------------------------------------------

PROMPT_CATEGORIES = ("single object", "two colours", "relation", "unseen combination")


def tiny_prompts(per_category: int = 50) -> list[tuple[str, str]]:
    """`tinyprompts`: (category, prompt) rows of held-out scenes only, always the same ones, all distinct."""
    rng, rows, seen = np.random.default_rng(20250723), [], set()
    kinds = {
        "single object": lambda: random_scene(rng, two_things=False),
        "two colours": lambda: random_scene(rng, two_things=True, relation="and"),
        "relation": lambda: random_scene(rng, two_things=True, relation=str(rng.choice(list(RELATIONS)))),
        "unseen combination": lambda: random_scene(rng),
    }
    for category in PROMPT_CATEGORIES:
        count = 0
        for phrasing in itertools.count():
            if count == per_category:
                break
            scene = kinds[category]()
            unseen = any((thing.colour, thing.shape) in UNSEEN_COMBINATIONS for thing in scene.things)
            text = caption(scene, phrasing)
            if is_held_out(scene) and unseen == (category == "unseen combination") and text not in seen:
                seen.add(text)
                rows.append((category, text))
                count += 1
    return rows
