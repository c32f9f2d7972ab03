"""The server's page in a headless Chromium, against the server of page_server.py. Skipped where there is no Chromium."""

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import axe_core_python
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from launcher.server.page_files import PAGE_FILES, PAGE_FOLDER
from tests.launcher.server.page_server import FakeServer, make_rank, make_status, start_server

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent.parent
KEY = "secret-key"
AXE = Path(axe_core_python.__file__).with_name("axe.min.js")
"""The accessibility checks of axe-core."""
SIZE = "--window-size=1280,900"
EVIL = '<img src=x onerror="document.title=1"><script>document.title=2</script> & done'


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    browser, driver_program = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if browser is None or driver_program is None:
        pytest.skip("no chromium or no chromedriver: apt-get install chromium chromium-driver (scripts/cluster/install_tools.sh does)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server", SIZE):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
    yield chrome
    chrome.quit()


@dataclass
class Page:
    driver: webdriver.Chrome
    server: FakeServer
    address: str
    expected_errors: tuple[str, ...] = ()

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def read(self, selector: str) -> str:
        """The visible text of all that is selected, on one line; dashes and crosses as ASCII has them."""
        text = self.driver.execute_script("return [...document.querySelectorAll(arguments[0])].map(n => n.innerText).join(' ')", selector)
        return " ".join(str(text).replace("\u2013", "-").replace("\u00d7", "x").split())

    def wait_for(self, selector: str, words: str) -> None:
        WebDriverWait(self.driver, 10, 0.03).until(lambda _: words in self.read(selector), f"{selector} never said {words!r}")

    def say(self, words: str) -> None:
        self.find("#prompt").send_keys(words, Keys.ENTER)

    def set_media(self, scheme: str) -> None:
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})

    def check_log(self) -> None:
        """Nothing was complained of but what the test expects, and every request went to the server."""
        told = [entry["message"] for entry in self.driver.get_log("browser")]
        assert [words for words in told if not any(expected in words for expected in self.expected_errors)] == []
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        assert urls and [url for url in urls if not url.startswith((self.address, "data:"))] == []


@pytest.fixture
def page(driver: webdriver.Chrome) -> Iterator[Page]:
    fake = FakeServer()
    server = start_server(fake)
    address = f"http://127.0.0.1:{server.server_port}/"
    page = Page(driver, fake, address)
    page.set_media("light")
    driver.get(address)
    page.wait_for("#state", "ready")
    yield page
    driver.get("about:blank")
    server.shutdown()
    server.server_close()
    page.check_log()


def test_every_file_of_the_page_is_served_and_packed() -> None:
    assert sorted(path.name for path in PAGE_FOLDER.iterdir()) == sorted(name for name, _ in PAGE_FILES.values())
    package_data = (PROJECT_ROOT / "pyproject.toml").read_text().split("[tool.setuptools.package-data]")[1].split("\n\n")[0]
    assert '"launcher.server" = ["page/*"]' in package_data.splitlines()


def test_an_answer_appears_piece_by_piece_with_its_figures(page: Page) -> None:
    page.find("#system").send_keys("Be short.")
    page.find("#seed").send_keys("5")
    page.find("#prompt").send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    page.say("")
    page.server.pieces.put("Par")
    page.wait_for(".answer .markdown", "Par")
    assert page.find(".answer").get_attribute("aria-busy") == "true"
    for piece in ("is ", "ist größer"):
        page.server.pieces.put(piece)
    page.wait_for(".answer .markdown", "Paris ist größer")
    page.server.pieces.put(None)
    page.wait_for(".answer .note", "prompt 21 tokens")
    note = page.read(".answer .note")
    assert "3 tokens · " in note and "tokens/s · first token after" in note
    page.say("And?")
    page.server.pieces.put("No.")
    page.server.pieces.put(None)
    page.wait_for(".answer:last-child .markdown", "No.")
    first, second = page.server.asked
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "one\ntwo"}]
    fields = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7, "max_tokens": 256, "seed": 5}
    assert first == fields | {"messages": said}
    assert second["messages"] == [*said, {"role": "assistant", "content": "Paris ist größer"}, {"role": "user", "content": "And?"}]


def test_stop_ends_the_request_and_clear_the_conversation(page: Page) -> None:
    page.say("Go")
    page.server.pieces.put("begun")
    page.wait_for(".answer .markdown", "begun")
    page.find("#stop").click()
    page.wait_for(".answer .note", "stopped")
    assert page.server.aborted.wait(5)
    assert page.find("#send").is_displayed()
    page.find("#clear").click()
    assert page.read("#log") == ""


def test_html_in_an_answer_and_in_a_name_stays_text(page: Page) -> None:
    page.server.status = make_status(model=EVIL, last_failure=EVIL)
    page.say(EVIL)
    page.server.pieces.put(EVIL)
    page.server.pieces.put(None)
    page.wait_for(".answer .markdown", EVIL)
    page.wait_for(".message:not(.answer) .text", EVIL)
    page.wait_for("#notice", EVIL)
    assert page.driver.execute_script("return document.querySelectorAll('main img, main script, header img').length") == 0


