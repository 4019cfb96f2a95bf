"""Headless Chromium for the built book, and a command that photographs its pages.

    python tests/book/screenshots.py OUT [PAGE ...]

writes light, dark and phone-sized PNG files of the pages (default: all) to the folder OUT.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HTML = Path(__file__).resolve().parents[2] / "_build" / "html"
DESKTOP = {"width": 1280, "height": 900, "mobile": False}
PHONE = {"width": 390, "height": 844, "mobile": True}


def find_chromium() -> tuple[str, str] | None:
    """Paths of Chromium (or Chrome) and its driver, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for path in map(shutil.which, names) if path), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def pages() -> list[str]:
    """Every HTML page of the built book, relative to its root."""
    files = (p.relative_to(HTML) for p in HTML.rglob("*.html"))
    return sorted(p.as_posix() for p in files if "_static" not in p.parts)


@contextmanager
def chromium() -> Iterator:
    """A selenium driver of a fresh browser that records its network and its console.

    Raises:
        RuntimeError: If there is no Chromium.
    """
    from selenium import webdriver

    found = find_chromium()
    if found is None:
        raise RuntimeError("no Chromium with its driver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    with tempfile.TemporaryDirectory(prefix="sogrid-chromium-", ignore_cleanup_errors=True) as profile:
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-dev-shm-usage",
            "--disable-sync",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
        driver.set_script_timeout(60)
        try:
            yield driver
        finally:
            driver.quit()


def resize(driver, metrics: dict) -> None:
    """Emulate a screen; a mobile one has touch and no hover."""
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"deviceScaleFactor": 1, **metrics})
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": metrics["mobile"]})


def settle(driver) -> None:
    """Wait until mathematics is typeset and every figure is drawn as wide as its place (or has failed)."""
    driver.execute_async_script(
        """
        const done = arguments[0];
        const figures = () => [...document.querySelectorAll(".sogrid-plot:not(.sogrid-failed)")];
        const fits = (f) => !f.offsetWidth || f.offsetWidth === f._fullLayout?.width;
        const drawn = () => figures().every((f) => f.dataset.drawn && fits(f));
        const poll = () => (drawn() ? requestAnimationFrame(done) : setTimeout(poll, 20));
        const typeset = window.MathJax?.startup?.promise ?? Promise.resolve();
        typeset.then(() => requestAnimationFrame(poll));
        """
    )


def set_theme(driver, theme: str) -> None:
    """Switch the page to "light" or "dark" as its button does, wait for its figures, and end what fades."""
    driver.execute_async_script(
        """
        const [theme, done] = arguments;
        const page = document.documentElement;
        page.dataset.theme = page.dataset.mode = theme;
        const figures = [...document.querySelectorAll(".sogrid-plot[data-drawn]")];
        const patience = performance.now() + 5000;
        const changed = () => figures.every((f) => f.dataset.drawn === theme);
        const poll = () => {
          const fades = (a) => a instanceof CSSTransition && a.playState === "running";
          const fading = document.getAnimations().filter(fades);
          fading.forEach((a) => a.finish());
          if ((changed() && !fading.length) || performance.now() > patience) done();
          else requestAnimationFrame(poll);
        };
        requestAnimationFrame(poll);
        """,
        theme,
    )


def layout_shift(driver) -> float:
    """How much has moved since the page was opened, as browsers sum it up."""
    return driver.execute_async_script(
        """
        const done = arguments[0];
        const told = new PerformanceObserver((list) => {
          const shifts = list.getEntriesByType("layout-shift");
          done(shifts.reduce((sum, { value }) => sum + value, 0));
        });
        requestAnimationFrame(() => requestAnimationFrame(() => {
          told.observe({ type: "layout-shift", buffered: true });
          told.observe({ type: "navigation", buffered: true }); // of which there is one
        }));
        """
    )


def until(done: Callable[[], object], seconds: float = 10) -> None:
    """Ask until it is so.

    Raises:
        TimeoutError: If it is not, for so long.
    """
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {seconds} seconds")
        time.sleep(0.01)


def photograph(driver, path: Path, metrics: dict) -> None:
    """Save the whole page, in a window as tall as it is."""
    height = driver.execute_script("return document.documentElement.scrollHeight")
    resize(driver, {**metrics, "height": height})
    settle(driver)
    path.parent.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(path))


def main(out: Path, names: list[str]) -> None:
    """Photograph pages: light and dark on a desktop, light on a phone."""
    with chromium() as driver:
        for name in names or pages():
            for label, metrics, theme in (
                ("light", DESKTOP, "light"),
                ("dark", DESKTOP, "dark"),
                ("phone", PHONE, "light"),
            ):
                resize(driver, metrics)
                driver.get((HTML / name).as_uri())
                settle(driver)
                set_theme(driver, theme)
                photograph(
                    driver, out / f"{name.removesuffix('.html').replace('/', '-')}-{label}.png", metrics
                )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
