"""report.html in a real browser, from disk: sorting, filters, the image browser, the enlarged view.

Needs Chromium with its driver and selenium (browser.py).
"""

import io
import json
from contextlib import contextmanager

import pytest
from browser import needs_browser, start
from PIL import Image
from selenium.webdriver import ActionChains, Keys

import evaluate
from xdpo.report.figures import colours_of

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


def make_model(folder, prompt_set, count, *colours, steps=50):
    """Images of one colour, as many for each prompt as there are functions that tell it from the prompt's number."""
    rows = []
    for number in range(count):
        category = "cats" if number < count // 2 else "big dogs"
        prompt = HOSTILE if number == 0 else f"animal number {number}"
        for image, colour in enumerate(colours):
            file = f"{category.replace(' ', '_')}/{number:05d}{f'_{image}' if image else ''}.png"
            path = folder / prompt_set / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), colour(number)).save(path)
            row = {"file": file, "category": category, "index": number, "prompt": prompt, "model": folder.name}
            made = {"seed": 1000 * image + number, "settings": {"seed": 0, "num_inference_steps": steps}}
            rows.append(row | made)
    (folder / prompt_set / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three models on two prompt sets; `after` gains most red at number 7 and loses most at 20. Of the second set there
    are two images a prompt, `after` takes other steps there, and `middle` is missing."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "scorers.py").write_text(SCORERS)
    change = {7: 90, 20: -90}
    make_model(folder / "before", "animals", COUNT, lambda n: (100, 100 + n, 0))
    make_model(folder / "middle", "animals", COUNT, lambda n: (105, 120 - n, 0))
    make_model(folder / "after", "animals", COUNT, lambda n: (110 + change.get(n, n % 5), 100, 40))
    make_model(folder / "before", "others", 4, lambda n: (50, 50, 50), lambda n: (90, 50, 50))
    make_model(folder / "after", "others", 4, lambda n: (60, 40, 50), lambda n: (70, 40, 50), steps=20)
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
            """Click as soon as nothing moves it: a jump may still be scrolling the page."""
            from selenium.common.exceptions import ElementClickInterceptedException
            from selenium.webdriver.support.wait import WebDriverWait

            def clicked(_):
                element = self.one(selector)
                browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
                element.click()
                return True

            WebDriverWait(browser, 10, ignored_exceptions=[ElementClickInterceptedException]).until(clicked)

        def choose(self, name, text):
            from selenium.webdriver.support.select import Select

            Select(self.one(f"[name={name}]")).select_by_visible_text(text)

        def run(self, script, *arguments):
            return browser.execute_script(script, *arguments)

        def press(self, *keys):
            ActionChains(browser).send_keys(*keys).perform()

        def until(self, script):
            from selenium.webdriver.support.wait import WebDriverWait

            WebDriverWait(browser, 10).until(lambda _: browser.execute_script(script))

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
    page.choose("order", "best first")
    assert page.cards()[0] == 7
    assert page.gains() == sorted(page.gains(), reverse=True)
    page.choose("order", "worst first")
    assert page.cards()[0] == 20
    assert page.gains() == sorted(page.gains())


def test_the_category_filter_and_the_search_narrow_the_prompts(page):
    page.choose("category", "big dogs (15)")
    assert page.cards() == list(range(15, 30))
    assert page.texts("#count") == ["15 of 15 prompts"]
    page.one("[name=find]").send_keys("number 2")
    assert page.cards() == list(range(20, 30))
    assert "animal number 20" in page.texts("#worst .text")[0]
    page.one("[name=find]").send_keys(" nothing")
    assert page.cards() == []
    assert not page.one("#extremes").is_displayed()


def test_another_metric_and_pair_of_models_change_scores_and_order(page):
    page.choose("metric", "Green")
    page.choose("model", "middle")
    page.choose("order", "best first")
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


def test_the_copy_in_the_page_stands_in_for_a_file_that_is_gone_and_says_so(page):
    page.run("for (const [image] of data.sets[0].prompts[0].images) image[1] = 'gone.png';")
    enlarge(page)
    page.until("return document.querySelectorAll('#viewer .copy').length === 3")
    assert page.texts("#viewer .copy") == ["copy in this page"] * 3
    assert page.run("return document.querySelector('#viewer img').naturalWidth") == 16
    page.press(Keys.ARROW_RIGHT)
    page.until("return [...document.querySelectorAll('#viewer img')].every((image) => image.naturalWidth)")
    assert page.all("#viewer .copy") == []


@contextmanager
def shown_as(browser, width, height, *, scheme="light", medium="", script=True):
    """The browser with another window, colour scheme or medium, or without the page's script."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": size["mobile"], "maxTouchPoints": 2})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": features})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


# --- one prompt, enlarged ------------------------------------------------------------------------------------------


def enlarge(page, *keys, number=0):
    """Open a prompt by its first image, and press keys."""
    page.click(f"#cards [data-key$='/{number}'] figure:first-child button")
    for key in keys:
        page.press(key)


def facts(page, figure):
    """What stands beside an enlarged image, by its name."""
    read = "return [...arguments[0].querySelectorAll('dt')].map((dt) => [dt.textContent, dt.nextSibling.textContent])"
    return dict(page.run(read, page.all("#viewer figure")[figure]))


def test_all_metrics_the_seed_and_the_settings_stand_beside_an_enlarged_image(page):
    enlarge(page, number=3)
    assert page.texts("#viewer figcaption p") == ["before", "middle", "after"]
    told = facts(page, 2)
    assert (told["Red"], told["Green"], told["Seed"], told["Steps"]) == ("113.00", "100.00", "3", "50")
    assert (told["Size"], told["Made by"]) == ("16 × 16", "after")
    assert page.texts("#viewer dd b") == ["117.00", "113.00"]  # the highest: middle's green, after's red


def test_each_of_several_images_has_its_own_score_and_its_mean_is_called_so(page):
    page.choose("set", "others")
    assert page.texts("#cards [data-key$='/1'] figcaption") == ["before 70.00 mean of 2", "after 65.00 mean of 2"]
    enlarge(page, number=1)
    assert page.texts("#viewer figcaption p")[2:] == ["before, image 2", "after, image 2"]
    assert [facts(page, figure)["Red"] for figure in range(4)] == [
        "50.00 mean 70.00",
        "60.00 mean 65.00",
        "90.00 mean 70.00",
        "70.00 mean 65.00",
    ]
    assert [facts(page, figure)["Seed"] for figure in range(4)] == ["1", "1", "1001", "1001"]
    assert [facts(page, figure)["Steps"] for figure in range(2)] == ["50", "20 ≠"]
    assert page.texts("#viewer .winner figcaption p") == ["after, image 1", "before, image 2"]
    page.click("[data-view=two]")
    page.run(
        "const chosen = document.querySelector('#repeat'); chosen.value = 1; chosen.dispatchEvent(new Event('change'))"
    )
    assert [facts(page, figure)["Seed"] for figure in range(2)] == ["1001", "1001"]


def test_an_image_that_is_missing_has_no_score_and_takes_no_frame_from_others(page):
    page.run("const [set] = data.sets; set.prompts[0].scores[0] = [-3, -2, -1]; set.prompts[0].images[2] = [];")
    enlarge(page)
    assert (facts(page, 2)["Red"], facts(page, 2)["Seed"]) == ("–", "unknown")
    assert page.texts("#viewer .broken") == ["no image here"]
    assert page.texts("#viewer .winner figcaption p") == ["middle"]


def test_the_frame_and_the_dots_of_an_enlarged_image_have_its_models_colour(page):
    colours = list(colours_of(["before", "middle", "after"], "before").values())
    enlarge(page)
    frame = page.one("#viewer .winner .stage").value_of_css_property("border-top-color")
    dots = [dot.value_of_css_property("background-color") for dot in page.all("#viewer figcaption i")]

    def as_hex(colour):
        return "#" + "".join(f"{int(channel):02x}" for channel in colour.strip("rgba()").split(",")[:3])

    assert [as_hex(dot) for dot in dots] == colours
    assert as_hex(frame) == colours[2]


def boxes(page):
    """(left, top, width) of every enlarged image within its stage."""
    return page.run("""return [...document.querySelectorAll("#viewer img")].map((image) => {
        const [inner, outer] = [image, image.closest(".stage")].map((node) => node.getBoundingClientRect());
        return [inner.left - outer.left, inner.top - outer.top, inner.width].map((number) => Math.round(number));
    })""")


def test_zoom_and_pan_go_together_in_all_images_and_one_key_shows_pixel_for_pixel(page, browser):
    enlarge(page)
    (start, *_) = boxes(page)
    page.press("1")
    shown = page.run("return document.querySelector('#viewer .stage').clientWidth / 16 * viewer.scale")
    assert shown == pytest.approx(page.run("return 1 / devicePixelRatio"))
    assert page.texts("#zoom-level") == ["100 %"]
    page.press("0", "+", "+", "+", "+")
    first, *others = boxes(page)
    assert first[2] == pytest.approx(start[2] * 1.25**4, abs=2)
    assert all(other == pytest.approx(first, abs=2) for other in others)
    stage = page.all("#viewer .stage")[1]
    ActionChains(browser).click_and_hold(stage).move_by_offset(30, -20).release().perform()
    moved, *others = boxes(page)
    assert moved == pytest.approx([first[0] + 30, first[1] - 20, first[2]], abs=2)
    assert all(other == pytest.approx(moved, abs=2) for other in others)
    page.press(Keys.ARROW_RIGHT)
    assert boxes(page)[0] == pytest.approx(moved, abs=2)  # the same place in the next prompt
    page.run("""document.querySelectorAll("#viewer .stage")[2].dispatchEvent(
        new WheelEvent("wheel", { deltaY: -300, bubbles: true, cancelable: true }))""")
    assert boxes(page)[0][2] == pytest.approx(2 * moved[2], abs=4)


def colours_in(page, *shares):
    """Colours of the viewer's first stage, as it is on the screen, at shares of its width."""
    image = Image.open(io.BytesIO(page.one("#viewer .stage").screenshot_as_png)).convert("RGB")
    return [image.getpixel((round(share * image.width), image.height // 2)) for share in shares]


BEFORE, AFTER = (100, 103, 0), (113, 100, 40)  # of prompt 3


def test_a_wipe_shows_one_model_left_of_it_and_the_other_right_of_it(page):
    enlarge(page, "w", number=3)
    assert page.texts("#viewer .badge") == ["before", "after"]
    assert colours_in(page, 0.2, 0.4, 0.6) == [BEFORE, BEFORE, AFTER]
    page.run(
        "const slider = document.querySelector('#viewer [type=range]'); slider.value = 30;"
        "slider.dispatchEvent(new Event('input'))"
    )
    assert colours_in(page, 0.2, 0.4, 0.6) == [BEFORE, AFTER, AFTER]
    page.press("+", "+")  # zooms the images, not the wipe
    assert colours_in(page, 0.2, 0.4, 0.6) == [BEFORE, AFTER, AFTER]
    assert page.one("#cards [data-key$='/3'] .change").text  # the page behind compares the same two


def test_a_key_blinks_between_two_models(page):
    enlarge(page, "b", number=3)
    assert colours_in(page, 0.5) == [BEFORE]
    page.press("b")
    assert colours_in(page, 0.5) == [AFTER]
    assert page.texts("#viewer .badge") == ["", "after"]
    page.press("b")
    assert colours_in(page, 0.5) == [BEFORE]


def test_the_pair_of_the_viewer_is_that_of_the_page(page):
    from selenium.webdriver.support.select import Select

    enlarge(page, "t", number=3)
    Select(page.one("#right")).select_by_visible_text("middle")
    assert page.texts("#viewer figcaption p") == ["before", "middle"]
    assert page.run("return controls.model.value") == "middle"
    page.press(Keys.ESCAPE)
    page.until("return document.activeElement.closest('[data-key]')")  # the viewer's closing is told a moment later
    assert page.run("return document.activeElement.closest('[data-key]').dataset.key") == "cats/3"


# --- addresses and numbers -----------------------------------------------------------------------------------------


def test_an_address_holds_filters_and_the_open_prompt_and_shows_them_again(page, browser):
    page.choose("category", "big dogs (15)")
    page.choose("metric", "Green")
    page.choose("order", "worst first")
    page.one("[name=find]").send_keys("number 2")
    before = page.cards()
    enlarge(page, "w", number=25)
    address = browser.current_url
    assert "#category=big+dogs&metric=Green&order=worst&find=number+2&prompt=big_dogs%2F25&view=wipe" in address
    browser.get("about:blank")
    browser.get(address)
    assert page.cards() == before
    assert "animal number 25" in page.one("#viewer-text").text
    assert page.run("return document.querySelector('[aria-pressed=true]').dataset.view") == "wipe"
    page.press(Keys.ARROW_RIGHT)
    assert "prompt=big_dogs%2F24" in browser.current_url
    page.press(Keys.ESCAPE)
    page.until("return !location.hash.includes('prompt')")
    assert browser.current_url.endswith("#category=big+dogs&metric=Green&order=worst&find=number+2")
    page.run("location.hash = arguments[0]", page.one("#cards [data-key$='/21'] a").get_attribute("href").split("#")[1])
    page.until("return document.querySelector('#viewer').open")
    assert "animal number 21" in page.one("#viewer-text").text


def test_an_address_from_another_report_shows_what_there_is(page, browser, report):
    browser.get("about:blank")
    browser.get_log("browser")  # of earlier tests
    browser.get(report.as_uri() + "#set=gone&metric=Blue&model=nobody&prompt=cats%2F99&view=upside-down&order=best")
    assert page.run("return [controls.set.value, controls.metric.value, controls.model.value]") == [
        "animals",
        "Red",
        "after",
    ]
    assert page.cards()[0] == 7
    assert not page.one("#viewer").is_displayed()
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_number_leads_to_its_prompt_and_the_ones_around_it(page):
    page.one("#jump input").send_keys("27" + Keys.ENTER)
    assert page.cards() == list(range(24, 30))
    assert page.texts("#count") == ["25–30 of 30 prompts"]
    assert page.run("return document.activeElement.closest('.found').dataset.key") == "big_dogs/27"
    page.click("#earlier")
    assert page.cards() == list(range(30))
    page.run("jump(' cats 4 ')")
    assert page.run("return document.activeElement.closest('.found').dataset.key") == "cats/4"
    page.choose("category", "cats (15)")
    page.run("jump('27')")
    assert page.texts("#count") == ["no prompt 27 among these 15"]


def test_prompts_on_which_metrics_disagree_can_be_had_alone(page):
    page.choose("only", "where metrics disagree")
    page.click("#more")
    assert page.cards() == [n for n in range(30) if n not in (0, 20)]  # no green lost at 0, and red lost too at 20
    page.choose("model", "before")
    assert page.cards() == []


# --- other eyes, other paper ---------------------------------------------------------------------------------------


LOW_CONTRASTS = """
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return canvas.getImageData(0, 0, 1, 1).data;
    };
    const ground = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const colour = rgba(getComputedStyle(at).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255];
    };
    const luminance = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
        const share = colour[i] / 255;
        return sum + weight * (share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
    }, 0);
    const contrast = (node) => {
        const [dark, light] = [rgba(getComputedStyle(node).color), ground(node)].map(luminance).sort((a, b) => a - b);
        return (light + 0.05) / (dark + 0.05);
    };
    const texts = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
        && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
    const low = texts.filter((node) => contrast(node) < 4.5);
    return [texts.length, low.map((node) => [node.outerHTML.slice(0, 90), contrast(node)])];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_a_contrast_of_4_5_by_day_and_by_night(page, browser, scheme):
    with shown_as(browser, 1400, 900, scheme=scheme):
        enlarge(page, "w")
        page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        ground = page.run("return getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(244, 246, 249)" if scheme == "light" else "rgb(20, 24, 30)")
        count, low = page.run(LOW_CONTRASTS)
    assert count > 300
    assert low == []


def test_a_phone_shows_the_win_rates_keeps_the_first_column_and_sets_two_images_side_by_side(page, browser):
    with shown_as(browser, 390, 844):
        assert page.run("return document.documentElement.scrollWidth") == 390
        right = "return table.tBodies[0].rows[0].cells[column].getBoundingClientRect().right"
        assert page.run(WIN_RATES + right, "Win rate") < 390
        stays = "const cell = table.tBodies[0].rows[0].cells[0], x = () => cell.getBoundingClientRect().left;"
        stays += "const before = x(); table.parentElement.scrollLeft = 150;"
        assert page.run(WIN_RATES + stays + "return [table.parentElement.scrollLeft > 0, x() - before]", "Model") == [
            True,
            0,
        ]
        assert page.run("return document.querySelector('section > figure img').clientWidth") >= 600
        enlarge(page)
        first, second, third = (figure.rect for figure in page.all("#viewer figure"))
        assert first["y"] == second["y"] < third["y"]
        assert second["x"] + second["width"] <= 390


def test_two_fingers_zoom_all_images_and_one_pans_them(page, browser):
    def touch(kind, *places):
        points = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(places)]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    with shown_as(browser, 390, 844):
        enlarge(page)
        start = page.run("return document.querySelector('#viewer .stage').getBoundingClientRect()")
        x, y = start["x"] + start["width"] / 2, start["y"] + start["height"] / 2
        touch("touchStart", (x - 30, y))
        touch("touchStart", (x - 30, y), (x + 30, y))
        for wider in (10, 20, 30):
            touch("touchMove", (x - 30 - wider, y), (x + 30 + wider, y))
        touch("touchEnd")
        page.until("return viewer.scale > 1.9")
        first, *others = boxes(page)
        assert first[2] == pytest.approx(2 * (start["width"] - 8), abs=4)  # without its frame
        assert all(other == pytest.approx(first, abs=2) for other in others)
        touch("touchStart", (x, y))
        for further in (20, 40):
            touch("touchMove", (x - further, y))
        touch("touchEnd")
        assert page.run("return document.querySelector('#viewer').scrollTop") == 0
        page.until("return viewer.x > 0.55")


def test_paper_is_white_and_shows_whole_tables_folded_ones_too_and_what_is_compared(page, browser):
    with shown_as(browser, 700, 1000, scheme="dark", medium="print"):
        assert page.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        scrollers = "return [...document.querySelectorAll('.scroll, .strip')]"
        assert page.run(scrollers + ".filter((each) => each.scrollWidth > each.clientWidth).length") == 0
        assert page.run("return getComputedStyle(document.body).color") == "rgb(27, 35, 48)"
        assert len(page.all("details table")) > 1
        assert page.run(
            "return [...document.querySelectorAll('details table')].every((each) => each.checkVisibility())"
        )
        assert page.all("#controls")[0].is_displayed() is page.all("nav")[0].is_displayed() is False
        assert page.texts(".comparison") == ["after against before by Red"] * 3


def test_without_its_script_the_page_shows_tables_figures_and_the_best_and_worst_prompts(browser, report):
    with shown_as(browser, 1280, 900, script=False):
        browser.get(report.as_uri())
        seen = browser.execute_cdp_cmd("DOMSnapshot.captureSnapshot", {"computedStyles": ["visibility"]})
        strings, (document, *_) = seen["strings"], seen["documents"]
        laid_out = set(document["layout"]["nodeIndex"])
        names = [strings[name] for i, name in enumerate(document["nodes"]["nodeName"]) if i in laid_out]
        texts = [strings[text] for text in document["layout"]["text"] if text >= 0]
        shown = Image.open(io.BytesIO(browser.get_screenshot_as_png()))
    assert shown.size[0] == 1280
    assert "TABLE" in names and not {"BUTTON", "SELECT", "INPUT"} & set(names)
    assert "All prompts, other metrics and pairs, and enlarging need JavaScript." in texts
    assert texts.index("animals: best prompts by Red, after against before") < texts.index("animal number 7")
    assert texts.index("animals: worst prompts by Red, after against before") < texts.index("animal number 20")
    assert "others: worst prompts by Red, after against before" in texts
    assert names.count("ARTICLE") == 6 + 4
    assert names.count("IMG") >= 2 * 10
