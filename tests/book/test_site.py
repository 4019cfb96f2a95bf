"""Every page of the built book in a browser, opened once from the disk: light, dark, on a phone.

A page of each kind is opened from a server too, as a phone does it.
"""

import functools
import http.server
import json
import re
import threading

import pytest
from book.axe import serious_findings
from book.screenshots import (
    DESKTOP,
    HTML,
    PHONE,
    find_chromium,
    layout_shift,
    pages,
    resize,
    set_theme,
    settle,
    until,
)
from selenium.webdriver import Keys

pytestmark = pytest.mark.browser

PAGES = pages()
if not PAGES:
    pytest.skip("no built book: run `make book` first", allow_module_level=True)
if find_chromium() is None:
    pytest.skip("no Chromium with its driver on the PATH", allow_module_level=True)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that does not print."""

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def roots():
    """The site's two addresses."""
    handler = functools.partial(QuietHandler, directory=HTML)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"file": HTML.as_uri(), "http": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()


def network(driver):
    """Messages of the browser's network since the last call: (method, parameters)."""
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"].startswith("Network."):
            yield message["method"], message["params"]


def trouble(messages, root):
    """Requests that leave the site or fail."""
    urls, found = {}, []
    for method, params in messages:
        if method == "Network.requestWillBeSent":
            url = urls[params["requestId"]] = params["request"]["url"]
            if not url.startswith((root, "data:", "blob:")):
                found.append(f"leaves the site: {url[:200]}")
        elif method == "Network.loadingFailed" and not params.get("canceled"):
            found.append(f"{params['errorText']}: {urls.get(params['requestId'], '?')[:200]}")
        elif method == "Network.responseReceived" and params["response"]["status"] >= 400:
            found.append(f"{params['response']['status']}: {params['response']['url'][:200]}")
    return found


def open_page(driver, url, metrics):
    resize(driver, metrics)
    driver.get("about:blank")
    list(network(driver)), driver.get_log("browser")
    driver.get(url)
    settle(driver)


