"""Every explorer in a browser: steered by keys, mouse and touch, it shows what Python computes."""

import functools
import html
import json

import pytest
from book.axe import serious_findings
from book.explorer_page import write_page
from book.explorer_records import EXPLORERS, explorer, plain, some_states
from book.screenshots import DESKTOP, PHONE, find_chromium, layout_shift, resize, set_theme, settle, until
from selenium.webdriver import ActionChains, Keys

pytestmark = pytest.mark.browser

if find_chromium() is None:
    pytest.skip("no Chromium with its driver on the PATH", allow_module_level=True)

EVERY = pytest.mark.parametrize("name", EXPLORERS, scope="module")
"""By explorer, so that its page is opened once."""

STEERS = {
    "second_order": "lr",
    "damping": "damping",
    "regression": "damping",
    "kfac": "damping",
    "whitening": "correlation",
    "interaction": "shown",
    "race": "budget",
    "replay": "trial",
    "landscape": "updates",
}
"""A slider of each that always changes its picture."""

REDRAW = 0.1
BUSY = 5
"""The bound of a redraw, in seconds, and how much slower a busy machine may be."""


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """The page of these explorers; that of one opens sooner."""
    folder = tmp_path_factory.mktemp("explorers")

    @functools.cache
    def page(*names):
        return write_page(folder, "-".join(names), (explorer(name).html() for name in names))

    return page


class Shown:
    """The explorer of the open page."""

    def __init__(self, driver, name):
        self.driver, self.name, self.explorer = driver, name, explorer(name)
        self.root = driver.find_element("css selector", ".sogrid-explorer")

    def find(self, selector):
        return self.root.find_element("css selector", selector)

    def input(self, control):
        return self.find(f'[data-control="{control}"]')

    @property
    def state(self):
        """What the controls say, each as a position."""
        script = """
        const of = (e) => (e.type === "checkbox" ? Number(e.checked) : e.selectedIndex ?? Number(e.value));
        return [...arguments[0].querySelectorAll("[data-control]")].map((e) => [e.dataset.control, of(e)]);
        """
        return dict(self.driver.execute_script(script, self.root))

    def wait(self):
        """Until the picture is that of the state."""
        script = """
        const [root, expected, done] = arguments;
        const patience = performance.now() + 5000;
        const poll = () => {
          if (root.dataset.shown === expected || performance.now() > patience) done(root.dataset.shown);
          else setTimeout(poll, 5);
        };
        poll();
        """
        expected = " ".join(map(str, self.state.values()))
        assert self.driver.execute_async_script(script, self.root, expected) == expected, self.name

    @property
    def picture(self):
        script = """
        const plain = (key, value) => (ArrayBuffer.isView(value) ? Array.from(value) : value);
        const { data, layout } = arguments[0].querySelector(".sogrid-plot");
        const text = arguments[0].querySelector(".sogrid-result").textContent;
        return JSON.stringify({ traces: data, layout, text }, plain);
        """
        return json.loads(self.driver.execute_script(script, self.root))

    @property
    def words(self):
        """What is said of each slider: to a screen reader, and beside it."""
        script = """
        const beside = (e) => e.parentElement.querySelector(`output[for="${e.id}"]`)?.innerText;
        const of = (e) => [e.dataset.control, [e.ariaValueText, beside(e)]];
        return [...arguments[0].querySelectorAll("input[type=range]")].map(of);
        """
        return dict(self.driver.execute_script(script, self.root))

    def set(self, state):
        """Put the controls where they should be, all at once."""
        script = """
        for (const [name, position] of Object.entries(arguments[1])) {
          const input = arguments[0].querySelector(`[data-control="${name}"]`);
          if (input.type === "checkbox") input.checked = Boolean(position);
          else if (input.tagName === "SELECT") input.selectedIndex = position;
          else input.value = position;
        }
        arguments[0].querySelector("[data-control]").dispatchEvent(new Event("input", { bubbles: true }));
        """
        self.driver.execute_script(script, self.root, state)
        self.wait()

    def assert_is_pythons(self):
        """The picture, the sentence and the words beside the sliders are Python's for this state."""
        state, picture, words = self.state, self.picture, self.words
        expected = self.explorer.at(**state)
        assert picture["text"] == expected["text"]
        _same(plain(expected["traces"]), picture["traces"])
        _same(plain(_asked(expected["layout"])), picture["layout"])
        for control in self.explorer.controls.values():
            if control.kind == "range" and len(control.words) > 1:
                word = control.words[state[control.name]]
                assert words[control.name] == [word, word]


