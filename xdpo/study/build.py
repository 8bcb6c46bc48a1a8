"""Build a blind study from folders of images: draw prompts, reduce images to pixels, deal out tasks."""

import io
import secrets
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from xdpo.data.images import UnreadableImageError, decode_rgb
from xdpo.files import replacing_folder
from xdpo.images.making import differences, makings_of
from xdpo.images.reading import Picture, natural_order, of_one_colour, read_model_folder
from xdpo.study.folder import DEFAULT_TITLE, Item, Key, Links, Study, StudyError, Task
from xdpo.study.form import SIDES, Form

CODE_LETTERS = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # no two that look alike
PromptKey = tuple[str, str]  # (benchmark, key of the prompt in it)


@dataclass(frozen=True)
class StudyPlan:
    """The settings of a study. sample: the number of prompts by benchmark; other benchmarks are left out. None: all
    prompts of all benchmarks."""

    sample: Mapping[str, int] | None
    seed: int
    votes_per_pair: int
    annotators: int
    repeats: int  # pairs that every annotator sees a second time, with the sides exchanged
    obvious: int  # checks with a known answer
    image_side: int | None  # pixels to which all images are scaled; None: as they are
    title: str = DEFAULT_TITLE
    form: Form = field(default_factory=Form)
    allow_different_settings: bool = False  # of sampling, between the models


def build_study(folder: Path, model: tuple[str, Path], baselines: Sequence[tuple[str, Path]], plan: StudyPlan) -> Study:
    """Write a study of a model's images against each baseline's to `folder`, whole or not at all.

    Raises StudyError for folders whose prompts do not match, for images that can't be read or differ in size, and for
    incompatible settings; for images that were not made alike, unless the plan allows it.
    """
    _check(model, baselines, plan)
    _check_absent(folder)
    rng = np.random.default_rng(plan.seed)
    shown = {name: _pictures(name, path) for name, path in [model, *baselines]}
    prompts = _draw(_common_prompts(model[0], shown), plan.sample, rng)
    if not plan.allow_different_settings:
        _refuse_different_settings([shown[name][prompt] for name in shown for prompt in prompts])
    items, sources = _items(model[0], [name for name, _ in baselines], shown, prompts, plan.obvious)
    tasks, repeats = _deal(items, plan, rng)
    with replacing_folder(folder) as aside:
        study = Study(
            folder=aside,
            id=secrets.token_hex(8),
            title=plan.title,
            form=plan.form,
            seed=plan.seed,
            votes_per_pair=plan.votes_per_pair,
            prompts={name: item.prompt for name, item in items.items()},
            tasks=tasks,
        )
        study.save()
        Key(model[0], [name for name, _ in baselines], items, repeats).save(aside, study.id)
        codes = [plan.form.completion_code or _new_code() for _ in tasks]
        Links(secrets.token_urlsafe(24), [secrets.token_urlsafe(24) for _ in tasks], codes).save(aside)
        if plan.form.introduction is not None:
            _write_example(aside / "example", plan.form.introduction.example.images)
        (aside / "images").mkdir()
        for item in items.values():
            _write_images(aside / "images", {name: sources[name] for name in item.images}, plan.image_side)
        _check_absent(folder)  # another may have been built meanwhile, and voted in
    return Study.load(folder)


