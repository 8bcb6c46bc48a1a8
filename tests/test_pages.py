"""report.html in a real browser, from disk: sorting, filters, the image browser, the enlarged view.

Needs Chromium with its driver and selenium (browser.py).
"""

import json

import pytest
from browser import needs_browser, start
from PIL import Image

import evaluate

pytestmark = needs_browser

SCORERS = """
import numpy as np

class Red:
    def score(self, images, prompts):
        return [float(np.asarray(image)[..., 0].mean()) for image in images]

class Green:
    def score(self, images, prompts):
        return [float(np.asarray(image)[..., 1].mean()) for image in images]
"""
HOSTILE = "</script><img src=x onerror=document.title='hurt'> & \"quotes\" 'n' <b>tags</b>"
COUNT = 30  # prompts, half of them cats


def make_model(folder, prompt_set, count, colour):
    rows = []
    for number in range(count):
        category = "cats" if number < count // 2 else "big dogs"
        file = f"{category.replace(' ', '_')}/{number:05d}.png"
        path = folder / prompt_set / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour(number)).save(path)
        prompt = HOSTILE if number == 0 else f"animal number {number}"
        rows.append({"file": file, "category": category, "index": number, "prompt": prompt, "model": folder.name})
    (folder / prompt_set / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three models on two prompt sets; `after` gains most red at number 7 and loses most at 20."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "scorers.py").write_text(SCORERS)
    change = {7: 90, 20: -90}
    make_model(folder / "before", "animals", COUNT, lambda n: (100, 100 + n, 0))
    make_model(folder / "middle", "animals", COUNT, lambda n: (105, 120 - n, 0))
    make_model(folder / "after", "animals", COUNT, lambda n: (110 + change.get(n, n % 5), 100, 40))
    make_model(folder / "before", "others", 4, lambda n: (50, 50, 50))
    make_model(folder / "after", "others", 4, lambda n: (60, 40, 50))
    arguments = ["--images", *(str(folder / model) for model in ("before", "middle", "after"))]
    arguments += ["--scorers", ",".join(f"{folder / 'scorers.py'}:{name}" for name in ("Red", "Green"))]
    arguments += ["--output", str(folder / "results"), "--title", "A <i>page</i> to look at", "--embed-mb", "0.009"]
    assert evaluate.main(arguments) == 0
    return folder / "results" / "report.html"


@pytest.fixture(scope="module")
def browser(report):
    driver = start("1280,1400", "browser")
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, report):
    """The page as freshly opened; finds elements by CSS selector."""
    browser.get(report.as_uri())

    class Page:
        def all(self, selector):
            return browser.find_elements("css selector", selector)

        def texts(self, selector):
            return [element.text for element in self.all(selector)]

        def one(self, selector):
            (element,) = self.all(selector)
            return element

        def click(self, selector):
            browser.execute_script(
                "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", self.one(selector)
            )
            self.one(selector).click()

        def choose(self, name, text):
            from selenium.webdriver.support.select import Select

            Select(self.one(f"#{name}")).select_by_visible_text(text)

        def run(self, script, *arguments):
            return browser.execute_script(script, *arguments)

        def cards(self):
            return [int(card.get_attribute("data-key").split("/")[1]) for card in self.all("#cards .card")]

        def gains(self):
            return [float(text.replace("−", "-").replace("+", "")) for text in self.texts("#cards .change")]

    return Page()


WIN_RATES = """
    const captioned = (table) => table.caption.textContent === "animals: win rates";
    const table = [...document.querySelectorAll("table")].find(captioned);
    const heads = [...table.tHead.rows[0].cells];
    const column = heads.findIndex((cell) => cell.textContent === arguments[0]);
"""


def column(page, name):
    """The cells of a column of the win rates, from top to bottom."""
    return page.run(WIN_RATES + "return [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);", name)


def press(page, name):
    """Click on a column's head; returns the direction it then claims."""
    click = "heads[column].querySelector('button').click(); return heads[column].getAttribute('aria-sort');"
    return page.run(WIN_RATES + click, name)


def test_the_page_loads_from_disk_without_errors_or_requests(page, browser):
    assert page.texts("h1") == ["A <i>page</i> to look at"]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    requested = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in requested if not name.startswith(("file:", "data:"))] == []


def test_no_prompt_becomes_markup(page):
    assert HOSTILE in page.texts("#cards .text")
    assert page.run("return document.title") == "A <i>page</i> to look at"
    assert page.all("#cards b b, #cards .text *") == []


