"""A run's index.html in a real browser, from disk. Needs Chromium with its driver and selenium (browser.py)."""

import re

from browser import needs_browser, start
from selenium.webdriver import ActionChains
from test_dashboard import RUN, page_of

pytestmark = needs_browser


def test_a_page_in_a_browser_reads_curves_and_says_how_old_it_is(tmp_path):
    run_page = page_of(tmp_path, RUN)
    run_page.write("training")
    silent = run_page.path.with_name("silent.html")
    silent.write_text(re.sub('data-written="[^"]+"', 'data-written="2020-01-01T00:00:00Z"', run_page.path.read_text()))
    browser = start("1200,900", "browser")
    try:
        browser.get(silent.as_uri())
        assert "No news for" in browser.find_element("id", "silent").text
        browser.get(run_page.path.as_uri())
        assert not browser.find_element("id", "silent").is_displayed()
        assert "ago" in browser.find_element("id", "written").text
        chart = browser.find_element("css selector", "#curves .chart")  # training pairs alone: 100 %, then 70 %
        ActionChains(browser).move_to_element_with_offset(chart.find_element("css selector", "svg"), 200, 0).perform()
        assert chart.find_element("css selector", ".legend b").text == "70 %"
        assert chart.find_element("css selector", ".note").text.startswith("At step 2")
        assert [entry["message"] for entry in browser.get_log("browser")] == []
        requested = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert requested == []
    finally:
        browser.quit()