def _asked(layout):
    """What a page may not change. Its height it may, and plotly fits the domains of axes that are tied."""
    tied = {k for k, v in layout.items() if isinstance(v, dict) and "scaleanchor" in v}
    axes = {k: {name: x for name, x in layout[k].items() if name != "domain"} for k in tied}
    return {k: v for k, v in (layout | axes).items() if k != "height"}


def _same(expected, found, place="picture"):
    """What Python has is on the page, where plotly may add to it."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            _same(value, found.get(key), f"{place}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list), place
        assert len(expected) == len(found), place
        for i, pair in enumerate(zip(expected, found, strict=True)):
            _same(*pair, f"{place}[{i}]")
    elif isinstance(expected, int | float) and not isinstance(expected, bool):
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-12), place
    else:
        assert found == expected, place


@pytest.fixture
def open_page(driver, page_of):
    def open_(*names, metrics=DESKTOP):
        resize(driver, metrics)
        driver.get("about:blank")
        driver.get_log("browser"), driver.get_log("performance")
        driver.get(page_of(*names).as_uri())
        settle(driver)

    return open_


@pytest.fixture
def show(driver, open_page):
    def show_(name, metrics=DESKTOP, keep=True):
        """The explorer as it begins, on the page that is open where that has been kept."""
        key = f"{name} {metrics['width']}"
        kept = driver.execute_script("return window.kept") == key
        if not kept:
            open_page(name, metrics=metrics)
            driver.execute_script("window.kept = arguments[0]", key if keep else None)
        shown = Shown(driver, name)
        if kept:
            set_theme(driver, "light")
            shown.set({control.name: control.start for control in shown.explorer.controls.values()})
        shown.wait()
        driver.execute_script("arguments[0].scrollIntoView()", shown.root)
        return shown

    return show_


def test_the_page_is_whole_and_asks_for_nothing_else(driver, open_page, page_of):
    open_page(*EXPLORERS)
    assert not driver.get_log("browser")
    messages = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith((page_of(*EXPLORERS).parent.as_uri(), "data:")) for url in urls)
    assert sum("plotly" in url for url in urls) == 1


@EVERY
def test_first_picture_is_pythons(show, name):
    show(name).assert_is_pythons()


@EVERY
def test_any_state_is_pythons(show, name):
    shown = show(name)
    for state in some_states(shown.explorer, 25):
        shown.set(state)
        shown.assert_is_pythons()


@EVERY
def test_every_control_answers_the_keyboard(show, name):
    """Sliders by arrows and ends, menus by arrows, boxes by the space bar."""
    shown = show(name)
    for control in shown.explorer.controls.values():
        if len(control.words) == 1:
            continue
        element, before = shown.input(control.name), shown.state[control.name]
        assert element.accessible_name == control.label
        keys = {"check": [Keys.SPACE], "select": [Keys.ARROW_DOWN], "range": [Keys.HOME, Keys.ARROW_RIGHT]}
        element.send_keys(keys[control.kind][0])
        shown.wait()
        for key in keys[control.kind][1:]:
            picture = shown.picture
            element.send_keys(key)
            shown.wait()
            assert shown.picture != picture
        assert shown.state[control.name] != before or before == 1
        shown.assert_is_pythons()


@EVERY
def test_sliders_follow_the_mouse(driver, show, name):
    shown = show(name)
    element, before = shown.input(STEERS[name]), shown.state[STEERS[name]]
    where = [int(element.size["width"] * share) for share in (-0.45, 0.2, -0.2)]
    chain = ActionChains(driver).move_to_element_with_offset(element, where[0], 0).click_and_hold()
    for x in where[1:]:
        chain.move_to_element_with_offset(element, x, 0)
    chain.release().perform()
    shown.wait()
    assert shown.state[STEERS[name]] != before
    shown.assert_is_pythons()


PLAY = """
const [root, done] = arguments;
const [button, input] = [".sogrid-play", "[data-control=trial]"].map((name) => root.querySelector(name));
const words = [button.textContent];
button.click(); // from the end: begins again
words.push(button.textContent);
const poll = () => {
  if (input.value < 2) return setTimeout(poll, 5);
  button.click();
  done([...words, button.textContent, input.value]);
};
poll();
"""


def test_a_slider_plays_until_it_is_told_to_stop(driver, show):
    shown = show("replay", keep=False)
    assert driver.execute_async_script(PLAY, shown.root) == ["Play", "Pause", "Play", "2"]
    shown.wait()
    assert shown.state["trial"] == 2
    shown.assert_is_pythons()


def test_the_point_is_dragged(driver, show):
    shown = show("second_order")
    before = shown.state
    ActionChains(driver).drag_and_drop_by_offset(shown.find(".sogrid-handle"), 60, 45).perform()
    shown.wait()
    after = shown.state
    assert after["w1"] > before["w1"]
    assert after["w2"] < before["w2"]
    shown.assert_is_pythons()
    _assert_handle_is_on_its_marker(driver, shown)


def _assert_handle_is_on_its_marker(driver, shown):
    script = """
    const middle = (e) => {
      const box = e.getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    };
    const points = arguments[0].querySelectorAll(".scatterlayer .trace .point");
    return [middle(arguments[0].querySelector(".sogrid-handle")), middle(points[points.length - 1])];
    """
    handle, marker = driver.execute_script(script, shown.root)
    assert handle == pytest.approx(marker, abs=1)


def test_the_point_answers_arrow_keys(driver, show):
    shown = show("second_order")
    before, handle = shown.state, shown.find(".sogrid-handle")
    for keys in (Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.SHIFT + Keys.ARROW_UP + Keys.NULL):
        handle.send_keys(keys)
    shown.wait()
    assert shown.state == before | {"w1": before["w1"] + 1, "w2": before["w2"] + 11}
    shown.assert_is_pythons()


@pytest.mark.parametrize("metrics", [DESKTOP, PHONE], ids=["mouse", "touch"])
def test_a_tap_puts_the_point(driver, show, metrics):
    shown = show("second_order", metrics)
    area = shown.find(".nsewdrag")
    if metrics is PHONE:
        _tap(driver, area, 0.75, 0.25)
    else:
        size = driver.execute_script("return arguments[0].getBoundingClientRect().width", area)
        ActionChains(driver).move_to_element_with_offset(area, int(size / 4), int(size / 4)).click().perform()
    until(lambda: shown.state["w1"] > 80)
    shown.wait()
    values = shown.explorer.controls["w1"].values
    assert values[shown.state["w1"]] == pytest.approx(1.5, abs=0.06)
    assert values[shown.state["w2"]] == pytest.approx(-1.5, abs=0.06)
    shown.assert_is_pythons()
    _assert_handle_is_on_its_marker(driver, shown)


def test_a_finger_drags_the_point_and_not_the_page(driver, show):
    shown = show("second_order", PHONE)
    handle = shown.find(".sogrid-handle")
    driver.execute_script("arguments[0].scrollIntoView({ block: 'center' })", handle)
    box = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", handle)
    x, y, scroll = box["left"] + 22, box["top"] + 22, driver.execute_script("return scrollY")
    before = shown.state
    steps = [("touchStart", 0), *(("touchMove", d) for d in (10, 25, 40)), ("touchEnd", None)]
    for kind, d in steps:
        points = [] if d is None else [{"x": x + d, "y": y + d}]
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    until(lambda: shown.state["w1"] > before["w1"])
    shown.wait()
    assert shown.state["w2"] < before["w2"]
    assert driver.execute_script("return scrollY") == scroll
    shown.assert_is_pythons()


REDRAWS = """
const [root, done] = arguments;
const inputs = [...root.querySelectorAll("input[type=range]")];
const times = [];
(async () => {
  for (let i = 0; i < 24; i++) {
    const input = inputs[i % inputs.length];
    input.value = (Number(input.value) + 1) % (Number(input.max) + 1);
    const before = root.dataset.shown;
    const begun = performance.now();
    input.dispatchEvent(new Event("input", { bubbles: true }));
    while (root.dataset.shown === before) await new Promise(requestAnimationFrame);
    times.push((performance.now() - begun) / 1000);
  }
  done(times.sort((a, b) => a - b));
})();
"""


@EVERY
def test_redraws_are_quick(driver, show, name, record_property):
    shown = show(name)
    times = driver.execute_async_script(REDRAWS, shown.root)
    record_property("median_ms", round(1000 * times[12], 1))
    print(f"{name}: median {1000 * times[12]:.0f} ms, worst {1000 * times[-1]:.0f} ms")
    assert times[12] < BUSY * REDRAW


@EVERY
def test_explorers_follow_the_theme_and_keep_it(driver, show, name):
    shown, looks = show(name), {}
    script = """
    const style = (selector) => getComputedStyle(arguments[0].querySelector(selector) ?? arguments[0]);
    const box = getComputedStyle(arguments[0].closest(".text_html"));
    return [style("svg.main-svg text").fill, style(".sogrid-result").color, box.backgroundColor];
    """
    for theme in ("light", "dark"):
        set_theme(driver, theme)
        shown.set(some_states(shown.explorer, 2)[theme == "dark"])
        looks[theme] = driver.execute_script(script, shown.root)
    assert all(light != dark for light, dark in zip(looks["light"][:2], looks["dark"][:2], strict=True))
    assert looks["dark"][2] == "rgba(0, 0, 0, 0)", "a light box on the dark page"


@EVERY
def test_screen_readers_hear_what_is_seen(show, name):
    shown = show(name)
    assert shown.find(".sogrid-result").get_attribute("role") == "status"
    label = shown.find(".sogrid-plot").get_attribute("aria-label")
    assert label == html.unescape(shown.explorer.alt)
    assert shown.find("svg.main-svg").get_attribute("aria-label") == label


@pytest.mark.parametrize("metrics", [DESKTOP, PHONE], ids=["desktop", "phone"], scope="module")
@EVERY
def test_nothing_moves_and_nothing_is_wider_than_the_page(driver, show, name, metrics):
    """Whatever the state: the height is the same, and so is where what comes after begins."""
    shown = show(name, metrics)
    size = """
    const wider = [document.documentElement, arguments[0], arguments[0].closest(".cell_output")]
      .map((element) => element.scrollWidth - element.clientWidth);
    return [arguments[0].offsetHeight, Math.max(...wider)];
    """
    sizes = {tuple(driver.execute_script(size, shown.root))}
    extremes = [
        {c.name: (len(c.words) - 1) * end for c in shown.explorer.controls.values()} for end in (0, 1)
    ]
    for state in [*extremes, *some_states(shown.explorer, 8)]:
        shown.set(state)
        sizes.add(tuple(driver.execute_script(size, shown.root)))
    assert len({height for height, _ in sizes}) == 1
    assert all(wider <= 0 for _, wider in sizes)


def _tap(driver, element, across=0.5, up=0.5):
    """A finger's tap on an element, by shares of its size."""
    driver.execute_script("arguments[0].scrollIntoView({ block: 'center' })", element)
    box = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)
    point = {"x": box["left"] + across * box["width"], "y": box["top"] + (1 - up) * box["height"]}
    for kind, points in (("touchStart", [point]), ("touchEnd", [])):
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


