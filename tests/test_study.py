"""The user study without a browser: building blind pairs, dealing them out, votes that stay, counts checked by hand."""

import errno
import itertools
import json
import os
import re
import sqlite3
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import user_study
from conftest import failing
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import binomtest

from xdpo import files
from xdpo.files import StorageError, is_untouched
from xdpo.images.reading import Picture
from xdpo.study import analysis, build, power, report
from xdpo.study.build import StudyPlan, _pixels, build_study
from xdpo.study.findings import find
from xdpo.study.folder import Key, Links, Study, StudyError
from xdpo.study.form import QUESTIONS, FormError, read_form
from xdpo.study.server import Ballots
from xdpo.study.static import export, import_votes
from xdpo.study.votes import ConflictError, Display, Vote, VoteStore

PLAN = StudyPlan(sample=None, seed=0, votes_per_pair=3, annotators=4, repeats=1, obvious=1, image_side=None)
COLOURS = {"ours": (200, 30, 30), "theirs": (30, 30, 200), "others": (30, 200, 30)}
PROMPTS = {("set_a", "style"): ["a red fox", "two blue boats"], ("set_b", ""): ["three owls", "one old bridge"]}


def make_images(folder, model, prompts=PROMPTS, side=16, **more):
    """A folder as generate.py leaves it, every image with the model's name in its metadata.

    more: further keys of every line of the manifest.
    """
    for (benchmark, category), texts in prompts.items():
        rows = []
        for index, prompt in enumerate(texts):
            name = f"{category}/{index:05d}.png" if category else f"{index:05d}.png"
            path = folder / benchmark / name
            path.parent.mkdir(parents=True, exist_ok=True)
            red, green, blue = COLOURS.get(model, (90, 90, 90))
            info = PngInfo()
            info.add_text("parameters", f"made by {model}")
            Image.new("RGB", (side, side), (red, green, blue + index)).save(path, pnginfo=info)
            row = {"file": name, "category": category, "index": index, "prompt": prompt, "model": model}
            rows.append(row | more)
        (folder / benchmark / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, folder


@pytest.fixture
def folders(tmp_path):
    return [make_images(tmp_path / name, name) for name in COLOURS]


@pytest.fixture
def study(tmp_path, folders):
    return build_study(tmp_path / "study", folders[0], folders[1:], PLAN)


def vote_as(study, number, task, **answers):
    return Vote(task.task, number, {"preference": "left", "alignment": "left"} | answers, 1.0, "2026-01-01T00:00:00Z")


def vote_for(study, key, wanted, annotators=None):
    """Votes of all annotators on all their tasks: wanted(number, item, question) names the image's label."""
    votes = []
    for number, tasks in enumerate(study.tasks, start=1):
        if annotators is None or number in annotators:
            for task in tasks:
                item = key.items[task.item]
                answers = {}
                for question in ("preference", "alignment"):
                    label = wanted(number, item, question)
                    answers[question] = "left" if item.images[task.left] == label else "right"
                votes.append(Vote(task.task, number, answers, None, "2026-01-01T00:00:00Z"))
    return votes


# --- building --------------------------------------------------------------------------------------------


def test_every_pair_is_dealt_to_as_many_annotators_as_votes_are_wanted(study):
    key = Key.load(study)
    pairs = {name for name, item in key.items.items() if item.kind == "pair"}
    assert len(pairs) == 4 * 2
    dealt = Counter()
    for tasks in study.tasks:
        own = [task.item for task in tasks if task.item in pairs and task.task not in key.repeats]
        assert len(own) == len(set(own)) == 6  # 8 pairs × 3 votes / 4 annotators
        dealt.update(own)
        assert [key.items[task.item].kind for task in tasks].count("obvious") == 1
    assert set(dealt.values()) == {3} and set(dealt) == pairs


def test_a_repeat_comes_after_what_it_repeats_with_its_sides_exchanged(study):
    key = Key.load(study)
    assert len(key.repeats) == 4
    for tasks in study.tasks:
        places = {task.task: place for place, task in enumerate(tasks)}
        for again, first in ((tasks[places[a]], tasks[places[f]]) for a, f in key.repeats.items() if a in places):
            assert places[again.task] > places[first.task] and again.item == first.item
            assert (again.left, again.right) == (first.right, first.left)


def test_with_people_enough_nobody_sees_a_prompt_beside_two_baselines(tmp_path):
    """Or the image that comes back would be known to be the tested model's."""
    folders = [make_images(tmp_path / name, name, many_prompts(12), side=4) for name in COLOURS]
    study = build_study(tmp_path / "study", folders[0], folders[1:], StudyPlan(None, 0, 3, 6, 0, 0, None))
    key = Key.load(study)
    for tasks in study.tasks:
        prompts = Counter(key.items[task.item].key for task in tasks)
        assert len(prompts) == 12 and set(prompts.values()) == {1}
        assert {key.items[task.item].baseline for task in tasks} == {"theirs", "others"}  # nobody judges one alone


def test_sides_and_order_are_drawn_for_every_annotator_from_the_seed(tmp_path, folders):
    def order(name, seed):
        study = build_study(tmp_path / name, folders[0], folders[1:], StudyPlan(None, seed, 4, 4, 0, 0, None))
        key = Key.load(study)

        def shown(task):
            item = key.items[task.item]
            return item.benchmark, item.key, item.baseline, item.images[task.left]

        return [[shown(task) for task in tasks] for tasks in study.tasks]

    one, again, other = order("one", 0), order("again", 0), order("other", 1)
    assert one == again != other
    assert len({tuple(tasks) for tasks in one}) == 4
    lefts = Counter(shown[3] == "ours" for tasks in one for shown in tasks)
    assert 6 <= lefts[True] <= 26  # of 32 coins


def test_images_that_were_not_made_alike_need_leave(tmp_path, capsys):
    steps = {"ours": 50, "theirs": 20}
    for name, count in steps.items():
        make_images(tmp_path / name, name, settings={"num_inference_steps": count})
    command = ["build", "--a", str(tmp_path / "ours"), "--b", str(tmp_path / "theirs"), "--output"]
    assert user_study.main([*command, str(tmp_path / "study")]) == 1
    said = capsys.readouterr().err
    assert "set_b: images made with different steps (50: ours; 20: theirs)" in said
    assert "--allow-different-settings" in said and not (tmp_path / "study").exists()
    assert user_study.main([*command, str(tmp_path / "study"), "--allow-different-settings"]) == 0


def test_prompts_are_drawn_from_every_benchmark_as_asked(tmp_path, folders):
    plan = StudyPlan({"set_a": 1, "set_b": 2}, 0, 1, 1, 0, 0, None)
    key = Key.load(build_study(tmp_path / "study", folders[0], folders[1:2], plan))
    assert Counter(item.benchmark for item in key.items.values()) == {"set_a": 1, "set_b": 2}

    with pytest.raises(StudyError, match=r"wants 5 prompts of 'set_a'; the folders have set_a 2, set_b 2"):
        build_study(tmp_path / "more", folders[0], folders[1:2], StudyPlan({"set_a": 5}, 0, 1, 1, 0, 0, None))


def test_nothing_that_an_annotator_gets_tells_the_models_apart(study):
    told = re.compile("|".join([*COLOURS, "made by", "set_a", "set_b", "style", "obvious", "repeat", "baseline"]))
    assert not told.search((study.folder / "study.json").read_text())
    names = [path.name for path in (study.folder / "images").iterdir()]
    assert len(names) == 2 * len(study.prompts) and not any(told.search(name) for name in names)
    for path in (study.folder / "images").iterdir():
        with Image.open(path) as image:
            assert image.info == {} and image.format == "PNG"
        assert b"made by" not in path.read_bytes() and b"tEXt" not in path.read_bytes()
    shown = Counter(name for tasks in study.tasks for task in tasks for name in {task.left, task.right})
    key = Key.load(study)
    by_label = Counter(key.items[item].images[name] for item in key.items for name in key.items[item].images)
    assert len(shown) == sum(by_label.values())  # no name stands in two items
    assert not any((study.folder / name).stat().st_mode & 0o077 for name in ("links.json", "key.json"))


def test_a_check_looks_like_any_other_pair(study):
    key, ballots, shown = Key.load(study), Ballots(study), Counter()
    shapes, kinds = set(), set()
    for task in study.tasks[0]:
        state = ballots.state(1)
        assert state["task"]["task"] == task.task
        shown.update([state["task"]["task"], state["task"]["left"], state["task"]["right"]])
        shapes.add((*state, *state["task"]))
        kinds.add("repeat" if task.task in key.repeats else key.items[task.item].kind)
        told = json.dumps(state)
        assert not any(name in told for name in (task.item, task.left, task.right))  # they come back in a repeat
        ballots.vote(1, {"task": task.task, "answers": {"preference": "left", "alignment": "left"}})
    assert kinds == {"pair", "repeat", "obvious"} and len(shapes) == 1 and set(shown.values()) == {1}


def test_an_obvious_pair_shows_the_image_of_the_prompt_that_is_least_alike_of_each_model_in_turn(tmp_path):
    prompts = {("set_a", ""): ["a red fox", "a red fox at night", "two owls", "a red owl"]}
    folders = [make_images(tmp_path / name, name, prompts) for name in ("ours", "theirs")]
    study = build_study(tmp_path / "study", folders[0], folders[1:], StudyPlan(None, 0, 1, 1, 0, 4, None))
    found = []
    for item in Key.load(study).items.values():
        if item.kind == "obvious":
            assert item.baseline is None
            pixels = {}
            for name, label in item.images.items():
                with Image.open(study.folder / "images" / f"{name}.png") as image:
                    pixels[label] = image.getpixel((0, 0))
            found.append((item.prompt, pixels["right"], pixels["wrong"]))
    ours, theirs = (lambda index: (200, 30, 30 + index)), (lambda index: (30, 30, 200 + index))
    assert found == [
        ("a red fox", ours(0), ours(2)),
        ("a red fox at night", theirs(1), theirs(2)),
        ("two owls", ours(2), ours(0)),
        ("a red owl", theirs(3), theirs(2)),
    ]


def without(prompts, key, place):
    changed = {name: list(texts) for name, texts in prompts.items()}
    del changed[key][place]
    return changed


def test_folders_that_do_not_match_are_refused_naming_the_prompts(tmp_path, folders):
    fewer = make_images(tmp_path / "fewer", "theirs", without(PROMPTS, ("set_a", "style"), 1))
    with pytest.raises(StudyError, match=r"theirs has no image for 1 prompts that ours has \(set_a style/1\)"):
        build_study(tmp_path / "study", folders[0], [fewer], PLAN)
    reworded = make_images(tmp_path / "reworded", "theirs", PROMPTS | {("set_b", ""): ["three owls", "a new bridge"]})
    with pytest.raises(StudyError, match="set_b 1 is 'one old bridge' in ours and 'a new bridge' in theirs"):
        build_study(tmp_path / "study", folders[0], [reworded], PLAN)
    assert not (tmp_path / "study").exists()


def add_a_second_file(folder):
    """1.png beside 00001.png, both in the manifest."""
    manifest = folder / "set_b" / "manifest.jsonl"
    rows = manifest.read_text()
    manifest.write_text(rows + rows.replace("00001.png", "1.png"))
    (folder / "set_b" / "1.png").write_bytes((folder / "set_b" / "00001.png").read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "set_b" / "00001.png").write_bytes(b"\x89PNG\r\n"), "can't be read: .*00001.png"),
        (add_a_second_file, "1 clashes, left out: files for one image .00001.png and 1.png"),
        (lambda folder: (folder / "set_b" / "00001.png").unlink(), "listed in the manifest but missing"),
        (lambda folder: (folder / "set_a" / "manifest.jsonl").unlink(), "has no manifest"),
    ],
)
def test_unreadable_missing_and_unnamed_images_are_refused_and_leave_nothing(tmp_path, folders, damage, message):
    damage(folders[1][1])
    with pytest.raises(StudyError, match=message):
        build_study(tmp_path / "study", folders[0], [folders[1]], PLAN)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(COLOURS)