@pytest.mark.parametrize(("code", "sentence"), [(429, "256 requests wait already."), (503, "The server is stopping.")])
def test_a_refusal_is_said_in_the_words_of_the_server(page: Page, code: int, sentence: str) -> None:
    page.expected_errors = (f"status of {code}",)
    page.server.refusal = (code, sentence)
    page.say("Hello")
    page.wait_for(".answer .error", f"{sentence} Try again in 3 s.")
    assert page.find("#prompt").get_attribute("value") == "Hello"


def test_an_error_inside_a_stream_leaves_what_had_come(page: Page) -> None:
    page.say("Hello")
    page.server.pieces.put("Half")
    page.server.pieces.put({"error": {"message": "The time of this request is over."}})
    page.wait_for(".answer .error", "The time of this request is over.")
    assert page.read(".answer .markdown") == "Half"


def test_a_number_out_of_range_is_not_sent(page: Page) -> None:
    page.find("#temperature").clear()
    page.find("#temperature").send_keys("3")
    page.say("Hello")
    assert page.driver.switch_to.active_element == page.find("#temperature")
    assert page.server.asked == [] and page.read("#log") == ""


def test_the_key_is_asked_for_kept_for_the_tab_and_sent(page: Page) -> None:
    page.expected_errors = ("status of 401",)
    page.server.key = KEY
    page.wait_for("#key-words", "asks for an API key")
    page.find("#key").send_keys("wrong", Keys.ENTER)
    page.wait_for("#key-words", "refused this key")
    page.find("#key").send_keys(KEY, Keys.ENTER)
    page.wait_for("#state", "ready")
    page.say("Hello")
    page.server.pieces.put("Hi")
    page.wait_for(".answer .markdown", "Hi")
    page.server.pieces.put(None)
    assert page.driver.execute_script("return [Object.values(sessionStorage), Object.values(localStorage)]") == [[KEY], []]
    page.driver.refresh()
    page.wait_for("#state", "ready")
    assert not page.find("#key-form").is_displayed()


def test_ranks_and_totals_are_those_of_the_status(page: Page) -> None:
    totals = page.read("#totals")
    for words in (
        "35.2",
        "181",
        "123 ms",
        "3 of 16",
        "7 of 256",
        "412 of 1,000, each 16 tokens",
        "17 requests, 9,041 tokens",
        "Restarts 0",
    ):
        assert words in totals
    assert "2 ranks x 1 thread" in page.read("#facts") and "up 1 h 02 min" in page.read("#facts")
    second = page.read(".card:nth-child(2)")
    for words in ("Rank 1", "process 4001", "32-63 of 64", "4096-8191 of 8192", "14336-28671", "16000-31999", "7.20 ms, gathers 1.30 ms"):
        assert words in second
    for words in ("12.2 of 17.6 GB/s, 69 %", "85.0 MB, 50 %", "12.0 MB", "339 MB"):
        assert words in second
    assert "rank 1 7.20 ms" in page.read(".chart:nth-child(3) .legend")
    page.wait_for(".chart:nth-child(1) .legend", "decoded 35.2")