@EVERY
def test_a_phones_tap_moves_a_slider(driver, show, name):
    shown = show(name, PHONE)
    before = shown.picture
    _tap(driver, shown.input(STEERS[name]), 0.1)
    until(lambda: shown.picture != before)
    shown.wait()
    assert shown.picture != before
    shown.assert_is_pythons()


def test_nothing_moves_while_the_page_loads(driver, open_page):
    open_page(*EXPLORERS)
    assert layout_shift(driver) < 0.01


def test_a_readers_choice_in_the_legend_outlives_a_change(driver, show):
    shown = show("race", keep=False)
    click = """
    const entry = arguments[0].querySelectorAll(".legendtoggle")[1];
    entry.dispatchEvent(new MouseEvent("mousedown"));
    entry.dispatchEvent(new MouseEvent("mouseup"));
    """
    driver.execute_script(click, shown.root)
    script = "return arguments[0]._fullData.filter((t) => t.visible === 'legendonly').length"
    hidden = functools.partial(driver.execute_script, script, shown.find(".sogrid-plot"))
    until(hidden)
    count = hidden()
    shown.input("budget").send_keys(Keys.ARROW_LEFT)
    shown.wait()
    assert hidden() == count


def test_axe_finds_nothing_serious(driver, open_page):
    open_page(*EXPLORERS)
    assert not serious_findings(driver)