def troubles(driver, root):
    """What went wrong since a page of this root was opened."""
    console = [e["message"] for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    return trouble(network(driver), root) + console


MARKS = (
    'class="sogrid-explorer"',
    'class="sogrid-figure',
    'class="math',
    "<img ",
    "searchtools.js",
    'http-equiv="refresh"',
)
KINDS = {tuple(mark in (HTML / p).read_text(encoding="utf-8") for mark in MARKS): p for p in reversed(PAGES)}
"""What a page loads → the first of these pages."""


@pytest.mark.parametrize("page", sorted(KINDS.values()))
def test_page_from_a_server_is_whole_and_reads_well_on_a_phone(driver, roots, page):
    open_page(driver, f"{roots['http']}/{page}", PHONE)
    assert not troubles(driver, roots["http"])
    assert layout_shift(driver) < 0.1
    assert_reads_well(driver)


@pytest.fixture(scope="module", params=PAGES)
def opened(driver, roots, request):
    """A page opened from the disk, once: where it led, what went wrong, and how much has moved."""
    open_page(driver, f"{roots['file']}/{request.param}", DESKTOP)
    return driver.current_url, troubles(driver, roots["file"]), layout_shift(driver)


@pytest.fixture
def opening(driver, opened):
    """For the tests that look at it, which leave it as it was, or come last."""
    assert driver.current_url == opened[0]
    return opened[1:]


def test_page_from_the_disk_is_whole_and_nothing_moves_while_it_loads(opening):
    """MathJax's fonts move it a little; a figure without room moves it much."""
    assert not opening[0]
    assert opening[1] < 0.1


FACTS = """
const figures = [...document.querySelectorAll(".sogrid-figure")];
const skip = "pre, code, script, style, noscript, textarea, .sogrid-figure script";
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const raw = [];
const cut = [];
const scrolls = (e) => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
const place = document.createRange();
const touching = (f) => {
  const labels = [...f.querySelectorAll('svg.main-svg [class$="tick"] > text')];
  const seen = labels.filter((t) => t.style.visibility !== "hidden");
  const axes = Object.groupBy(seen, (t) => t.parentNode.classList[0]);
  const boxes = Object.values(axes).map((axis) => axis.map((t) => t.getBoundingClientRect()));
  const meet = (a, b, from, to) => a[from] < b[to] && b[from] < a[to];
  const touch = (a, b) => meet(a, b, "left", "right") && meet(a, b, "top", "bottom");
  return boxes.flatMap((axis) => axis.filter((a, i) => axis.some((b, j) => j < i && touch(a, b)))).length;
};
const clipped = (f) => {
  const edge = f.getBoundingClientRect();
  const texts = [...f.querySelectorAll("svg.main-svg text")];
  const outside = (box) => box.width && (box.left < edge.left - 2 || box.right > edge.right + 2);
  return texts.filter((t) => outside(t.getBoundingClientRect())).map((t) => t.textContent);
};
const beyond = (box, parent) => box.width && box.right > innerWidth + 1 && !scrolls(parent);
for (const formula of document.querySelectorAll("main mjx-container")) {
  if (formula.closest("details:not([open])")) continue;
  if (beyond(formula.getBoundingClientRect(), formula.parentElement)) cut.push(formula.textContent);
}
while (walker.nextNode()) {
  const { data, parentElement } = walker.currentNode;
  if (/\\$|\\\\[([]/.test(data) && !parentElement.closest(skip)) raw.push(data.trim().slice(0, 80));
  if (!data.trim() || !parentElement.closest("main")) continue;
  if (parentElement.closest("details:not([open]), mjx-container")) continue; // MathML for the ear is not seen
  place.selectNodeContents(walker.currentNode);
  if (beyond(place.getBoundingClientRect(), parentElement)) cut.push(data.trim().slice(0, 80));
}
return {
  raw,
  cut,
  misspelt: [...document.querySelectorAll("mjx-merror")].map((e) => e.textContent),
  figures: figures.map((f) => ({
    label: f.querySelector("[aria-label]")?.getAttribute("aria-label") ?? "",
    shapes: f.querySelectorAll("svg.main-svg path").length,
    images: f.querySelectorAll("svg.main-svg image").length,
    title: f.querySelector(".g-gtitle text")?.textContent ?? "",
    touching: touching(f),
    clipped: clipped(f),
    height: f.getBoundingClientRect().height - parseFloat(f.style.getPropertyValue("--sogrid-height")),
  })),
  plotly: document.querySelectorAll('script[src*="plotly.min.js"]').length,
  height: document.documentElement.scrollHeight,
  width: document.documentElement.scrollWidth - document.documentElement.clientWidth,
};
"""


def test_page_reads_well(driver, opening):
    facts = assert_reads_well(driver)
    if re.search(r"/book/(ch\d|appendix)", driver.current_url):
        assert facts["height"] <= 9_500, "a chapter's page is about ten screens long: fold, or cut in two"


def assert_reads_well(driver):
    facts = driver.execute_script(FACTS)
    assert not facts["raw"], "mathematics that was not typeset"
    assert not facts["misspelt"]
    assert not facts["cut"], "text beyond the edge of the page"
    assert facts["width"] <= 0, "the page scrolls sideways"
    assert facts["plotly"] == (1 if facts["figures"] else facts["plotly"])
    for figure in facts["figures"]:
        assert figure["label"]
        assert figure["shapes"] > 5 or figure["images"]  # a heatmap is one image
        assert not figure["title"], "a caption says what a figure shows"
        assert not figure["touching"], f"labels of an axis touch: {figure['label']}"
        assert not figure["clipped"], "text beyond the edge of a figure"
        assert figure["height"] == 0, "a figure changed its reserved height"
    return facts


INK = """
return [...document.querySelectorAll(".sogrid-figure")].map((f) => {
  const text = f.querySelector("svg.main-svg text");
  return text ? getComputedStyle(text).fill : null;
});
"""


def test_figures_follow_the_theme(driver, opening):
    ink = {}
    for theme in ("dark", "light"):
        set_theme(driver, theme)
        ink[theme] = driver.execute_script(INK)
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        ink[theme].append(background)
    pairs = zip(ink["light"], ink["dark"], strict=True)  # a picture without axes has no ink
    assert all(light != dark or light is None for light, dark in pairs)


def test_axe_finds_nothing_serious(driver, opening):
    assert not serious_findings(driver)


def test_a_dark_page_is_printed_in_light(driver, roots):
    open_page(driver, f"{roots['file']}/{PAGES[0]}", DESKTOP)
    set_theme(driver, "dark")
    driver.execute_script(
        "addEventListener('beforeprint', () => (window.printed = document.documentElement.dataset.theme))"
    )
    driver.execute_cdp_cmd("Page.printToPDF", {})
    theme = "document.documentElement.dataset.theme"
    assert driver.execute_script(f"return [window.printed, {theme}]") == ["light", "dark"]


def test_explorers_of_a_page_answer(driver, opening):
    """Each is drawn and redraws at a key; that it draws what Python computes is in test_explorers.py."""
    for root in driver.find_elements("css selector", ".sogrid-explorer"):
        before = root.get_attribute("data-shown")
        assert before
        slider = root.find_element("css selector", "input[type=range]")
        slider.send_keys(Keys.ARROW_RIGHT if slider.get_attribute("value") == "0" else Keys.ARROW_LEFT)
        until(lambda root=root, before=before: root.get_attribute("data-shown") != before)
    assert not [e["message"] for e in driver.get_log("browser") if e["level"] == "SEVERE"]


def test_page_reads_well_on_a_phone(driver, opening):
    """Made as narrow as one, after all other tests of the page."""
    resize(driver, PHONE)
    settle(driver)
    assert_reads_well(driver)