@pytest.mark.parametrize("world_size", [1, 8, 64])
def test_any_number_of_ranks_fits_and_narrow_screens_do_too(page: Page, world_size: int) -> None:
    page.server.status = make_status(world_size)
    page.wait_for("#facts", f"{world_size} rank")
    assert len(page.driver.find_elements(By.CSS_SELECTOR, "#ranks article, #ranks tbody tr")) == world_size
    metrics = {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == 360
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_loading_with_nothing_known_and_recovering_are_said(page: Page) -> None:
    unknown = {name: None if not isinstance(value, str) else value for name, value in make_status().items()}
    nothing = {name: None if name not in ("rank", "host") else value for name, value in make_rank(0, 1).items()}
    page.server.status = unknown | {"state": "loading", "loading": {"done_bytes": 40e6, "total_bytes": 160e6}, "ranks": [nothing]}
    page.wait_for("#notice", "40.0 MB of 160 MB")
    assert "null" not in page.read("body") and "NaN" not in page.read("body") and "undefined" not in page.read("body")
    page.server.status = make_status(state="recovering", restarts=1, last_failure="rank 1 failed (ended by SIGKILL)")
    page.wait_for("#notice", "rank 1 failed (ended by SIGKILL)")
    page.wait_for("#state", "recovering")


def test_a_silent_server_is_said_and_comes_back(page: Page) -> None:
    page.expected_errors = ("net::ERR_",)
    page.server.gone = True
    page.wait_for("#notice", "The server does not answer.")
    assert page.read("#state") == "no answer"
    page.server.gone = False
    page.wait_for("#state", "ready")
    assert page.read("#notice") == ""


def test_a_hidden_page_asks_nothing(page: Page) -> None:
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    script = f"{hide} document.dispatchEvent(new Event('visibilitychange'))"
    page.driver.execute_script(script % "true")
    asked = page.server.num_status
    threading.Event().wait(1.3)
    assert page.server.num_status == asked
    page.driver.execute_script(script % "false")
    WebDriverWait(page.driver, 5, 0.03).until(lambda _: page.server.num_status > asked)


def test_dark_and_light_follow_the_system_and_the_switch(page: Page) -> None:
    def ground() -> str:
        return str(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light = ground()
    page.set_media("dark")
    dark = ground()
    assert dark != light
    page.find("#theme").send_keys("light")
    assert ground() == light
    page.driver.execute_script("localStorage.clear()")


MARKDOWN = """# Plan

1. **Sort** the `list`
2. see [the page](https://example.com/a) and [this](javascript:alert(1))

```python
print("<b>")
```

| a | b |
|---|---|
| 1 | 2 |
"""


def answer_with(page: Page, *pieces: str | dict[str, Any]) -> None:
    for piece in (*pieces, None):
        page.server.pieces.put(piece)
    page.wait_for(".answer:last-child .note", "prompt 21 tokens")


def test_an_answer_in_markdown_becomes_elements_and_only_web_links(page: Page) -> None:
    page.say("Hello")
    answer_with(page, *MARKDOWN.splitlines(keepends=True))
    assert page.read(".markdown h4") == "Plan" and page.read(".markdown ol li strong") == "Sort" and page.read("li code") == "list"
    assert page.read(".markdown pre code") == 'print("<b>")' and page.read(".markdown td") == "1 2"
    links = page.driver.find_elements(By.CSS_SELECTOR, ".markdown a")
    assert [link.get_attribute("href") for link in links] == ["https://example.com/a"]
    assert "this" in page.read(".markdown li:last-child")


def test_settings_are_sent_as_they_stand_and_the_template_is_told(page: Page) -> None:
    assert page.find("#system").get_attribute("placeholder") == "You are helpful."
    for name, value in {"top-p": "0.9", "top-k": "40", "min-p": "0.05", "repetition-penalty": "1.1", "stop-texts": "END\n\nFIN"}.items():
        page.find(f"#{name}").send_keys(value)
    page.say("Hello")
    answer_with(page, "Hi")
    fields = {"top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "stop": ["END", "FIN"]}
    assert page.server.asked[0].items() >= fields.items()
    assert page.server.asked[0]["messages"] == [{"role": "user", "content": "Hello"}]


def test_an_answer_is_generated_anew_in_place_of_the_last(page: Page) -> None:
    page.say("Hello")
    answer_with(page, "Hi")
    page.find(".actions button").click()
    answer_with(page, "Good day")
    assert page.read(".answer .markdown") == "Good day"
    assert page.server.asked[0] == page.server.asked[1]
    page.say("And?")
    answer_with(page, "No.")
    assert [message["content"] for message in page.server.asked[2]["messages"]] == ["Hello", "Good day", "And?"]


def test_tool_calls_are_shown_and_their_results_sent(page: Page) -> None:
    page.find("#tools").send_keys("[{]")
    page.say("Weather?")
    assert page.server.asked == [] and page.driver.switch_to.active_element == page.find("#tools")
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    page.driver.execute_script("arguments[0].value = arguments[1]", page.find("#tools"), json.dumps([tool]))
    page.find("#tools").send_keys(" ")
    page.find("#prompt").send_keys(Keys.ENTER)
    begun = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    parts = [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ('{"city": ', '"Bern"}')]
    answer_with(page, {"reasoning_content": "I need it."}, {"tool_calls": [begun]}, *parts)
    assert page.server.asked[0]["tools"] == [tool]
    assert page.read(".call h4") == "Tool call: weather" and page.read(".call pre") == '{"city": "Bern"}'
    assert page.read(".thinking summary") == "Reasoning"
    page.find(".call textarea").send_keys("Rain")
    page.find(".actions button").click()
    answer_with(page, "It rains.")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    assert page.server.asked[1]["messages"] == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
    ]
    page.say("Thanks")
    answer_with(page, "Welcome.")
    assert [message["role"] for message in page.server.asked[2]["messages"]] == ["user", "assistant", "tool", "assistant", "user"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_no_fault(page: Page, scheme: str, width: int) -> None:
    page.set_media(scheme)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.driver.execute_script("document.getElementById('settings').open = true")
    page.say("Hello")
    call = {"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": "{}"}}
    answer_with(page, {"reasoning_content": "Hm."}, MARKDOWN, {"tool_calls": [call]})
    page.driver.execute_script(AXE.read_text(encoding="utf-8"))
    faults = page.driver.execute_async_script("axe.run().then(result => arguments[0](result.violations))")
    assert [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in faults] == []
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == width
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_keyboard_reaches_every_control_in_order(page: Page) -> None:
    page.say("Hello")
    answer_with(page, "Hi")
    reached = []
    page.find("body").click()
    for _ in range(40):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        active = page.driver.switch_to.active_element
        reached.append(active.get_attribute("id") or active.text)
        if active.get_attribute("id") == "view":
            break
    controls = ["Regenerate", "system", "temperature", "top-p", "max-tokens", "seed", "stop-texts", "tools", "prompt", "send", "view"]
    assert [name for name in reached if name in controls] == controls