def _check(model: tuple[str, Path], baselines: Sequence[tuple[str, Path]], plan: StudyPlan) -> None:
    names = [model[0], *(name for name, _ in baselines)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise StudyError(f"two folders are called {twice[0]!r}; name them: NAME=FOLDER")
    if plan.annotators < plan.votes_per_pair:
        raise StudyError(
            f"{plan.votes_per_pair} votes a pair need as many annotators, as nobody votes twice; got {plan.annotators}"
        )

    if plan.obvious and plan.form.check is None:
        asked = ", ".join(question["id"] for question in plan.form.questions)
        raise StudyError(
            "--obvious shows the image of another prompt, and none of the questions asks about the prompt; add check: "
            f"true to one that does ({asked}), or set --obvious 0"
        )


def _new_code() -> str:
    return "".join(secrets.choice(CODE_LETTERS) for _ in range(8))


def _refuse_different_settings(pictures: Sequence[Picture]) -> None:
    if unlike := differences(makings_of(pictures), besides=("Size",)):  # of which _write_images takes care
        lines = "\n  ".join(problem.describe() for problem in unlike)
        raise StudyError(
            f"annotators would judge settings as well as models:\n  {lines}\nMake the images alike with generate.py, "
            "or build the study all the same with --allow-different-settings"
        )


def _check_absent(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StudyError(f"{folder} is there already; votes may be in it. Choose another folder")


def _pictures(model: str, folder: Path) -> dict[PromptKey, Picture]:
    """The first image of every prompt. Raises StudyError for a folder without prompts or with images missing."""
    pictures, problems = read_model_folder(folder, model)
    fatal = ("missing", "unreadable", "clashes")
    if wrong := [problem for problem in problems if any(word in problem.kind for word in fatal)]:
        raise StudyError(f"{folder}: {wrong[0].describe()}; make them again with generate.py")
    if without := [picture.name for picture in pictures if picture.prompt is None]:
        raise StudyError(
            f"{folder} has no manifest, so the prompt of {without[0]} is unknown; use generate.py's folders"
        )
    pictures = [picture for picture in pictures if picture.repeat == 0]
    for problem in of_one_colour(pictures):
        shown = replace(problem, kind="of one colour throughout; shown as they are")
        print(f"note: {shown.describe()}", file=sys.stderr)
    return {(picture.prompt_set, picture.key): picture for picture in pictures}


def _common_prompts(model: str, shown: Mapping[str, Mapping[PromptKey, Picture]]) -> dict[str, list[PromptKey]]:
    """The prompts of each benchmark, in order. Raises StudyError, naming some, if models have different ones."""
    reference = shown[model]
    for name, pictures in shown.items():
        for here, there, lacking in ((reference, pictures, name), (pictures, reference, model)):
            if only := sorted(here.keys() - there.keys()):
                listed = ", ".join(f"{benchmark} {key}" for benchmark, key in only[:5])
                raise StudyError(
                    f"{lacking} has no image for {len(only)} prompts that {model if lacking == name else name} has "
                    f"({listed}); a pair needs both. Make them with generate.py, with the same --prompts"
                )
        for prompt, picture in pictures.items():
            if picture.prompt != reference[prompt].prompt:
                raise StudyError(
                    f"{' '.join(prompt)} is {reference[prompt].prompt!r} in {model} and {picture.prompt!r} in {name}; "
                    "a pair needs one prompt"
                )
    by_benchmark: dict[str, list[PromptKey]] = {}
    for prompt in sorted(reference, key=lambda prompt: (prompt[0], natural_order(prompt[1]))):
        by_benchmark.setdefault(prompt[0], []).append(prompt)
    return by_benchmark


def _draw(
    prompts: Mapping[str, Sequence[PromptKey]], sample: Mapping[str, int] | None, rng: np.random.Generator
) -> list[PromptKey]:
    """Prompts of each benchmark drawn without replacement, in their order."""
    sample = {name: len(available) for name, available in prompts.items()} if sample is None else sample
    drawn: list[PromptKey] = []
    for benchmark, count in sample.items():
        available = prompts.get(benchmark, ())
        if count > len(available):
            have = ", ".join(f"{name} {len(available)}" for name, available in prompts.items())
            raise StudyError(f"--sample wants {count} prompts of {benchmark!r}; the folders have {have}")
        drawn += [available[index] for index in sorted(rng.permutation(len(available))[:count])]
    if not drawn:
        raise StudyError("no prompt was drawn; raise --sample")
    return drawn


def _items(
    model: str,
    baselines: Sequence[str],
    shown: Mapping[str, Mapping[PromptKey, Picture]],
    prompts: Sequence[PromptKey],
    obvious: int,
) -> tuple[dict[str, Item], dict[str, Picture]]:
    """All items by their random names, and the source of every image."""
    items, sources = {}, {}

    def add(prompt: PromptKey, kind: str, pictures: Mapping[str, Picture], baseline: str | None) -> None:
        names = {label: secrets.token_hex(8) for label in pictures}  # new ones for every item: a name must not recur
        picture = shown[model][prompt]
        items[secrets.token_hex(8)] = Item(
            kind=kind,
            benchmark=picture.prompt_set,
            category=picture.category,
            key=picture.key,
            prompt=_text(picture),
            images={name: label for label, name in names.items()},
            baseline=baseline,
        )
        sources.update({names[label]: source for label, source in pictures.items()})

    for prompt in prompts:
        for baseline in baselines:
            pair = {model: shown[model][prompt], baseline: shown[baseline][prompt]}
            add(prompt, "pair", pair, baseline)
    for number in range(obvious):
        prompt = prompts[number * len(prompts) // obvious]
        other = _least_alike(prompt, prompts, shown[model])
        # From all models in turn: an image that comes back in a check must not reveal the tested model.
        pictures = shown[[model, *baselines][number % (1 + len(baselines))]]
        add(prompt, "obvious", {"right": pictures[prompt], "wrong": pictures[other]}, None)
    return items, sources


def _text(picture: Picture) -> str:
    """The prompt of a picture. `_pictures` refuses pictures without one."""
    assert picture.prompt is not None
    return picture.prompt


def _least_alike(prompt: PromptKey, prompts: Sequence[PromptKey], pictures: Mapping[PromptKey, Picture]) -> PromptKey:
    """The prompt that shares the fewest words with `prompt`. Raises StudyError where there is no other."""
    words = set(_text(pictures[prompt]).lower().split())

    def shared(other: PromptKey) -> float:
        theirs = set(_text(pictures[other]).lower().split())
        return len(words & theirs) / max(1, len(words | theirs))

    others = [other for other in prompts if pictures[other].prompt != pictures[prompt].prompt]
    if not others:
        raise StudyError("an obvious pair needs the image of another prompt; draw more prompts, or set --obvious 0")
    return min(others, key=shared)


def _deal(
    items: Mapping[str, Item], plan: StudyPlan, rng: np.random.Generator
) -> tuple[list[list[Task]], dict[str, str]]:
    """Deal every pair to `votes_per_pair` annotators, and checks to all. Returns tasks, and repeat → repeated task.

    Shares differ by one pair at most.
    """
    pairs = _prompt_by_prompt(items, rng)
    checks = [name for name, item in items.items() if item.kind == "obvious"]
    shares: list[list[str]] = [[] for _ in range(plan.annotators)]
    for index, pair in enumerate(pairs):
        for vote in range(plan.votes_per_pair):
            shares[(index * plan.votes_per_pair + vote) % plan.annotators].append(pair)
    dealt, repeats = [], {}
    for share in shares:
        tasks = [_task(items, item, bool(rng.integers(2))) for item in rng.permutation([*share, *checks])]
        if plan.repeats > len(share):
            raise StudyError(f"--repeats {plan.repeats} is more than the {len(share)} pairs of an annotator")
        for item in rng.permutation(share)[: plan.repeats]:
            first = next(index for index, task in enumerate(tasks) if task.item == item)
            again = Task(secrets.token_hex(8), str(item), tasks[first].right, tasks[first].left)
            repeats[again.task] = tasks[first].task
            # Late, for some distance, and never before the task that it repeats.
            tasks.insert(int(rng.integers(max(first + 1, len(tasks) * 2 // 3), len(tasks) + 1)), again)
        dealt.append(tasks)
    return dealt, repeats


def _prompt_by_prompt(items: Mapping[str, Item], rng: np.random.Generator) -> list[str]:
    """All pairs in random order, with the pairs of one prompt in sequence.

    Dealt out in turn, they go to different people if there are enough. Somebody who sees the tested model's image of a
    prompt beside one baseline's and then beside another's knows which image is the tested model's.
    """
    of_prompt: dict[PromptKey, list[str]] = defaultdict(list)
    for name, item in items.items():
        if item.kind == "pair":
            of_prompt[item.benchmark, item.key].append(name)
    groups = list(of_prompt.values())
    return [str(pair) for index in rng.permutation(len(groups)) for pair in rng.permutation(groups[index])]


def _task(items: Mapping[str, Item], item: str, swapped: bool) -> Task:
    left, right = list(items[item].images)
    return Task(secrets.token_hex(8), str(item), *((right, left) if swapped else (left, right)))


def _write_images(folder: Path, sources: Mapping[str, Picture], side: int | None) -> None:
    """Write an item's two images as PNG with nothing but pixels."""
    images = {name: _pixels(picture.path) for name, picture in sources.items()}
    if side is not None:
        images = {name: image.resize((side, side), Image.Resampling.LANCZOS) for name, image in images.items()}
    sizes = {image.size for image in images.values()}
    if len(sizes) > 1:
        shown = ", ".join(f"{picture.path} {images[name].size}" for name, picture in sources.items())
        raise StudyError(f"two images of a pair differ in size, which tells them apart: {shown}; give --image-side")
    for name, image in images.items():
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        (folder / f"{name}.png").write_bytes(buffer.getvalue())


def _write_example(folder: Path, files: Mapping[str, Path] | None) -> None:
    """Write the two images of the first page: the files' pixels, or a drawn pair."""
    folder.mkdir()
    colours = {"left": ("#c8321e", "#2a62c4"), "right": ("#2a62c4", "#c8321e")}
    for side in SIDES:
        if files is not None:
            image = _pixels(files[side])
        else:
            image = Image.new("RGB", (512, 512), "#efe9dc")
            circle, square = colours[side]
            draw = ImageDraw.Draw(image)
            draw.ellipse((156, 40, 356, 240), fill=circle)
            draw.rectangle((166, 282, 346, 462), fill=square)
        image.save(folder / f"{side}.png", "PNG")


def _pixels(path: Path) -> Image.Image:
    """An image rebuilt from its pixels, without EXIF, text chunks or profiles."""
    try:
        rgb = decode_rgb(str(path))
    except UnreadableImageError as error:
        raise StudyError(f"an image can't be read: {error}; make it again with generate.py") from None
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())
