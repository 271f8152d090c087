"""The report in a real browser: Debian's chromium, driven through its own driver, without network."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.optional import optional
from tests.support.report_run import evaluation, write_run
from tools.report import write_report

PROGRAMS = ("chromium", "chromedriver")
MISSING = [program for program in PROGRAMS if shutil.which(program) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"needs {', '.join(MISSING)} (apt-get install chromium chromium-driver)",
    ),
]
SCHEMES = {"light": "rgb(245, 246, 248)", "dark": "rgb(17, 21, 27)"}
"""Backgrounds of the page."""


def focus_maps() -> dict[str, Any]:
    """Return a map of 64 tokens: LensNet opens the fact that is asked for in its second round."""
    even = {"first": 0, "lods": [1] * 7 + [0] * 8, "scores": [-0.5] * 3 + [0.875] + [0.0] * 8}
    read = {"first": 0, "lods": [1] * 3 + [0] * 8 + [1] * 3 + [0] * 8}
    recency = {"first": 48, "lods": [0] * 16}
    told = {
        "title": "recall, sequence 0, 22 entries for 64 tokens",
        "block_size": 8,
        "known": 62,
        "pieces": [f"word{token} " for token in range(65)],
        "spans": [[25, 28]],
        "not_asked": [],
        "contexts": {"recency": [recency], "lens": [even, read]},
    }
    return {"model": "bundle", "maps": [told]}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    optional("plotly")
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, evaluations={"eval": evaluation({"recency": 0.5, "random": 0.7})})
    close = {"recency": 5.0, "blind": 5.0012, "lens": 4.9975, "full": 4.998}
    closer = {f"val/horizon_loss/{policy}": loss for policy, loss in close.items()}
    with (folder / "metrics.jsonl").open("a") as file:  # labels of an axis as long as they get
        file.writelines(json.dumps({"step": step, **closer}) + "\n" for step in (0, 20, 40, 60))
    (folder / "eval_focus.json").write_text(json.dumps(focus_maps()))
    return write_report(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = optional("selenium.webdriver")
    Service = optional("selenium.webdriver.chrome.service").Service
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(300)
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    yield driver
    driver.quit()


def show(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    """Load the page at a width and in a colour scheme, and wait until it is drawn."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    prefer(browser, scheme)
    browser.get(page.as_uri())
    drawn = "return document.documentElement.dataset.drawn === 'yes'"
    wait(browser, lambda driver: driver.execute_script(drawn))


def prefer(browser: Any, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def point_at(browser: Any, selector: str) -> str:
    """Move the pointer onto what `selector` finds; return what the page then says of it.

    Scrolling hides what the page says, and a browser announces it late: the pointer moves until
    the page answers.
    """
    ActionChains = optional("selenium.webdriver.common.action_chains").ActionChains
    By = optional("selenium.webdriver.common.by").By
    element = browser.find_element(By.CSS_SELECTOR, selector)
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center'}); document.getElementById('tip').hidden = true",
        element,
    )
    offsets = itertools.cycle((0, 1))

    def answer(driver: Any) -> str:
        ActionChains(driver).move_to_element_with_offset(element, next(offsets), 0).perform()
        text: str = driver.find_element(By.ID, "tip").text
        return text

    found: str = wait(browser, answer)
    return found


def wait(browser: Any, condition: Callable[[Any], Any]) -> Any:
    """Return the first result of `condition` that is true."""
    WebDriverWait = optional("selenium.webdriver.support.ui").WebDriverWait
    return WebDriverWait(browser, 120).until(condition)


def texts(browser: Any, selector: str) -> list[str]:
    By = optional("selenium.webdriver.common.by").By
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def test_it_opens_without_network_and_without_complaints(browser: Any, page: Path) -> None:
    browser.get_log("browser")
    show(browser, page)
    assert browser.get_log("browser") == []
    fetched = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert [name for name in browser.execute_script(fetched) if "data:" not in name] == []
    drawn = "return [...document.querySelectorAll('.chart')].map((c) => !!c.querySelector('svg'))"
    charts = browser.execute_script(drawn)
    assert len(charts) >= 9
    assert all(charts)


def test_pointing_at_the_text_shows_the_scores(browser: Any, page: Path) -> None:
    show(browser, page)
    assert texts(browser, ".strip .count") == ["0 of 1", "1 of 1"]
    said = point_at(browser, ".text .asked")
    assert said == (
        "token 25: read token by token · asked for · LensNet's score +0.875 (round 1, as a gist)"
    )
    assert "tokens 0–7, one entry: read as a gist · LensNet's score -0.500" in point_at(
        browser, ".text span"
    )


def test_the_slider_goes_back_to_where_focus_started(browser: Any, page: Path) -> None:
    show(browser, page)
    before = len(texts(browser, ".text .l0"))
    browser.execute_script(
        "const slider = document.querySelector('.controls input'); slider.value = 0;"
        "slider.dispatchEvent(new Event('input'));"
    )
    assert len(texts(browser, ".text .l0")) == before - 8
    assert texts(browser, ".controls span") == [
        "lens, where focus starts: 0 of 1 asked for in full"
    ]


def test_another_policy_shows_what_it_reads(browser: Any, page: Path) -> None:
    By = optional("selenium.webdriver.common.by").By
    show(browser, page)
    browser.find_elements(By.CSS_SELECTOR, ".strip")[0].click()
    assert texts(browser, ".controls span") == ["recency chooses once: 0 of 1 asked for in full"]
    assert point_at(browser, ".text .nothing") == "tokens 0–47: not read · asked for"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_fits_the_screen_in_both_colour_schemes(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    show(browser, page, width, scheme)
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.scrollWidth <= innerWidth")
    background = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(background) == SCHEMES[scheme]
    outside = (
        "return [...document.querySelectorAll('.card')].filter((card) => {"
        "const box = card.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth;"
        "}).length"
    )
    assert browser.execute_script(outside) == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_words_neither_overlap_nor_break(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width)
    overlapping = (
        "return [...document.querySelectorAll('.chart')].filter((chart) => {"
        "const title = chart.querySelector('.g-ytitle text');"
        "const labels = [...chart.querySelectorAll('.ytick text')];"
        "return title && labels.some((label) => label.getBoundingClientRect().left"
        " < title.getBoundingClientRect().right);"
        "}).map((chart) => chart.id)"
    )
    assert browser.execute_script(overlapping) == []
    broken = (
        "document.querySelectorAll('details').forEach((part) => { part.open = true; });"
        "return [...document.querySelectorAll('td:first-child code')]"
        ".filter((key) => key.getClientRects().length > 1).map((key) => key.textContent)"
    )
    assert browser.execute_script(broken) == []


def test_charts_follow_the_colour_scheme(browser: Any, page: Path) -> None:
    show(browser, page)
    line = "return document.querySelector('#chart-loss .scatterlayer path.js-line').style.stroke"
    light = browser.execute_script(line)
    prefer(browser, "dark")
    wait(browser, lambda driver: driver.execute_script(line) != light)
