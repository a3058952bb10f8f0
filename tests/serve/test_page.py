"""The page at `/` in headless Chromium: what it shows, asks and draws, and may not load."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.servers import ServerThread

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
browsing = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)
SCREEN = Path("calibration/screenshot.png").resolve()
_PATIENCE = 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1200,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(browser: Any, server: ServerThread) -> Iterator[Page]:
    opened = Page(browser, server.url)
    opened.wait(lambda: opened.text("model") == "reference")
    yield opened
    # The console tells of scripts that fail and of what the policy forbids.
    assert browser.get_log("browser") == []


class Page:
    """The page in a browser, by the ids of its parts."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get(url + "/")

    def part(self, id: str) -> Any:
        return self.browser.find_element(By.ID, id)

    def text(self, id: str) -> str:
        return self.part(id).text

    def wait(self, condition: Callable[[], bool]) -> None:
        WebDriverWait(self.browser, _PATIENCE).until(lambda _: condition())

    def add(self, **fields: Any) -> None:
        """Send further fields with every prompt."""
        self.browser.execute_script(
            """
            const real = window.fetch, [fields] = arguments;
            window.fetch = (url, options) => real(url, !options?.body ? options : {
              ...options, body: JSON.stringify({ ...JSON.parse(options.body), ...fields }),
            });
            """,
            fields,
        )

    def ask(self, prompt: str) -> str:
        """The answer to a prompt, when it is whole."""
        self.part("prompt").clear()
        self.part("prompt").send_keys(prompt)
        self.part("send").click()
        self.wait(lambda: self.part("send").is_enabled())
        return self.text("answer")


@pytest.mark.slow
@browsing
def test_it_shows_the_model_and_its_load(page: Page) -> None:
    page.wait(lambda: page.text("state") == "ready")
    assert re.fullmatch(r"[\d,.]+ tokens · glmcompile [\d.]+", page.text("about"))
    assert (page.text("running"), page.text("waiting"), page.text("kv")) == ("0", "0", "0 %")
    assert not page.part("keyed").is_displayed()


@pytest.mark.slow
@browsing
def test_a_tap_is_drawn_where_the_answer_says(page: Page, server: ServerThread) -> None:
    page.part("file").send_keys(str(SCREEN))
    page.wait(lambda: page.part("shown").is_displayed())
    answer = page.ask("Open Chat.")
    found = re.search(r"element=\[(\d+),(\d+)\]", answer)
    assert found is not None, (answer, page.text("note"))
    assert re.search(r"\d+ tokens in.* out", page.text("note"))
    image = page.browser.execute_script(
        "const r = document.getElementById('image').getBoundingClientRect();"
        "return [r.left, r.top, r.width, r.height]"
    )
    dot = page.browser.execute_script(
        "const r = document.querySelector('#marks .dot').getBoundingClientRect();"
        "return [r.left + r.width / 2, r.top + r.height / 2]"
    )
    for axis in (0, 1):
        expected = image[axis] + int(found[axis + 1]) / 1000 * image[axis + 2]
        assert dot[axis] == pytest.approx(expected, abs=1.5)
    page.part("remove").click()
    assert not page.part("shown").is_displayed()
    assert page.part("pick").is_displayed()


@pytest.mark.slow
@browsing
@pytest.mark.parametrize("event", ["paste", "drop"])
def test_an_image_can_be_pasted_and_dropped(page: Page, event: str) -> None:
    page.browser.execute_script(
        """
        const canvas = document.createElement("canvas");
        canvas.width = canvas.height = 56;
        canvas.toBlob((blob) => {
          const data = new DataTransfer();
          data.items.add(new File([blob], "screen.png", { type: "image/png" }));
          const options = { bubbles: true, cancelable: true };
          document.body.dispatchEvent(arguments[0] === "paste"
            ? new ClipboardEvent("paste", { ...options, clipboardData: data })
            : new DragEvent("drop", { ...options, dataTransfer: data }));
        });
        """,
        event,
    )
    page.wait(lambda: page.part("shown").is_displayed())


@pytest.mark.slow
@browsing
def test_an_answer_is_text_and_never_markup(page: Page) -> None:
    markup = "<img src=x onerror=alert(1)>"
    page.add(structured_outputs={"choice": [markup]})
    assert page.ask("Hi") == markup
    assert page.part("answer").find_elements(By.TAG_NAME, "img") == []


@pytest.mark.slow
@browsing
def test_an_error_is_told(page: Page) -> None:
    page.browser.execute_script("document.getElementById('form').noValidate = true")
    page.part("temperature").clear()
    page.part("temperature").send_keys("-1")
    page.ask("Hi")
    assert "temperature" in page.text("note")
    # The console notes every status of an error.
    (entry,) = page.browser.get_log("browser")
    assert "status of 400" in entry["message"]


@pytest.mark.slow
@browsing
def test_it_asks_for_the_key_that_the_server_wants(
    browser: Any, serve: Callable[..., ServerThread]
) -> None:
    server = serve("llama", api_key="secret", model_names=("locked",))
    page = Page(browser, server.url)
    page.wait(lambda: page.part("keyed").is_displayed())
    assert page.text("model") == "glmcompile"  # nothing of the model without it
    page.part("tokens").clear()
    page.part("tokens").send_keys("4")
    page.part("key").send_keys("secret")
    page.part("prompt").click()
    page.wait(lambda: page.text("model") == "locked")
    page.ask("Hi")
    assert re.search(r"[1-4] out", page.text("note"))
    browser.get_log("browser")  # the refusals without a key


@pytest.mark.slow
@browsing
def test_it_can_be_stopped(browser: Any, serve: Callable[..., ServerThread]) -> None:
    server = serve("llama", faults="decoder:50ms")
    page = Page(browser, server.url)
    page.add(ignore_eos=True)
    page.part("prompt").send_keys("Hi")
    page.part("send").click()
    page.wait(lambda: page.part("stop").is_enabled())
    page.part("stop").click()
    page.wait(lambda: page.text("note") == "Stopped.")
    server.wait_until_idle()


@pytest.mark.slow
@browsing
@pytest.mark.parametrize(("width", "height"), [(1200, 900), (500, 800)])
def test_it_fits_the_window(page: Page, width: int, height: int) -> None:
    page.browser.set_window_size(width, height)
    root = "document.documentElement"
    overflow = page.browser.execute_script(f"return {root}.scrollWidth - {root}.clientWidth")
    assert overflow == 0


@pytest.mark.slow
@browsing
def test_a_hidden_page_asks_for_nothing(page: Page, server: ServerThread) -> None:
    count = "return performance.getEntriesByName(location.origin + '/metrics').length"
    page.wait(lambda: page.browser.execute_script(count) > 0)
    page.browser.execute_script(
        "Object.defineProperty(document, 'hidden', { get: () => true });"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    before = page.browser.execute_script(count)
    time.sleep(6)
    assert page.browser.execute_script(count) == before


def test_it_loads_nothing_and_may_not(server: ServerThread) -> None:
    response = server.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.search(r"""\b(?:src|href)=["'](?!data:,)""", response.text)
    assert not re.search(r"""<[^>]+\s(?:on\w+|style)=""", response.text)