def test_a_click_sorts_a_table_and_the_next_turns_it_round(page):
    rates = [float(text.split()[0]) for text in column(page, "Win rate")]
    assert press(page, "Win rate") == "descending"
    assert [float(text.split()[0]) for text in column(page, "Win rate")] == sorted(rates, reverse=True)
    assert press(page, "Win rate") == "ascending"
    assert [float(text.split()[0]) for text in column(page, "Win rate")] == sorted(rates)
    assert press(page, "Model") == "ascending"
    assert column(page, "Model") == ["after", "after", "middle", "middle"]


def test_the_best_and_the_worst_prompts_stand_on_top(page):
    assert "animal number 7" in page.texts("#best .text")[0]
    assert page.texts("#best .change")[0].startswith("+100")
    assert "animal number 20" in page.texts("#worst .text")[0]
    assert page.texts("#worst .change")[0].startswith("−80")


def test_prompts_are_shown_in_order_with_all_models_and_more_on_request(page):
    assert page.cards() == list(range(24))
    assert page.texts("#count") == ["24 of 30 prompts"]
    assert [text.split()[0] for text in page.texts("#cards .card:first-child figcaption")] == [
        "before",
        "middle",
        "after",
    ]
    page.click("#more")
    assert page.cards() == list(range(30))
    assert not page.one("#more").is_displayed()


def test_best_first_and_worst_first_order_by_the_change(page):
    page.click("[data-order=best]")
    assert page.cards()[0] == 7
    assert page.gains() == sorted(page.gains(), reverse=True)
    page.click("[data-order=worst]")
    assert page.cards()[0] == 20
    assert page.gains() == sorted(page.gains())


def test_the_category_filter_and_the_search_narrow_the_prompts(page):
    page.choose("category", "big dogs (15)")
    assert page.cards() == list(range(15, 30))
    assert page.texts("#count") == ["15 of 15 prompts"]
    page.one("#search").send_keys("number 2")
    assert page.cards() == list(range(20, 30))
    assert "animal number 20" in page.texts("#worst .text")[0]
    page.one("#search").send_keys(" nothing")
    assert page.cards() == []
    assert not page.one("#extremes").is_displayed()


def test_another_metric_and_pair_of_models_change_scores_and_order(page):
    page.choose("scorer", "Green")
    page.choose("model", "middle")
    page.click("[data-order=best]")
    assert page.gains()[:2] == [20.0, 18.0]
    assert page.cards()[:2] == [0, 1]
    page.choose("against", "middle")
    assert page.all("#cards .change") == []


def test_the_highest_score_is_framed(page):
    assert page.texts("#cards .card:first-child .winner figcaption")[0].startswith("after")


def test_another_prompt_set_shows_its_own_prompts_and_models(page):
    page.choose("set", "others")
    assert page.cards() == [0, 1, 2, 3]
    assert len(page.all("#cards .card:first-child figure")) == 2


def test_images_show_whether_the_page_holds_them_or_links_them(page):
    page.click("#more")
    script = """
        const images = [...document.querySelectorAll("#cards img")];
        images.forEach((image) => { image.loading = "eager"; });
        return Promise.all(images.map((image) => image.decode().then(
            () => [image.naturalWidth, image.src.slice(0, 5)], () => [0, image.src.slice(0, 5)])));"""
    shown = page.run(script)
    assert len(shown) == 90
    assert {width for width, _ in shown} == {16}
    assert {source for _, source in shown} == {"data:", "file:"}


def test_an_image_opens_large_and_the_arrows_go_from_prompt_to_prompt(page):
    page.click("#cards .card:first-child figure:first-child button")
    assert page.one("#viewer").is_displayed()
    assert HOSTILE in page.one("#viewer-text").text
    assert len(page.all("#viewer figure img")) == 3
    page.click("#viewer-next")
    assert "animal number 1" in page.one("#viewer-text").text
    page.click("#viewer-previous")
    assert HOSTILE in page.one("#viewer-text").text
    page.click("#viewer-previous")
    assert HOSTILE in page.one("#viewer-text").text
    page.click("#viewer-close")
    assert not page.one("#viewer").is_displayed()


def test_nothing_sticks_out_on_a_phone(page, browser):
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        width = page.run("return document.documentElement.scrollWidth")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width == 360