def test_images_of_one_colour_are_named_before_anybody_is_asked_about_them(tmp_path, folders, capsys):
    """Black, as images of NaN are; the folders here hold nothing else than one colour."""
    build_study(tmp_path / "study", folders[0], [folders[1]], PLAN)
    said = capsys.readouterr().err
    for model, prompt_set, names in (
        ("ours", "set_a", "style/00000.png, style/00001.png"),
        ("theirs", "set_b", "00000.png"),
    ):
        assert f"note: {model}, {prompt_set}: 2 of one colour throughout; shown as they are ({names}" in said


@pytest.mark.parametrize("name", ["deep.png", "clear.png", "turned.jpg"])
def test_images_are_shown_as_they_are_scored(tmp_path, folders, name):
    """16 bits scaled, transparency over white, orientation applied: through the one decoder."""
    images = {
        "deep.png": Image.fromarray(np.full((16, 16), 32_768, np.uint16)),
        "clear.png": Image.new("RGBA", (16, 16), (255, 0, 0, 0)),
        "turned.jpg": Image.new("RGB", (16, 16), (255, 0, 0)),
    }
    picture = Picture("ours", "s", "", "0", 0, tmp_path / name, name)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    images["turned.jpg"].paste((0, 0, 255), (0, 0, 16, 8))  # the sky, above until it is turned
    images[name].save(picture.path, **({"exif": exif, "quality": 100} if name == "turned.jpg" else {}))
    shown = _pixels(picture.path)
    expected = {"deep.png": (128, 128, 128), "clear.png": (255, 255, 255), "turned.jpg": (254, 0, 0)}[name]
    assert np.abs(np.subtract(shown.getpixel((3, 3)), expected)).max() <= 2
    assert shown.info == {} and not shown.getexif()


