"""Headless Chromium for the tests of pages; without it they are skipped and say so."""

import shutil

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="the page's browser tests need selenium")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="the page's browser tests need chromium and chromedriver (apt: chromium-driver)"
)


def start(window_size, *logs):
    """A browser with a window of "width,height" that keeps these logs."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"window-size={window_size}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", dict.fromkeys(logs, "ALL"))
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
