"""The notebooks that a reader opens in JupyterLab: as files, and in a JupyterLab, opened once.

They are those of the pages' download buttons; `make lab` opens copies.
"""

import posixpath
import re
import shutil
from functools import cache
from urllib.parse import urlsplit

import nbformat
import pytest
from book.screenshots import DESKTOP, HTML, find_chromium, resize, until
from book.test_pages import ROOT, listed_pages
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from selenium.webdriver import Keys

from book import jupyterlab

pytestmark = pytest.mark.browser

SOURCES = HTML / "_sources"
if not (SOURCES / "book/index.ipynb").is_file():
    pytest.skip("no built book: run `make book` first", allow_module_level=True)

PAGES = listed_pages()
CHAPTERS = [page for page in PAGES if (ROOT / f"{page}.ipynb").is_file()]
EVERY = pytest.mark.parametrize("page", PAGES)
RAW = re.compile(r"\{[\w:.-]+\}`|\([\w:.-]+\)=\s|```|:::|\\begin\b|\\[a-z]{2,}\b|\$|\*\*|\]\(|</?\w+>", re.M)
"""What is left of a role, a label, a directive, of LaTeX, of Markdown, of HTML."""

SLIDERS = "book/ch4_experimental_setup/biased_random_search"


@cache
def notebook(page):
    return nbformat.read(SOURCES / f"{page}.ipynb", as_version=4)


def tokens(text):
    """What JupyterLab's Markdown makes of it, nearly: every token, those of a line too."""
    markdown = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, double_inline=True)
    return [part for token in markdown.parse(text) for part in [token, *(token.children or [])]]


def texts(page):
    return [cell for cell in notebook(page).cells if cell.cell_type == "markdown"]


@EVERY
def test_a_notebook_says_first_which_page_it_is(page):
    nbformat.validate(notebook(page))
    first = notebook(page).cells[0]
    assert first.id == "reader"
    assert f"_build/html/{page}.html" in first.source
    assert notebook(page).metadata.kernelspec.name == "python3"  # JupyterLab asks for one otherwise


@pytest.mark.parametrize("page", CHAPTERS)
def test_the_code_is_the_chapters(page):
    """All of it, without outputs; what the book does not show is folded and says what it is."""
    chapter = nbformat.read(ROOT / f"{page}.ipynb", as_version=4).cells
    ours = {cell.id: cell for cell in notebook(page).cells if cell.cell_type == "code"}
    assert list(ours) == [f"{i}" for i, cell in enumerate(chapter) if cell.cell_type == "code"]
    for i, cell in ours.items():
        tags = chapter[int(i)].metadata.get("tags", [])
        plumbing = any(tag.startswith("remove") for tag in tags)
        first, _, rest = cell.source.partition("\n")
        assert first.startswith("# Behind the scenes") is plumbing
        assert (rest if plumbing else cell.source) == chapter[int(i)].source
        assert cell.metadata.get("jupyter", {}).get("source_hidden", False) is bool(tags)
        assert not cell.outputs


@pytest.mark.parametrize("page", CHAPTERS)
def test_text_stands_between_the_code_as_in_the_chapter(page):
    """Cell by cell, told by the headings."""

    def headings(cells):
        found = [(i, t.tag) for i, cell in cells for t in tokens(cell.source) if t.type == "heading_open"]
        return [(int(i), tag) for i, tag in found]

    chapter = nbformat.read(ROOT / f"{page}.ipynb", as_version=4).cells
    ours = [(cell.id, cell) for cell in texts(page) if cell.id.isdigit()]
    assert headings(ours) == headings((i, c) for i, c in enumerate(chapter) if c.cell_type == "markdown")


@EVERY
def test_the_text_is_markdown(page):
    """No role, label, directive or environment is left, and the rest is understood as it was meant."""
    parts = [part for cell in texts(page) for part in tokens(cell.source)]
    assert not [part.content for part in parts if part.type == "text" and RAW.search(part.content)]
    assert not [part.info for part in parts if part.type == "fence" and part.info.startswith("{")]


@EVERY
def test_references_lead_to_a_cell(page):
    lost = []
    for cell in texts(page):
        for part in tokens(cell.source):
            link = urlsplit(part.attrs.get("href", "")) if part.type == "link_open" else None
            if link is None or link.scheme:
                continue
            target = (
                posixpath.normpath(posixpath.join(posixpath.dirname(page), link.path)) if link.path else page
            )
            target = target.removesuffix(".ipynb")
            cells = [cell.id for cell in notebook(target).cells] if target in PAGES else []
            if not cells or (link.fragment and link.fragment.removeprefix("cell-id=") not in cells):
                lost.append(part.attrs["href"])
    assert not lost