def test_what_a_study_and_an_evaluation_leave_is_no_model(tmp_path, folders, study):
    """Their images have no manifest: nobody knows their prompts."""
    figures = tmp_path / "results" / "figures"
    figures.mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(figures / "win_rates.png")
    for name, folder in (("study", study.folder), ("results", tmp_path / "results")):
        with pytest.raises(StudyError, match=rf"{name} has no manifest, so the prompt of \S+\.png is unknown"):
            build_study(tmp_path / "new", folders[0], [(name, folder)], PLAN)
    for own in ("study.json", "key.json", "links.json"):
        with pytest.raises(StudyError, match=rf"{own} holds (no votes|votes of another study)"):
            import_votes(study, study.folder / own)
    assert VoteStore(study).all() == [] and not (tmp_path / "new").exists()


def test_a_study_that_another_has_built_meanwhile_is_left_alone(tmp_path, folders, monkeypatch):
    built = []

    def meanwhile(*arguments):
        if not built:
            built.append(None)
            built[0] = build_study(tmp_path / "study", folders[0], folders[1:], PLAN)
        return original(*arguments)

    original = build._write_images
    monkeypatch.setattr(build, "_write_images", meanwhile)
    with pytest.raises(StudyError, match="votes may be in it"):
        build_study(tmp_path / "study", folders[0], folders[1:], PLAN)
    assert Study.load(tmp_path / "study").id == built[0].id
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*COLOURS, "study"])


def test_a_full_disk_is_said_of_a_study_and_of_its_report(tmp_path, folders, study, full_disk, monkeypatch):
    with pytest.raises(StorageError, match=r"could not write .*win_rates\.png: the disk is full"):
        report.write(find(study, Key.load(study), [], 0.25), tmp_path / "report")
    monkeypatch.setattr(build, "_write_images", failing(errno.ENOSPC))
    monkeypatch.setattr(files, "aside_of", lambda path: path.with_name(f"{path.name}.0.part"))
    with pytest.raises(StorageError, match=r"could not write .*new: the disk is full"):
        build_study(tmp_path / "new", folders[0], folders[1:], PLAN)
    assert not (tmp_path / "new").exists() and is_untouched(tmp_path / "report")


def test_images_of_different_size_are_refused_unless_scaled(tmp_path, folders):
    larger = make_images(tmp_path / "larger", "theirs", side=32)
    with pytest.raises(StudyError, match="differ in size, which tells them apart"):
        build_study(tmp_path / "study", folders[0], [larger], PLAN)
    scaled = StudyPlan(None, 0, 1, 1, 0, 0, image_side=24)
    study = build_study(tmp_path / "study", folders[0], [larger], scaled)
    assert {Image.open(path).size for path in (study.folder / "images").iterdir()} == {(24, 24)}


def test_a_folder_with_something_in_it_too_few_annotators_and_names_twice_are_refused(tmp_path, folders, study):
    with pytest.raises(StudyError, match="votes may be in it"):
        build_study(study.folder, folders[0], folders[1:], PLAN)
    with pytest.raises(StudyError, match="nobody votes twice; got 2"):
        build_study(tmp_path / "new", folders[0], folders[1:], StudyPlan(None, 0, 3, 2, 0, 0, None))
    with pytest.raises(StudyError, match="two folders are called 'ours'"):
        build_study(tmp_path / "new", folders[0], [folders[0]], PLAN)


# --- votes -----------------------------------------------------------------------------------------------


def test_the_same_vote_twice_is_one_and_another_is_a_conflict(study):
    store, task = VoteStore(study), study.tasks[0][0]
    assert store.add(vote_as(study, 1, task)) == 1 and store.add(vote_as(study, 1, task)) == 0
    with pytest.raises(ConflictError, match="already answered otherwise"):
        store.add(vote_as(study, 1, task, preference="right"))
    assert [vote.answers for vote in VoteStore(study).all()] == [{"preference": "left", "alignment": "left"}]


def test_undo_takes_back_an_annotators_own_last_vote(study):
    store = VoteStore(study)
    store.add(vote_as(study, 1, study.tasks[0][0]))
    store.add(vote_as(study, 1, study.tasks[0][1], preference="right"))
    store.add(vote_as(study, 2, study.tasks[1][0]))
    assert store.withdraw_last(1) == {"preference": "right", "alignment": "left"}
    assert store.tasks_of(1) == [study.tasks[0][0].task] and len(store.tasks_of(2)) == 1
    store.withdraw_last(1)
    with pytest.raises(ConflictError, match="nothing to undo"):
        store.withdraw_last(1)


