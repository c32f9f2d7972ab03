"""A picture of the page of a running `tandem serve`, taken with a headless Chromium.

    python scripts/screenshot_page.py URL FILE.png [--dark] [--size 1280x800] [--prompt TEXT] [--seconds 5]

Opens the page, lets it watch the ranks for SECONDS, and with --prompt sends TEXT and waits for its answer first. Needs selenium (the
extra `test`), chromium and chromedriver (scripts/cluster/install_tools.sh). The page is used as a person would: nothing else is asked of
the server. A server that wants a key is not handled.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

ANSWER_SECONDS = 300


def start_browser(width: int, height: int, dark: bool) -> webdriver.Chrome:
    """A browser whose page has exactly this size."""
    browser, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if browser is None or driver is None:
        sys.exit("screenshot_page: chromium or chromedriver is missing; scripts/cluster/install_tools.sh installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    return chrome


def take(chrome: webdriver.Chrome, url: str, prompt: str | None, seconds: float) -> bytes:
    """The page as PNG."""
    chrome.get(url)
    wait = WebDriverWait(chrome, ANSWER_SECONDS)
    wait.until(lambda _: chrome.find_element(By.ID, "state").text == "ready", "the server did not become ready")
    if prompt is not None:
        chrome.find_element(By.ID, "prompt").send_keys(prompt.replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL), Keys.ENTER)
        wait.until(lambda _: chrome.find_elements(By.CSS_SELECTOR, ".answer[aria-busy=false]"), "the answer did not end")
    time.sleep(seconds)
    return chrome.get_screenshot_as_png()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="address of the page, such as http://127.0.0.1:8000/")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--size", default="1280x800", help="width and height of the page, in pixels")
    parser.add_argument("--prompt", help="is sent in the chat before the picture is taken")
    parser.add_argument("--seconds", type=float, default=5, help="how long the page is left open before that")
    arguments = parser.parse_args()
    width, _, height = arguments.size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        parser.error(f"--size is {arguments.size!r}, but has to be like 1280x800")
    chrome = start_browser(int(width), int(height), arguments.dark)
    try:
        arguments.file.write_bytes(take(chrome, arguments.url, arguments.prompt, arguments.seconds))
    finally:
        chrome.quit()
    print(arguments.file)


if __name__ == "__main__":
    main()