def test_what_is_folded_stays_folded():
    chapters = [cell.source for page in CHAPTERS for cell in nbformat.read(ROOT / f"{page}.ipynb", 4).cells]
    ours = [cell.source for page in CHAPTERS for cell in texts(page)]
    count = sum(len(re.findall(r"^[`:]+\{dropdown\}", source, re.M)) for source in chapters)
    assert 50 < count == sum(source.count("<details><summary>") for source in ours)


@pytest.fixture(scope="module")
def lab(driver, tmp_path_factory):
    """A browser in a JupyterLab of the notebooks."""
    if find_chromium() is None:
        pytest.skip("no Chromium with its driver on the PATH")
    root, folder = (tmp_path_factory.mktemp(name) for name in ("lab", "settings"))
    for page in PAGES:
        copy = root / f"{page}.ipynb"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCES / f"{page}.ipynb", copy)
    with jupyterlab.server(root, folder) as address:
        resize(driver, DESKTOP)
        jupyterlab.enter(driver, address)
        yield driver
        driver.get("about:blank")


LEFT = """
const [raw, done] = arguments;
const cells = [...document.querySelectorAll(".jp-Notebook:not(.lm-mod-hidden) .jp-MarkdownOutput")];
const text = (cell) => {
  const copy = cell.cloneNode(true);
  copy.querySelectorAll("code, pre, mjx-container, .jp-InternalAnchorLink").forEach((e) => e.remove());
  return copy.textContent;
};
const broken = (image) => image.decode().then(() => null, () => image.alt || image.src);
const images = cells.flatMap((cell) => [...cell.querySelectorAll("img")]);
const errors = cells.flatMap((cell) => [...cell.querySelectorAll("mjx-merror, .MathJax_Error")]);
Promise.all(images.map(broken)).then((lost) => done({
  cells: cells.length,
  raw: cells.flatMap((cell) => text(cell).match(new RegExp(raw, "m")) ?? []),
  lost: lost.filter(Boolean),
  images: images.length,
  errors: errors.map((e) => e.textContent),
  open: cells.flatMap((cell) => [...cell.querySelectorAll("details[open]")]).length,
}));
"""


def test_pages_in_jupyterlab_are_text_formulas_and_drawings(lab):
    """All of them, for one server and one browser."""
    wrong = {}
    for page in PAGES:
        jupyterlab.open_page(lab, f"{page}.ipynb")
        found = lab.execute_async_script(LEFT, RAW.pattern)
        jupyterlab.close(lab)
        wanted = {"raw": [], "lost": [], "errors": [], "open": 0, "cells": len(texts(page))}
        wanted["images"] = sum(cell.source.count("<img") for cell in texts(page))
        wrong |= {page: found} if found != wanted else {}
    assert not wrong


def test_references_open_their_cell(lab):
    """In another page, and in the same. (Without windowing JupyterLab finds cells of open pages alone.)"""
    page = "book/ch6_factorized_second_order/centered_gradient_descent.ipynb"

    def there():
        now = jupyterlab.current(lab)
        return now["path"] == page and "Where −λ goes" in now["text"]

    jupyterlab.open_page(lab, page)
    assert not there()
    jupyterlab.open_page(lab, "book/errata.ipynb")
    lab.find_element("link text", "§6.3.1").click()
    until(there, 30)
    link = lab.find_element("link text", "below")
    lab.execute_script("arguments[0].scrollIntoView()", link)
    until(lambda: not there())
    link.click()
    until(there)
    jupyterlab.close(lab)
    jupyterlab.close(lab)


def test_a_page_runs_to_its_end_and_its_sliders_live(lab):
    """From a fresh kernel, with figures and explorers drawn."""
    jupyterlab.open_page(lab, f"{SLIDERS}.ipynb", kernel=True)
    assert jupyterlab.run_all(lab) == []
    until(lambda: lab.find_elements("css selector", ".jp-OutputArea .js-plotly-plot .main-svg"))
    before = jupyterlab.drawn(lab)
    assert len(before) > 100
    slider = lab.find_element("css selector", ".jp-OutputArea .widget-slider .noUi-handle")
    slider.send_keys(Keys.ARROW_RIGHT)
    until(lambda: jupyterlab.drawn(lab) != before, 30)
    jupyterlab.close(lab)
