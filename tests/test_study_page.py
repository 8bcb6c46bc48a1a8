"""The user study's page in a real browser, with the study's server and as a folder without one.

Needs Chromium with its driver and selenium (browser.py).
"""

import base64
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from browser import needs_browser, start
from PIL import Image, ImageDraw

from xdpo.study.build import StudyPlan, build_study
from xdpo.study.folder import Key, Links
from xdpo.study.form import QUESTIONS, Form, Introduction
from xdpo.study.server import application
from xdpo.study.static import export, import_votes
from xdpo.study.votes import VoteStore

pytestmark = needs_browser

HOSTILE = "</script><img src=x onerror=document.title='hurt'> & \"quotes\" <b>tags</b>"
TITLE = "Which image is <b>better</b>?"
MODELS = {"xdpo": "#a33", "thebaseline": "#38a"}
ITEMS, ANNOTATORS = 4, 2
SHOTS = os.environ.get("STUDY_SHOTS")
PHONE = {"width": 375, "height": 667, "deviceScaleFactor": 2, "mobile": True}


def make_images(folder, colour):
    """What generate.py leaves: a manifest and an image for each prompt, here with owls that differ in size."""
    rows = []
    for number in range(ITEMS):
        image = Image.new("RGB", (256, 256), colour)
        ImageDraw.Draw(image).ellipse((30, 30, 200 - 20 * number, 200), fill="#fd8")
        file = f"secretstyle/{number:05d}.png"
        (folder / "secretbench" / file).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / "secretbench" / file)
        row = {"file": file, "category": "secretstyle", "index": number, "model": folder.name}
        rows.append(row | {"prompt": f"a painting of {number + 1} owls at night {HOSTILE}"})
    (folder / "secretbench" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def study(tmp_path):
    """Four pairs, each of which both annotators see."""
    for name, colour in MODELS.items():
        make_images(tmp_path / name, colour)
    (model, *baselines) = [(name, tmp_path / name) for name in MODELS]
    plan = StudyPlan(None, 0, ANNOTATORS, ANNOTATORS, repeats=0, obvious=0, image_side=None, title=TITLE)
    return build_study(tmp_path / "study", model, baselines, plan)


class Served:
    """A study being served, and the votes that are on the disk."""

    def __init__(self, study):
        self.study = study
        self.server = uvicorn.Server(uvicorn.Config(application(study.folder), port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        links = Links.load(study.folder)
        address = f"http://127.0.0.1:{port}"
        self.links = {number: f"{address}/a/{token}" for number, token in enumerate(links.annotators, start=1)}
        self.admin = f"{address}/admin/{links.administrator}"

    def stored(self, annotator):
        return [vote for vote in VoteStore(self.study).all() if vote.annotator == annotator]

    def votes(self, annotator):
        return [(vote.answers["preference"], vote.answers["alignment"]) for vote in self.stored(annotator)]

    def stop(self):
        self.server.should_exit = True
        self.thread.join(timeout=10)


@pytest.fixture
def served(study):
    served = Served(study)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def driver():
    driver = start("1280,900", "browser", "performance")
    yield driver
    driver.quit()


class Page:
    """What a person does and sees, by element id."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, address):
        self.driver.get(address)
        self.wait("return document.querySelector('.screen:not([hidden])') !== null")

    def wait(self, script, seconds=10):
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, (
                f"never true: {script}; the page says {self.run('return document.body.innerText')}"
            )
            time.sleep(0.02)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).innerText.trim()", name)

    def shown(self, name):
        return self.run("return document.getElementById(arguments[0]).checkVisibility()", name)

    def click(self, selector):
        element = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def images(self):
        """Waits until both images are there."""
        self.wait("return document.querySelectorAll('.frame img').length === 2")

    def chosen(self):
        return self.run("return [...document.querySelectorAll('#questions :checked')].map((input) => input.value)")

    def answer(self, preference, alignment):
        """One pair by mouse; comes back when the next screen stands."""
        self.images()
        before = self.text("count")
        for question, side in (("preference", preference), ("alignment", alignment)):
            self.click(f"#questions label:has([name={question}][value={side}])")
        self.click("#submit")
        self.wait(f"return document.getElementById('count').innerText !== {json.dumps(before)}")

    def focused(self):
        return self.run("return document.activeElement.id || document.activeElement.name")

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def network(self, **conditions):
        self.driver.execute_cdp_cmd("Network.enable", {})
        usual = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", usual | conditions)

    def shot(self, name):
        """For people to look at, where STUDY_SHOTS names a folder."""
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(f"{SHOTS}/{name}.png")


def lose_next_reply(page):
    """The next request reaches the server; its answer does not come back."""
    page.run("""
        const real = window.fetch;
        window.fetch = async (...request) => {
            await real(...request);
            window.fetch = real;
            throw new TypeError("cut");
        };""")


def may_leave(page):
    """Whether the browser would close the page without asking."""
    return page.run("return dispatchEvent(new Event('beforeunload', {cancelable: true}))")


@pytest.fixture
def page(driver):
    page = Page(driver)
    page.errors()  # what an earlier test left
    yield page
    page.network()
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    driver.get("about:blank")


def test_a_pair_is_shown_with_its_prompt_and_both_questions_and_no_error(page, served):
    page.open(served.links[1])
    page.images()
    first = served.study.tasks[0][0]
    assert page.text("prompt-text") == served.study.prompts[first.item]
    assert page.text("title") == TITLE
    legends = page.run("return [...document.querySelectorAll('legend')].map((legend) => legend.innerText)")
    assert legends == [question["text"] for question in QUESTIONS]
    assert page.text("count") == "0 of 4 answered"
    assert page.errors() == []
    page.shot("desktop")


def test_two_annotators_one_of_whom_leaves_in_the_middle_and_returns(page, served):
    page.open(served.links[1])
    page.answer("left", "right")
    page.answer("right", "right")
    page.run("localStorage.clear()")  # as on another device
    page.driver.get("about:blank")
    page.open(served.links[2])
    for _ in range(ITEMS):
        page.answer("right", "left")
    assert page.text("end-title") == "Thank you!"
    page.shot("end")
    page.open(served.links[1])
    assert page.text("count") == "2 of 4 answered"
    assert "Pair" not in page.text("message")
    page.answer("left", "left")
    page.answer("left", "left")
    assert page.text("end-title") == "Thank you!"
    assert served.votes(1) == [("left", "right"), ("right", "right"), ("left", "left"), ("left", "left")]
    assert served.votes(2) == [("right", "left")] * ITEMS
    page.click("#undo")  # from the thanks, too
    page.wait("return document.getElementById('ballot').checkVisibility()")
    assert len(served.votes(1)) == ITEMS - 1


def test_the_keyboard_alone_is_enough(page, served):
    page.open(served.links[1])
    page.images()
    assert page.focused() == "prompt"
    page.press("\ue014")  # →
    page.press("\ue012")  # ←
    assert page.chosen() == ["right", "left"]
    page.press("\ue007")  # Enter
    page.wait("return document.getElementById('count').innerText.startsWith('1')")
    page.images()
    assert page.focused() == "prompt"
    assert page.text("message") == "Answer recorded. Pair 2 of 4."
    for key in "1243":
        page.press(key)
    assert page.chosen() == ["right", "left"]
    page.shot("keyboard")
    page.press("\ue007")
    page.wait("return document.getElementById('count').innerText.startsWith('2')")
    page.images()
    for key in ("l", "\ue014", "\ue00c"):  # enlarge, the other one, Escape
        page.press(key)
    assert not page.shown("zoom")
    page.press("p")
    assert page.text("break").startswith("Paused")
    page.press("\ue004", "\ue007")  # Tab to “Continue”, Enter
    assert page.shown("ballot")
    # The way of a screen reader: Tab to each group, a space or an arrow to choose, Tab on to the button.
    while page.focused() != "preference":
        page.press("\ue004")
    page.press(" ")
    page.press("\ue004")
    assert page.focused() == "alignment"
    page.press("\ue014")
    assert page.chosen() == ["left", "right"]
    while page.focused() != "submit":
        page.press("\ue004")
    page.press("\ue007")
    page.wait("return document.getElementById('count').innerText.startsWith('3')")
    assert served.votes(1) == [("right", "left"), ("right", "left"), ("left", "right")]


def test_a_screen_reader_is_told_what_everything_is(page, served):
    page.open(served.links[1])
    page.images()
    told: dict[str, list[str]] = {}
    for node in page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]:
        if not node["ignored"]:
            told.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", "").strip())
    assert f"Prompt: {served.study.prompts[served.study.tasks[0][0].item]}" in told["heading"]
    assert [name for name in told["group"] if name] == [question["text"] for question in QUESTIONS]
    assert told["radio"] == ["Left image", "Right image"] * len(QUESTIONS)
    assert told["button"] == ["Left image", "Right image", "Pause", "Submit"]
    assert told["image"] == ["Left image", "Right image"] and told["progressbar"] == ["Pairs answered"]
    assert "status" in told  # what happened is said without being looked for


def test_undo_brings_the_last_pair_back_with_its_answers_to_be_changed(page, served):
    page.open(served.links[1])
    page.images()
    assert not page.run("return document.getElementById('undo').checkVisibility()")
    page.answer("left", "right")
    page.answer("right", "right")
    page.click("#undo")
    page.wait("return document.getElementById('count').innerText.startsWith('1')")
    assert served.votes(1) == [("left", "right")]
    assert page.chosen() == ["right", "right"]
    assert "withdrawn" in page.text("message")
    page.images()
    page.shot("undo")
    page.answer("right", "left")
    page.images()
    page.press("z")
    page.wait("return document.getElementById('count').innerText.startsWith('1')")
    page.press("\ue003")  # Backspace
    page.wait("return document.getElementById('count').innerText.startsWith('0')")
    assert served.votes(1) == []
    page.press("z")
    page.answer("left", "left")
    assert served.votes(1) == [("left", "left")]


def test_an_unanswered_question_is_asked_for_in_words_and_nothing_is_sent(page, served):
    page.open(served.links[1])
    page.images()
    page.click("#submit")
    assert QUESTIONS[0]["text"] in page.text("message")
    assert page.focused() == "preference"
    page.press("1")
    page.click("#submit")
    assert QUESTIONS[1]["text"] in page.text("message")
    assert served.votes(1) == []


def test_no_vote_is_taken_before_both_images_are_seen(page, served):
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/image/*/right"]})
    try:
        page.open(served.links[1])
        page.wait("return document.getElementById('trouble').checkVisibility()")
        assert "did not load" in page.text("trouble")
        for key in ("1", "3", "\ue007"):
            page.press(key)
        assert page.text("message") == "The images are still loading."
        page.shot("image_missing")
    finally:
        page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.click("#retry")
    page.images()
    assert not page.shown("trouble")
    assert served.votes(1) == []
    page.press("\ue007")
    page.wait("return document.getElementById('count').innerText.startsWith('1')")


def test_a_vote_without_connection_is_kept_and_sent_again_once(page, served):
    page.open(served.links[1])
    page.images()
    page.press("1")
    page.press("4")
    page.network(offline=True)
    page.press("\ue007")
    page.wait("return document.getElementById('trouble').checkVisibility()")
    assert "kept" in page.text("trouble")
    assert page.chosen() == ["left", "right"]
    page.click("#questions label:has([name=preference][value=right])")
    assert page.chosen() == ["left", "right"]  # what is being sent
    page.shot("offline")
    page.network()
    page.wait("return document.getElementById('count').innerText.startsWith('1')")
    assert not page.shown("trouble")
    assert served.votes(1) == [("left", "right")]


def test_a_vote_that_never_got_out_is_sent_when_the_page_is_opened_again(page, served):
    page.open(served.links[1])
    page.images()
    page.press("2")
    page.press("4")
    assert may_leave(page)
    page.run("window.fetch = async () => { throw new TypeError('cut'); }")
    page.press("\ue007")
    page.wait("return document.getElementById('trouble').checkVisibility()")
    assert not may_leave(page)
    page.driver.get("about:blank")
    assert served.votes(1) == []
    page.open(served.links[1])
    page.wait("return document.getElementById('count').innerText.startsWith('1')")
    assert served.votes(1) == [("right", "right")]
    page.open(served.links[1])
    assert page.text("count") == "1 of 4 answered"


def test_a_kept_vote_that_the_server_refuses_is_said_in_words_and_the_study_goes_on(page, served):
    page.open(served.links[1])
    page.run("localStorage.setItem('image-study/unsent' + location.pathname, JSON.stringify({task: 'x', answers: {}}))")
    page.open(served.links[1])
    page.wait("return document.getElementById('message').innerText !== ''")
    assert page.text("message").endswith("Your answer was not used.")
    page.answer("left", "left")
    assert served.votes(1) == [("left", "left")]


def test_a_pair_answered_in_another_tab_is_said_in_words_and_the_study_goes_on(page, served):
    page.open(served.links[1])
    page.images()
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open(served.links[1])
    page.answer("left", "left")
    page.driver.close()
    page.driver.switch_to.window(first)
    for key in ("2", "4", "\ue007"):
        page.press(key)
    page.wait("return document.getElementById('count').innerText.startsWith('1')")
    assert "not used" in page.text("message")
    assert served.votes(1) == [("left", "left")]


def test_a_vote_whose_reply_was_lost_counts_once(page, served):
    page.open(served.links[1])
    page.images()
    lose_next_reply(page)
    page.answer("left", "right")
    assert served.votes(1) == [("left", "right")]
    assert page.text("count") == "1 of 4 answered"


def test_a_server_in_trouble_is_quoted_and_asked_again(page, served):
    page.open(served.links[1])
    page.images()
    page.run("""
        const real = window.fetch;
        window.fetch = async () => {
            window.fetch = real;
            return new Response('{"error": "the disk is full"}', {status: 503});
        };""")
    for key in ("2", "3", "\ue007"):
        page.press(key)
    page.wait("return document.getElementById('trouble').checkVisibility()")
    assert "the disk is full" in page.text("trouble")
    page.wait("return document.getElementById('count').innerText.startsWith('1')")
    assert served.votes(1) == [("right", "left")]


def test_an_undo_whose_reply_was_lost_takes_back_one_answer(page, served):
    page.open(served.links[1])
    page.answer("left", "left")
    page.answer("left", "left")
    lose_next_reply(page)
    page.press("z")
    page.wait("return document.getElementById('count').innerText.startsWith('1')")
    assert "connection was cut" in page.text("message")
    assert len(served.votes(1)) == 1


def test_a_link_that_stops_being_known_is_said_in_words(page, served):
    page.open(served.links[1])
    page.images()
    page.run("window.fetch = async () => new Response('', {status: 404})")
    for key in ("1", "3", "\ue007"):
        page.press(key)
    page.wait("return document.getElementById('failure').checkVisibility()")
    assert "link is not known" in page.text("failure")


def test_no_prompt_or_title_becomes_markup(page, served):
    page.open(served.links[1])
    assert HOSTILE in page.text("prompt-text")
    assert page.run("return document.querySelectorAll('#prompt-text *, #title *').length") == 0
    assert page.run("return document.title") == TITLE


def test_both_images_have_the_same_size_and_fit_a_phone(page, served):
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page.open(served.links[1])
        page.images()
        page.shot("phone")
        sizes = page.run(
            "return [...document.querySelectorAll('.frame img')].map((i) => [i.clientWidth, i.clientHeight])"
        )
        assert sizes[0] == sizes[1] and sizes[0][0] >= 170
        assert page.run("return document.documentElement.scrollWidth") == 375
        low = page.run("return Math.min(...[...document.querySelectorAll('label, #bar button')].filter("
                       "(e) => e.checkVisibility()).map((e) => e.getBoundingClientRect().height))")  # fmt: skip
        assert low >= 44  # what a finger needs
        page.click("#left")
        assert page.run("return document.querySelector('#zoomed img').clientWidth") >= 350
        page.shot("phone_zoom")
        page.click("#zoom-close")
        page.answer("left", "right")
        page.shot("phone_next")
    finally:
        page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert served.votes(1) == [("left", "right")]


def contrast(one, other):
    """WCAG's contrast of two CSS colours."""

    def luminance(colour):
        red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_surround_is_the_same_grey_and_everything_readable_in_both_modes(page, served, mode):
    features = [{"name": "prefers-color-scheme", "value": mode}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.open(served.links[1])
    page.images()
    page.press("1")
    page.shot(mode)
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(110, 110, 110)"
    texts = page.run("""
        document.getElementById('help').open = true;
        const behind = (element) => {
            for (let e = element; e; e = e.parentElement) {
                const colour = getComputedStyle(e).backgroundColor;
                if (colour !== 'rgba(0, 0, 0, 0)') return colour;
            }
        };
        return [...document.querySelectorAll('body *')]
            .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
            .map((e) => [e.textContent, getComputedStyle(e).color, behind(e)]);""")
    assert len(texts) > 15
    assert [text for text, ink, ground in texts if contrast(ink, ground) < 4.5] == []


def test_an_image_is_enlarged_and_switched_in_place(page, served):
    page.open(served.links[1])
    page.images()
    left, right = page.run("return [...document.querySelectorAll('.frame img')].map((image) => image.src)")
    small = page.run("return document.querySelector('.frame img').clientHeight")
    page.click("#left")
    assert page.text("zoom-title") == "Left image"
    assert page.run("return document.querySelector('#zoomed img').src") == left
    assert page.run("return document.querySelector('#zoomed img').clientHeight") > small
    page.shot("zoom")
    page.press("\ue014")
    assert page.text("zoom-title") == "Right image"
    assert page.run("return document.querySelector('#zoomed img').src") == right
    page.press("\ue00c")
    assert page.focused() == "left"
    assert page.chosen() == []


def test_the_next_images_are_there_before_they_are_wanted(page, served):
    page.open(served.links[1])
    page.images()
    page.wait("return performance.getEntriesByType('resource').filter((e) => e.name.includes('/image/')).length >= 4")
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    page.answer("left", "left")
    page.images()
    shown = page.run("return [...document.querySelectorAll('.frame img')].map((image) => image.src)")
    assert set(shown) <= set(loaded)


def test_pausing_stops_the_clock(page, served):
    begin, paused = time.monotonic(), 0.7
    page.open(served.links[1])
    page.images()
    page.press("p")
    page.shot("pause")
    time.sleep(paused)
    page.click("#continue")
    page.answer("left", "left")
    assert 0 < served.stored(1)[0].seconds < time.monotonic() - begin - paused


def test_the_keys_can_be_switched_off(page, served):
    page.open(served.links[1])
    page.images()
    page.click("#help summary")
    page.shot("help")
    page.click("#shortcuts")
    page.press("1")
    page.press("p")
    assert page.chosen() == []
    assert page.shown("ballot")


def test_the_administrator_sees_the_progress_and_copies_links(page, served):
    page.open(served.links[1])
    page.answer("left", "right")
    page.driver.get(served.admin)
    page.wait("return document.querySelectorAll('#annotators tr').length === 2")
    assert page.text("votes") == "1 of 8"
    assert page.text("items") == "0 of 4"
    assert "1 of 4" in page.run("return document.querySelector('#annotators tr').innerText")
    page.shot("admin")
    assert page.errors() == []
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    assert page.run("return document.documentElement.scrollWidth") == 375


@pytest.fixture
def folder(study, tmp_path):
    """The second annotator's page as a folder."""
    (page,) = export(study, tmp_path / "exported", [2])
    return page.as_uri()


@pytest.fixture
def downloads(driver, tmp_path):
    driver.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    return tmp_path


def downloaded(folder):
    end = time.monotonic() + 10
    while not (files := list(folder.glob("votes-*.json"))):
        assert time.monotonic() < end, "nothing was downloaded"
        time.sleep(0.05)
    return files[0]


def test_without_a_server_votes_stay_in_the_browser_and_come_back_as_a_file(page, study, folder, downloads):
    page.open(folder)
    assert HOSTILE in page.text("prompt-text") and page.text("title") == TITLE
    page.answer("left", "right")
    page.answer("right", "right")
    page.shot("static")
    page.driver.get("about:blank")
    page.open(folder)
    assert page.text("count") == "2 of 4 answered"
    page.images()
    page.press("z")
    page.wait("return document.getElementById('count').innerText.startsWith('1')")
    assert page.chosen() == ["right", "right"]
    for _ in range(3):
        page.answer("left", "left")
    assert "save your votes" in page.text("end-words")
    page.shot("static_end")
    page.click("#save")
    assert import_votes(study, downloaded(downloads)) == (ITEMS, 0)
    votes = VoteStore(study).all()
    assert [vote.task for vote in votes] == [task.task for task in study.tasks[1]]
    assert [tuple(vote.answers.values()) for vote in votes] == [("right", "left")] + [("left", "left")] * 3
    assert page.errors() == []


def test_without_lasting_storage_the_page_says_so_and_still_saves(page, study, folder, downloads):
    broken = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})"
    script = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": broken})
    try:
        page.open(folder)
        assert "keeps nothing" in page.text("forgetful")
        page.answer("left", "right")
        page.shot("static_no_storage")
        page.click("#save")
        assert import_votes(study, downloaded(downloads)) == (1, 0)
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


FORM = Form(
    questions=({"id": "preference", "text": "Which one?"}, {"id": "alignment", "text": "Which matches?"}),
    tie="About the same",
    introduction=Introduction(),
    completion_link="https://example.org/done",
    completion_code="C1X7",
)


@pytest.fixture
def formed(study, tmp_path):
    """The study with a first page, a tie and a code."""
    (model, *baselines) = [(name, tmp_path / name) for name in MODELS]
    plan = StudyPlan({"secretbench": 2}, 0, 2, 2, 0, 0, image_side=None, form=FORM)
    return build_study(tmp_path / "formed", model, baselines, plan)


def agree_and_answer(page):
    """Read the first page, be asked to agree to it, agree; then two pairs by keyboard, each with a tie."""
    page.wait("return [...document.querySelectorAll('#example img')].every((image) => image.naturalWidth === 512)")
    page.shot("introduction")
    assert "a red circle above a blue square" in page.text("introduction") and "2 pairs" in page.text("introduction")
    page.click("#consent button")
    assert page.text("message") == "Please tick the box to begin." and page.focused() == "agree"
    page.press(" ", "\ue007")  # a tick, Enter
    page.wait("return document.getElementById('ballot').checkVisibility()")
    for number in (1, 2):
        page.images()
        page.press("2")
        page.press("\ue014" if number == 1 else "\ue015")  # →, ↓
        assert page.chosen() == ["tie", "right" if number == 1 else "tie"]
        page.shot("tie")
        page.press("\ue007")
        page.wait(f"return document.getElementById('count').innerText.startsWith('{number}')")
    assert page.text("code") == "C1X7"
    assert page.run("return document.getElementById('link').href") == FORM.completion_link
    page.shot("completion")


def check_ties(votes):
    assert [tuple(vote.answers.values()) for vote in votes] == [("right", "tie"), ("tie", "tie")]  # by question's name
    assert all(vote.display.width == vote.display.height > 200 for vote in votes)


def test_the_first_page_a_tie_and_the_code_at_the_end(page, formed):
    served = Served(formed)
    try:
        page.open(served.links[1])
        agree_and_answer(page)
        check_ties(served.stored(1))
        page.open(served.links[2])
        assert page.shown("introduction")
        assert page.errors() == []
    finally:
        served.stop()


def test_the_first_page_without_a_server(page, formed, tmp_path, downloads):
    (exported,) = export(formed, tmp_path / "exported", [2])
    page.open(exported.as_uri())
    agree_and_answer(page)
    page.open(exported.as_uri())
    assert page.text("code") == "C1X7"
    page.click("#save")
    assert import_votes(formed, downloaded(downloads)) == (2, 0)
    check_ties(VoteStore(formed).all())
    assert VoteStore(formed).has_agreed(2)


def tells(study):
    """Words that would tell an annotator whose image is which, or what the checks are."""
    key = Key.load(study)
    names = [name for item in key.items.values() for name in item.images]
    return [*MODELS, "secretbench", "secretstyle", str(study.folder.parent), *key.items, *names]


def chunks(png):
    """The kinds of a PNG's chunks."""
    place, kinds = 8, set()
    while place < len(png):
        length = int.from_bytes(png[place : place + 4])
        kinds.add(png[place + 4 : place + 8])
        place += 12 + length
    return kinds


def test_nothing_that_the_browser_gets_tells_the_models_apart(page, served):
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.get_log("performance")  # what earlier tests left
    page.open(served.links[1])
    for _ in range(ITEMS):
        page.answer("left", "right")
    events = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    got = [event["params"] for event in events if event["method"] == "Network.responseReceived"]
    seen, images = page.driver.page_source, 0
    for params in got:
        seen += json.dumps([params["response"]["url"], params["response"]["headers"]])
        body = page.driver.execute_cdp_cmd("Network.getResponseBody", {"requestId": params["requestId"]})
        if params["type"] == "Image" and body["base64Encoded"]:
            images += 1
            assert chunks(base64.b64decode(body["body"])) == {b"IHDR", b"IDAT", b"IEND"}
        else:
            seen += body["body"]
    assert images == 2 * ITEMS
    assert "owls" in seen and "preference" in seen
    assert [word for word in tells(served.study) if word in seen] == []
    assert not re.search("last-modified|content-disposition", seen, re.IGNORECASE)
    host = re.match("http://[^/]+", served.links[1])[0]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert [url for url in asked if not url.startswith(host)] == []


def test_nothing_in_the_exported_folder_tells_the_models_apart(study, tmp_path):
    export(study, tmp_path / "exported")
    files = [path for path in (tmp_path / "exported").rglob("*") if path.is_file()]
    text = "".join(path.read_text() for path in files if path.suffix != ".png") + "".join(map(str, files))
    text = text.replace(str(tmp_path), "")
    assert "owls" in text
    assert [word for word in tells(study) if word in text] == []
    kinds = [chunks(path.read_bytes()) for path in files if path.suffix == ".png"]
    assert len(kinds) == 2 * ITEMS * ANNOTATORS
    assert set().union(*kinds) == {b"IHDR", b"IDAT", b"IEND"}