def test_a_damaged_database_and_one_of_another_study_are_refused_and_left_alone(tmp_path, study, folders):
    VoteStore(study).add(vote_as(study, 1, study.tasks[0][0]))
    other = build_study(tmp_path / "other", folders[0], folders[1:], PLAN)
    connection = sqlite3.connect(study.folder / "votes.sqlite")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    content = (study.folder / "votes.sqlite").read_bytes()
    (other.folder / "votes.sqlite").write_bytes(content)
    with pytest.raises(StudyError, match="holds the votes of another study"):
        VoteStore(other)
    for damaged in (content[:100] + b"\xff" * 4000 + content[4100:], content[: len(content) // 2], b"no database" * 99):
        (study.folder / "votes.sqlite").write_bytes(damaged)
        with pytest.raises(StudyError, match="is damaged"):
            VoteStore(study)
        assert (study.folder / "votes.sqlite").read_bytes() == damaged


def test_a_commit_that_fails_keeps_nothing_and_hinders_no_later_vote(study):
    store, (first, second, *_) = VoteStore(study), study.tasks[0]
    store.add(vote_as(study, 1, first))
    store._connection().executescript(
        "PRAGMA foreign_keys = ON; CREATE TABLE parent (id PRIMARY KEY);"
        "CREATE TABLE child (id REFERENCES parent DEFERRABLE INITIALLY DEFERRED);"
        "CREATE TRIGGER failing AFTER INSERT ON votes BEGIN INSERT INTO child VALUES (1); END"
    )
    with pytest.raises(sqlite3.IntegrityError):
        store.add(vote_as(study, 1, second))
    store._connection().execute("DROP TRIGGER failing")
    assert store.tasks_of(1) == [first.task]
    assert store.add(vote_as(study, 1, second)) == 1


@pytest.mark.parametrize("name", ["study.json", "key.json", "links.json"])
def test_a_damaged_file_of_the_study_is_named(study, name):
    (study.folder / name).write_text('{"study": ')
    with pytest.raises(StudyError, match=f"{name} is damaged"):
        Key.load(Study.load(study.folder))
        Links.load(study.folder)


# --- without a server ------------------------------------------------------------------------------------


def saved_file(tmp_path, study, number, votes, study_id=None):
    rows = [{"task": v.task, "answers": dict(v.answers), "seconds": v.seconds, "at": v.at} for v in votes]
    path = tmp_path / f"votes-{number}.json"
    path.parent.mkdir(exist_ok=True)
    agreed = {"agreed": "2026-01-01T00:00:00Z"} if study.form.introduction else {}
    path.write_text(json.dumps({"study": study_id or study.id, "annotator": number, "votes": rows} | agreed))
    return path


def test_an_exported_study_has_all_its_images_and_its_votes_come_back_once(tmp_path, study):
    pages = export(study, tmp_path / "static")
    assert pages[0] == tmp_path / "static" / "annotator_01" / "index.html" and len(pages) == 4
    for number, page in enumerate(pages, start=1):
        content = json.loads((page.parent / "study.js").read_text().removeprefix("window.STUDY = ").rstrip(";\n"))
        assert content["id"] == study.id and content["annotator"] == number
        for task, known in zip(content["tasks"], study.tasks[number - 1], strict=True):
            for side in ("left", "right"):
                source = study.folder / "images" / f"{getattr(known, side)}.png"
                assert (page.parent / task[side]).read_bytes() == source.read_bytes()
        assert set(re.findall(r'(?:src|href)="([^"#]+)"', page.read_text())) <= {
            path.name for path in page.parent.iterdir()
        }
        assert not re.search("ours|theirs|others", (page.parent / "study.js").read_text())
    votes = [vote_as(study, 2, task) for task in study.tasks[1][:3]]
    file = saved_file(tmp_path, study, 2, votes)
    assert import_votes(study, file) == (3, 0) and import_votes(study, file) == (0, 3)
    with pytest.raises(StudyError, match="is there already"):
        export(study, tmp_path / "static")
    with pytest.raises(StudyError, match="annotators 1 to 4, got 9"):
        export(study, tmp_path / "new", [9])


def test_a_study_in_a_folder_with_brackets_is_built_exported_and_analysed(tmp_path, folders):
    named = [(name, folder.rename(folder.with_name(f"{name}[1]"))) for name, folder in folders]
    study = build_study(tmp_path / "of[1] *?" / "study[a]", named[0], named[1:], PLAN)
    assert len(export(study, tmp_path / "static[b]")) == 4
    findings = find(study, Key.load(study), VoteStore(study).all(), 0.25)
    assert report.write(findings, tmp_path / "report[c]").is_file()


def test_only_the_secrets_of_a_study_are_for_their_owner_alone(tmp_path, folders):
    before = os.umask(0o027)
    try:
        study = build_study(tmp_path / "study", folders[0], [folders[1]], PLAN)
        export(study, tmp_path / "static")
        report.write(find(study, Key.load(study), [], 0.25), tmp_path / "report")
    finally:
        os.umask(before)
    secret = {study.folder / "key.json", study.folder / "links.json"}
    made = [path for name in ("study", "static", "report") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert secret <= {*made}
    assert all(path.stat().st_mode & 0o777 == (0o600 if path in secret else 0o640) for path in made)


def test_foreign_false_and_contradicting_votes_are_refused_whole(tmp_path, study):
    first, second = (vote_as(study, 2, task) for task in study.tasks[1][:2])
    refused = {
        "votes of another study": saved_file(tmp_path / "a", study, 2, [first], study_id="0123"),
        "is not annotator 3's": saved_file(tmp_path / "b", study, 3, [first]),
        "two votes on one task": saved_file(tmp_path / "c", study, 2, [first, first]),
    }
    for message, path in refused.items():
        with pytest.raises(StudyError, match=message):
            import_votes(study, path)
    for nonsense in ("[1, 2]", "", "[" * 100_000, '{"study": 1, "annotator": 1, "votes": 1}'):
        (tmp_path / "nonsense.json").write_text(nonsense)
        with pytest.raises(StudyError, match="holds no votes"):
            import_votes(study, tmp_path / "nonsense.json")
    wrong = Vote(second.task, 2, {"preference": "both", "alignment": "left"}, None, second.at)
    with pytest.raises(StudyError, match="must be left or right, got 'both'"):
        import_votes(study, saved_file(tmp_path, study, 2, [first, wrong]))
    assert VoteStore(study).all() == []

    VoteStore(study).add(second)
    other = Vote(second.task, 2, {"preference": "right", "alignment": "left"}, None, second.at)
    with pytest.raises(ConflictError, match="contradicts votes"):
        import_votes(study, saved_file(tmp_path, study, 2, [first, other]))
    assert len(VoteStore(study).all()) == 1


@pytest.mark.parametrize("seconds", ["1e999", "NaN", "-1", "true", "1" + "0" * 400, '"5"', "null"])
def test_a_time_that_is_none_is_left_out_of_an_imported_vote(tmp_path, study, seconds):
    file = saved_file(tmp_path, study, 2, [vote_as(study, 2, study.tasks[1][0])])
    file.write_text(file.read_text().replace('"seconds": 1.0', f'"seconds": {seconds}'))
    assert import_votes(study, file) == (1, 0)
    assert VoteStore(study).all()[0].seconds is None


@pytest.mark.parametrize("at", ['"\\ud800"', '"yesterday"', "3", "null", '"\\u0000"', "[]"])
def test_a_moment_that_is_none_is_that_of_the_import(tmp_path, study, at):
    file = saved_file(tmp_path, study, 2, [vote_as(study, 2, study.tasks[1][0])])
    file.write_text(file.read_text().replace('"2026-01-01T00:00:00Z"', at))
    assert import_votes(study, file) == (1, 0)
    assert datetime.fromisoformat(VoteStore(study).all()[0].at).tzinfo is not None


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [("utf-8-sig", None), ("utf-16", None), ("cp1252", "line 1: byte .* is no UTF-8"), ("utf-16-le", "is no UTF-8")],
)
def test_votes_that_an_editor_saved_anew_are_read_or_refused_with_the_line(tmp_path, study, encoding, reason):
    file = saved_file(tmp_path, study, 2, [vote_as(study, 2, study.tasks[1][0])])
    file.write_bytes(file.read_text().replace('"votes"', '"by": "Zoë", "votes"').encode(encoding))
    if reason is None:
        assert import_votes(study, file) == (1, 0)
    else:
        with pytest.raises(StudyError, match=rf"votes-2\.json holds no votes: .*{reason}"):
            import_votes(study, file)


def test_votes_imported_while_others_vote_are_all_kept(tmp_path, study):
    """The database is shared: no lock of the folder is needed."""
    first, second = (vote_as(study, 2, task) for task in study.tasks[1][:2])
    serving = VoteStore(study)
    serving.add(first)
    assert import_votes(study, saved_file(tmp_path, study, 2, [first, second])) == (1, 1)
    assert serving.tasks_of(2) == [first.task, second.task]


# --- analysis --------------------------------------------------------------------------------------------


def test_majorities_win_rates_and_single_votes_by_hand(tmp_path, folders):
    """Two pairs, three annotators: 3–0 and 1–2 on preference, 2–1 and 0–3 on alignment."""
    plan = StudyPlan({"set_a": 2}, 0, 3, 3, 0, 0, None)
    study = build_study(tmp_path / "study", folders[0], folders[1:2], plan)
    key = Key.load(study)
    ours = {("preference", "style/0"): {1, 2, 3}, ("preference", "style/1"): {2}, ("alignment", "style/0"): {1, 3}}

    def wanted(number, item, question):
        return "ours" if number in ours.get((question, item.key), ()) else "theirs"

    votes = vote_for(study, key, wanted)
    found = {(r.question, r.category): r for r in analysis.results(study, key, analysis.judgements(study, key, votes))}
    preference, alignment = found["preference", "all"], found["alignment", "all"]
    assert (preference.wins, preference.losses, preference.undecided, preference.votes) == (1, 1, 0, 6)
    assert (alignment.wins, alignment.losses) == (1, 1)
    assert preference.vote_rate == 4 / 6 and alignment.vote_rate == 2 / 6
    assert preference.win_rate == 0.5 and preference.sign_test == 1.0
    expected = binomtest(1, 2).proportion_ci(method="wilson")
    assert preference.interval == pytest.approx((expected.low, expected.high), rel=1e-6)
    # Fleiss: agreement of the pairs 1 and 1/3; by chance (4/6)² + (2/6)² = 5/9.
    assert preference.kappa == pytest.approx((2 / 3 - 5 / 9) / (1 - 5 / 9))
    assert found["preference", "style"].wins == 1

    some = vote_for(study, key, wanted, annotators={1})
    result = analysis.results(study, key, analysis.judgements(study, key, some))[0]
    assert (result.wins, result.losses, result.undecided, result.win_rate, result.kappa) == (0, 0, 2, None, None)


def test_fleiss_kappa_of_the_paper_that_made_it():
    """Fleiss 1971's layout as in its well-known example: 10 subjects, 14 raters, 5 categories, κ = 0.210."""
    counts = np.array(
        [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ]
    )
    assert analysis.fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert analysis.fleiss_kappa(np.array([[3, 0], [3, 0]])) is None
    assert analysis.fleiss_kappa(np.array([[3, 0], [0, 3]])) == 1


def many_prompts(count):
    return {("set_a", ""): [f"prompt number {number} of many" for number in range(count)]}


def test_annotators_with_a_known_preference_are_recovered_within_the_interval(tmp_path):
    """An independent count: the same votes by a dictionary of pairs, and the truth behind them."""
    prompts, rate = many_prompts(150), 0.7
    folders = [make_images(tmp_path / name, name, prompts, side=4) for name in ("ours", "theirs")]
    study = build_study(tmp_path / "study", folders[0], folders[1:], StudyPlan(None, 3, 5, 8, 2, 2, None))
    key, rng = Key.load(study), np.random.default_rng(0)

    def wanted(number, item, question):
        if item.kind == "obvious":
            return "right"
        return "ours" if rng.random() < rate else "theirs"

    votes = vote_for(study, key, wanted)
    result = analysis.results(study, key, analysis.judgements(study, key, votes))[0]

    counted: dict = {}
    for vote in votes:
        _, task = study.owner_of[vote.task]
        if key.items[task.item].kind == "pair" and vote.task not in key.repeats:
            chosen = key.items[task.item].images[getattr(task, vote.answers["preference"])]
            counted.setdefault(task.item, []).append(chosen)
    assert {len(chosen) for chosen in counted.values()} == {5}
    wins = sum(chosen.count("ours") >= 3 for chosen in counted.values())
    assert (result.wins, result.losses, result.undecided) == (wins, 150 - wins, 0)
    truth = power.power(150, 5, rate).majority_rate
    assert result.interval[0] < truth < result.interval[1]
    assert abs(result.vote_rate - rate) < 4 * np.sqrt(rate * (1 - rate) / 750)
    assert abs(result.kappa) < 0.1  # votes on a pair are independent here


def test_intervals_of_many_simulated_studies_hold_the_truth_as_often_as_they_say(tmp_path):
    folders = [make_images(tmp_path / name, name, many_prompts(60), side=4) for name in ("ours", "theirs")]
    study = build_study(tmp_path / "study", folders[0], folders[1:], StudyPlan(None, 0, 5, 5, 0, 0, None))
    key, rng, rate, held = Key.load(study), np.random.default_rng(0), 0.6, []
    truth = power.power(60, 5, rate).majority_rate
    blank = analysis.judgements(study, key, vote_for(study, key, lambda number, item, question: "ours"))
    blank = [judgement for judgement in blank if judgement.question == "preference"]
    for votes in rng.random((200, len(blank))) < rate:
        given = [replace(judgement, prefers_model=bool(v)) for judgement, v in zip(blank, votes, strict=True)]
        low, high = analysis.results(study, key, given)[0].interval
        held.append(low < truth < high)
    assert 0.91 < np.mean(held) < 0.99  # 95 %, give or take what 200 studies leave to chance


def test_results_equal_an_independent_count_of_the_table_of_votes(tmp_path, study):
    """Random votes, some missing, counted again from votes.parquet by other means."""
    import pyarrow.parquet as pq

    key, rng = Key.load(study), np.random.default_rng(5)
    votes = vote_for(study, key, lambda number, item, question: rng.choice(list(item.images.values())))
    votes = [votes[place] for place in sorted(rng.permutation(len(votes))[:24])]
    findings = find(study, key, votes, 0.25)
    report.write(findings, tmp_path / "report")
    table = pq.read_table(tmp_path / "report" / "votes.parquet").to_pylist()
    assert {(r.benchmark, r.category) for r in findings.results} == {
        ("all", "all"), ("set_a", "all"), ("set_a", "style"), ("set_b", "all"), ("set_b", "")
    }  # fmt: skip
    undecided, defined = 0, 0
    for result in findings.results:
        group = (result.benchmark, result.category)
        of_pair: dict[str, list[bool]] = {}
        for row in table:
            groups = (("all", "all"), (row["benchmark"], "all"), (row["benchmark"], row["category"]))
            asked = (row["kind"], row["question"], row["baseline"]) == ("pair", result.question, result.baseline)
            if asked and group in groups:
                of_pair.setdefault(row["item"], []).append(row["chosen"] == "ours")
        wins = sum(sorted(given, reverse=True)[1:2] == [True] for given in of_pair.values())  # the second of at most 3
        losses = sum(sorted(given)[1:2] == [False] for given in of_pair.values())
        assert (result.wins, result.losses) == (wins, losses)
        assert result.votes == sum(map(len, of_pair.values()))
        assert result.vote_rate == pytest.approx(np.mean([vote for given in of_pair.values() for vote in given]))
        undecided += result.undecided
        if wins + losses:
            test = binomtest(wins, wins + losses)
            assert result.sign_test == pytest.approx(test.pvalue) and result.win_rate == wins / (wins + losses)
            assert result.interval == pytest.approx(tuple(test.proportion_ci(method="wilson")))
        # Fleiss' κ from its meaning: two annotators of a pair agree, against any two votes drawn with replacement.
        full = [given for given in of_pair.values() if len(given) == 3]
        drawn = [vote for given in full for vote in given]
        if len(set(drawn)) < 2:
            assert result.kappa is None
            continue
        agree = np.mean([one == other for given in full for one, other in itertools.combinations(given, 2)])
        chance = np.mean([one == other for one, other in itertools.product(drawn, drawn)])
        assert result.kappa == pytest.approx((agree - chance) / (1 - chance))
        defined += 1
    assert undecided and defined > 5


def test_failed_checks_are_counted_and_the_inattentive_left_out_once(study):
    key = Key.load(study)
    votes = vote_for(study, key, lambda number, item, question: {"pair": "ours", "obvious": "right"}[item.kind])
    lazy = [Vote(v.task, 4, dict.fromkeys(v.answers, "left"), None, v.at) for v in votes if v.annotator == 4]
    votes = [vote for vote in votes if vote.annotator != 4] + lazy
    checks = analysis.attention(study, key, votes)
    assert [(c.obvious, c.obvious_failed, c.repeats, c.repeats_failed) for c in checks[:3]] == [(1, 0, 2, 0)] * 3
    assert (checks[3].repeats, checks[3].repeats_failed) == (2, 2)  # always left: a repeat has its sides exchanged
    findings = find(study, key, votes, allowed_share=0.25)
    assert findings.excluded == [4]
    assert sum(r.votes for r in findings.without_inattentive) < sum(r.votes for r in findings.results)
    assert all(result.losses == 0 for result in findings.without_inattentive)
    assert "Annotators 4 failed too many checks" in report.markdown(findings)


def test_the_report_has_a_table_a_figure_and_every_vote(tmp_path, study):
    import pyarrow.parquet as pq

    key = Key.load(study)
    votes = vote_for(study, key, lambda number, item, question: {"pair": "theirs", "obvious": "right"}[item.kind])
    path = report.write(find(study, key, votes, 0.25), tmp_path / "report")
    table = pq.read_table(tmp_path / "report" / "votes.parquet").to_pylist()
    assert len(table) == 2 * len(votes) and {row["kind"] for row in table} == {"pair", "repeat", "obvious"}
    assert (tmp_path / "report" / "win_rates.png").stat().st_size > 5000
    text = path.with_suffix(".md").read_text()
    assert "| preference | theirs |" in text and "76.4 %" in text


def test_the_bars_are_the_win_rates_and_the_diamonds_the_published_ones_and_both_are_named(tmp_path):
    prompts = {("hpsv2", "anime"): ["a fox", "a boat"], ("partiprompts", "Animals"): ["an owl", "a bridge"]}
    folders = [make_images(tmp_path / name, name, prompts, side=4) for name in ("xdpo", "sd15", "diffusion_dpo")]
    study = build_study(tmp_path / "study", folders[0], folders[1:], StudyPlan(None, 0, 1, 1, 0, 0, None))
    key = Key.load(study)
    lost = {("preference", "diffusion_dpo", "hpsv2", "anime/0"), ("alignment", "sd15", "partiprompts", "Animals/0")}

    def wanted(number, item, question):
        return item.baseline if (question, item.baseline, item.benchmark, item.key) in lost else "xdpo"

    figure = report.win_rate_bars(find(study, key, vote_for(study, key, wanted), 0.25))
    panels = {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["xdpo: all prompts", "xdpo: hpsv2", "xdpo: partiprompts"]
    widths = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
    assert widths == [[1, 0.75, 0.75, 1], [1, 1, 0.5, 1], [1, 0.5, 1, 1]]  # preference, alignment; then the next one
    diamonds = [
        [line.get_xdata()[0] for line in axes.lines if line.get_label() == report.PUBLISHED] for axes in figure.axes
    ]
    assert diamonds == [[], pytest.approx([0.764, 0.734]), []]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["preference", "alignment", report.PUBLISHED]


@pytest.mark.parametrize("prompts", [1, 4])
def test_a_study_that_one_model_wins_or_loses_throughout_is_drawn(tmp_path, prompts):
    folders = [make_images(tmp_path / name, name, many_prompts(prompts), side=4) for name in ("ours", "theirs")]
    study = build_study(tmp_path / "study", folders[0], folders[1:], StudyPlan(None, 0, 1, 1, 0, 0, None))
    key = Key.load(study)
    for winner in ("ours", "theirs"):
        findings = find(study, key, vote_for(study, key, lambda *_, winner=winner: winner), 0.25)
        assert {result.win_rate for result in findings.results} == {float(winner == "ours")}
        assert report.write(findings, tmp_path / winner).is_file()


def test_the_published_rates_stand_at_their_question_benchmark_and_baseline():
    from xdpo.report.published import published_user_study

    assert published_user_study("hpsv2", "preference", "sd15") == 0.764
    assert published_user_study("hpsv2", "alignment", "sd15") is None
    assert published_user_study("partiprompts", "preference", "sd15") is None
    assert published_user_study("hpsv2", "preference", "diffusion_kto") is None


# --- the form, ties, times -------------------------------------------------------------------------------

FORM = """
questions:
  - id: realism
    text: Which image looks more like a photograph?
  - id: match
    text: Which image shows what the text says?
    check: true
tie: About the same
instructions: Look closely.
consent: I agree.
example: {prompt: a fox, left: fox.png, right: boat.png, words: The left one is a fox.}
completion_code: C1X7
completion_link: https://example.org/done
"""


def read_text_form(tmp_path, text):
    (tmp_path / "form.yaml").write_text(text)
    return read_form(tmp_path / "form.yaml")


@pytest.fixture
def formed(tmp_path, folders):
    """A study by FORM, with three votes on each of two pairs and a check."""
    for name, colour in (("fox.png", "red"), ("boat.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    plan = StudyPlan({"set_a": 2}, 0, 3, 3, 0, 1, None, form=read_text_form(tmp_path, FORM))
    return build_study(tmp_path / "formed", folders[0], folders[1:2], plan)


def test_a_form_says_what_is_asked_and_shown(formed):
    assert formed.form == Study.load(formed.folder).form and formed.form.check == "match"
    first = Ballots(formed).state(1)
    assert [question["id"] for question in first["questions"]] == ["realism", "match"] and first["tie"]
    assert "check" not in first["questions"][1]
    assert first["introduction"] == {
        "instructions": "Look closely.",
        "consent": "I agree.",
        "example": {"prompt": "a fox", "words": "The left one is a fox."},
    }
    colours = [Image.open(formed.folder / "example" / f"{side}.png").getpixel((0, 0)) for side in ("left", "right")]
    assert colours == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tie: true", "tie must be text, got True; put it into quotation marks"),
        ("ties: same", "unknown key 'ties'; choose from questions, tie, "),
        ("tie: a\ntie: b", "key 'tie' is given twice"),
        ("tie: [", "not valid YAML: line 1"),
        ("questions: []", "questions must be a list, each with id and text"),
        ("questions: [{id: a}]", "questions, number 1 needs an id and a text"),
        ("questions: [{id: a b, text: c}]", "an id is one word of letters and digits, got 'a b'"),
        ("questions: [{id: a, text: c}, {id: a, text: d}]", "two questions have the id 'a'"),
        ("questions: [{id: a, text: c, check: 'yes'}]", "check must be true or false, got 'yes'"),
        ("example: {prompt: a fox}", "example needs prompt, words, left and right"),
        ("completion_link: javascript:alert(1)", "completion_link must begin with https://"),
        ("- tie", "the file must hold questions, tie, "),
        ("", "Is a directory"),
    ],
)
def test_a_form_that_cannot_be_used_is_said_in_words(tmp_path, text, message):
    with pytest.raises(FormError, match=re.escape(message)):
        read_text_form(tmp_path, text) if text else read_form(tmp_path)


def test_an_obvious_pair_needs_a_question_about_the_prompt(tmp_path, folders):
    form = read_text_form(tmp_path, "questions: [{id: realism, text: Which is real}]")
    with pytest.raises(StudyError, match=r"add check: true to one that does \(realism\), or set --obvious 0"):
        build_study(tmp_path / "study", folders[0], folders[1:], replace(PLAN, form=form))


def test_the_first_page_comes_before_the_first_vote_and_a_code_after_the_last(formed):
    ballots = Ballots(formed)
    ballot = {"answers": {"realism": "tie", "match": "left"}, "display": {"width": 300, "height": 200, "ratio": 2}}
    with pytest.raises(StudyError, match="first page comes before the first vote"):
        ballots.vote(1, ballot | {"task": formed.tasks[0][0].task})
    assert ballots.begin(1)["introduction"] is None and ballots.state(2)["introduction"]
    for task in formed.tasks[0]:
        state = ballots.vote(1, ballot | {"task": task.task})
    assert (state["code"], state["link"]) == ("C1X7", "https://example.org/done")
    assert {vote.display for vote in VoteStore(formed).all()} == {Display(300, 200, 2)}
    with pytest.raises(StudyError, match="must be left or right or tie, got 'both'"):
        formed.check_answers({"realism": "both", "match": "left"})


def test_everybody_has_a_code_of_their_own_where_the_form_has_none(study):
    codes = Links.load(study.folder).codes
    assert len(set(codes)) == 4 and all(re.fullmatch("[2-9A-Z]{8}", code) for code in codes)


def formed_votes(study, answers, display=None):
    """answers: (key of the prompt, or "obvious", question) → one of "ours", "theirs", "tie" for each annotator."""
    key, votes = Key.load(study), []
    for number, tasks in enumerate(study.tasks, start=1):
        for task in tasks:
            item = key.items[task.item]
            given = {}
            for question in ("realism", "match"):
                label = answers["obvious" if item.kind == "obvious" else item.key, question][number - 1]
                sides = {item.images[task.left]: "left", item.images[task.right]: "right", "tie": "tie"}
                given[question] = sides[label]
            votes.append(Vote(task.task, number, given, 10.0**number, "2026-01-01T00:00:00Z", display))
    return votes


def test_ties_times_and_disputes_by_hand(tmp_path, formed):
    answers = {
        ("style/0", "realism"): ["ours", "ours", "tie"],
        ("style/1", "realism"): ["tie", "tie", "theirs"],
        ("style/0", "match"): ["ours", "ours", "ours"],
        ("style/1", "match"): ["ours", "tie", "theirs"],
        ("obvious", "realism"): ["right", "right", "right"],
        ("obvious", "match"): ["right", "wrong", "tie"],
    }
    findings = find(formed, Key.load(formed), formed_votes(formed, answers, Display(300, 200, 2)), 0.25)
    realism, match = (r for r in findings.results if r.category == "all")
    assert (realism.wins, realism.losses, realism.undecided, realism.votes, realism.ties) == (1, 0, 1, 6, 3)
    assert (match.wins, match.losses, match.undecided, match.ties) == (1, 0, 1, 1)
    assert realism.vote_rate == pytest.approx(3.5 / 6)
    # Fleiss: agreement 1/3 and 1/3; by chance (2/6)² + (1/6)² + (3/6)².
    assert realism.kappa == pytest.approx((1 / 3 - 14 / 36) / (1 - 14 / 36))
    assert [(c.obvious_failed, c.seconds, c.width) for c in findings.checks] == [
        (0, 10.0, 300),
        (1, 100.0, 300),
        (1, 1000.0, 300),
    ]
    assert analysis.hasty(findings.checks) == [1] and findings.excluded == [2, 3]
    key = Key.load(formed)
    disputed = [(key.items[d.item].key, d.question, d.model, d.ties, d.baseline) for d in findings.disputes]
    assert disputed[0] == ("style/1", "match", 1, 1, 1)
    assert set(disputed[1:]) == {("style/0", "realism", 2, 1, 0), ("style/1", "realism", 0, 2, 1)}

    path = report.write(findings, tmp_path / "report")
    html, text = path.read_text(), path.with_suffix(".md").read_text()
    assert html.count("data:image/png;base64,") == 2 * 2  # two pairs are in dispute, one on both questions
    assert "Which image shows what the text says? ours <b>1</b>, theirs <b>1</b>, ties <b>1</b>" in html
    assert "| match | set_a | style/1 | two blue boats | theirs | 1 | 1 | 1 |" in text
    assert "A pair was on the screen for 100.0 s (median; half of them 10.0 to 1000.0 s)." in text
    assert "| 1 | 3 | 0 of 1 | 0 of 0 | 10.0 | 300 | fast |" in text


def test_a_study_of_before_the_first_page_opens_and_is_analysed(tmp_path, study):
    """Its study.json has no form, its links no codes, its votes no size."""
    path = study.folder / "study.json"
    content = json.loads(path.read_text())
    for name in ("tie", "introduction", "completion_link"):
        del content[name]
    path.write_text(json.dumps(content))
    links = json.loads((study.folder / "links.json").read_text())
    del links["codes"]
    (study.folder / "links.json").write_text(json.dumps(links))
    task = study.tasks[0][0].task
    with sqlite3.connect(study.folder / "votes.sqlite") as connection:
        connection.executescript(
            "CREATE TABLE study (id TEXT PRIMARY KEY); CREATE TABLE votes (number INTEGER PRIMARY KEY AUTOINCREMENT, "
            "task TEXT NOT NULL UNIQUE, annotator INTEGER NOT NULL, answers TEXT NOT NULL, seconds REAL, "
            "at TEXT NOT NULL)"
        )
        connection.execute("INSERT INTO study VALUES (?)", [study.id])
        answers = json.dumps({"alignment": "left", "preference": "right"})
        row = [task, 1, answers, 2.5, "2026-01-01T00:00:00Z"]
        connection.execute("INSERT INTO votes (task, annotator, answers, seconds, at) VALUES (?, ?, ?, ?, ?)", row)
    connection.close()

    old = Study.load(study.folder)
    ballots = Ballots(old)
    state = ballots.state(1)
    assert (state["done"], state["introduction"], state["tie"]) == (1, None, None)
    for task in old.tasks[0][1:]:
        answers = {"preference": "left", "alignment": "left"}
        state = ballots.vote(
            1, {"task": task.task, "answers": answers, "display": {"width": 5, "height": 5, "ratio": 1}}
        )
    assert state["task"] is None and state["code"] is None
    assert [vote.display for vote in ballots.store.all()[:2]] == [None, Display(5, 5, 1)]
    assert report.write(find(old, Key.load(old), ballots.store.all(), 0.25), tmp_path / "report").is_file()
    assert export(old, tmp_path / "static", [2])[0].is_file()


# --- planning --------------------------------------------------------------------------------------------


def test_power_equals_simulated_studies():
    rng = np.random.default_rng(1)
    for prompts, annotators, rate in ((60, 5, 0.6), (40, 1, 0.7), (50, 4, 0.6)):
        votes = rng.binomial(annotators, rate, size=(1500, prompts))
        wins, losses = (2 * votes > annotators).sum(1), (2 * votes < annotators).sum(1)
        seen = [binomtest(int(w), int(w + n)).pvalue < 0.05 for w, n in zip(wins, losses, strict=True)]
        assert power.power(prompts, annotators, rate).power == pytest.approx(np.mean(seen), abs=4 * 0.5 / 1500**0.5)


def test_majorities_of_alike_votes_tell_little_more_than_one():
    alone = power.power(100, 1, 0.6).majority_rate
    assert alone == pytest.approx(0.6)
    assert power.power(100, 5, 0.6).majority_rate == pytest.approx(0.68256, abs=1e-5)  # Σ C(5,k)·0.6^k·0.4^(5−k), k ≥ 3
    assert alone < power.power(100, 5, 0.6, spread=0.3).majority_rate < 0.65


def test_the_fewest_prompts_reach_the_power_and_some_fewer_do_not():
    needed = power.prompts_needed(5, 0.6)
    assert power.power(needed, 5, 0.6).power >= 0.8 > power.power(needed - 10, 5, 0.6).power
    assert 8192 < power.prompts_needed(1, 0.5148) < power.MOST_PROMPTS
    assert power.prompts_needed(1, 0.501) is None


@pytest.mark.parametrize(
    "numbers", [(0, 5, 0.6), (10, 0, 0.6), (10, 5, 1.0), (10, 5, 0.6, -0.1), (10, 5, 0.6, float("nan"))]
)
def test_impossible_plans_are_refused(numbers):
    with pytest.raises(ValueError, match="planning needs"):
        power.power(*numbers)


def test_the_pages_that_the_server_and_the_export_name_are_there():
    from xdpo.study.server import PAGES, STATIC
    from xdpo.study.static import PAGE_FILES

    assert all((PAGES / name).is_file() for name in {*STATIC, *PAGE_FILES, "page.html", "admin.html"})
    assert isinstance(PAGES, Path)


# --- the command -----------------------------------------------------------------------------------------


def test_the_commands_from_folders_to_a_report(tmp_path, folders, capsys):
    ours, theirs, others = (str(folder) for _, folder in folders)
    study = str(tmp_path / "study")
    sample = ["--sample", "1", "--seed", "7", "--annotators", "2", "--links", "3", "--repeats", "1", "--obvious", "1"]
    assert user_study.main(["build", "--a", f"xdpo={ours}", "--b", theirs, "--c", others, *sample, "--out", study]) == 0
    assert "4 pairs, 2 votes each, 3 annotators with 4 or 5 tasks" in capsys.readouterr().out
    built = Study.load(Path(study))
    key = Key.load(built)
    assert (key.model, key.baselines, built.form.questions) == ("xdpo", ["theirs", "others"], list(QUESTIONS))
    assert Counter(item.benchmark for item in key.items.values() if item.kind == "pair") == {"set_a": 2, "set_b": 2}

    assert user_study.main(["export", study, "--static", str(tmp_path / "out"), "--annotator", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "annotator_02" / "index.html")
    file = saved_file(tmp_path, built, 2, vote_for(built, key, lambda *_: "xdpo", annotators={2}))
    assert user_study.main(["import", study, str(file)]) == 0
    assert f"{len(built.tasks[1])} new votes, 0 known" in capsys.readouterr().out
    assert user_study.main(["analyze", study]) == 0
    assert (tmp_path / "study" / "report" / "report.md").is_file() and "against" in capsys.readouterr().out
    assert user_study.main(["plan", "--rate", "0.6", "--annotators", "5", "--prompts", "200"]) == 0
    assert "99.3 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "--a", "none", "--b", "none2", "--output", "new"], "no image folder none"),
        (
            ["build", "--a", "ours", "--b", "theirs", "--output", "new", "--sample", "1", "2"],
            "--sample takes one number",
        ),
        (["build", "--a", "ours", "--b", "theirs", "--output", "study"], "votes may be in it"),
        (["import", "study", "none.json"], "none.json holds no votes"),
        (["analyze", "none"], "no study in none"),
        (["serve", "study", "--port", "70000"], "choose another --host or --port"),
        (["plan", "--rate", "0"], "a rate between 0 and 1"),
        (["demo", "--images", "none", "--output", "new"], "make them with: bash scripts/tiny_chain.sh"),
    ],
)
def test_what_the_commands_cannot_do_is_said_in_words(tmp_path, study, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert user_study.main(arguments) == 1
    assert words in capsys.readouterr().err


def test_the_demo_is_built_once_served_and_opened(tmp_path, capsys, monkeypatch):
    prompts, opened = {("tinyprompts", "single object"): [f"ring number {n}" for n in range(14)]}, []
    for name in ("xdpo", "base", "diffusion_dpo"):
        make_images(tmp_path / "images" / name, name, prompts, side=8)
    monkeypatch.setattr("xdpo.study.server.serve", lambda folder, host, port, started: started("http://here"))
    monkeypatch.setattr(user_study.webbrowser, "open", opened.append)
    arguments = ["demo", "--images", str(tmp_path / "images"), "--output", str(tmp_path / "study")]
    assert user_study.main(arguments) == 0 and "24 pairs, 2 votes each" in capsys.readouterr().out
    links = Links.load(tmp_path / "study")
    assert opened == [f"http://here/a/{links.annotators[0]}"]
    assert user_study.main([*arguments, "--no-browser"]) == 0 and len(opened) == 1
    assert f"administrator  http://here/admin/{links.administrator}" in capsys.readouterr().out
