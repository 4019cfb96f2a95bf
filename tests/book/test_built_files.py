"""Files of the built book, read without a browser: links, alternative texts, downloads, sizes."""

import gzip
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from book.screenshots import HTML, pages
from book.test_pages import listed_pages

pytestmark = pytest.mark.browser

PAGES = pages()
if not PAGES:
    pytest.skip("no built book: run `make book` first", allow_module_level=True)

PAGE_BYTES = 500_000
SITE_BYTES = 25_000_000
VISIT_BYTES = 3_000_000
FONTS = "vendor/mathjax/output/chtml/fonts/woff-v2"
ON_DEMAND = (
    "vendor/plotly/*.js",
    "vendor/fontawesome/webfonts/fa-solid*.woff2",
    f"{FONTS}/MathJax_[AM]*.woff",
    f"{FONTS}/MathJax_Size*.woff",
)
"""What scripts and style sheets of a page ask for."""


class Contents(HTMLParser):
    """What a page can be linked by (``anchors``), what it links, its images' alternative texts, its icons."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.images, self.icons = set(), set(), [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        self.links |= {attributes[key] for key in ("href", "src") if attributes.get(key)}
        if tag == "link" and "icon" in (attributes.get("rel") or "").split():
            self.icons.add(attributes["href"])
        if tag == "img":
            self.images.append((attributes.get("src", ""), attributes.get("alt") or ""))


@cache
def contents(file: Path) -> Contents:
    return Contents(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_site_lead_somewhere(page):
    """To a file, and where they name a place in a page, to that place."""
    lost = []
    for link in contents(HTML / page).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or link == "#":
            continue
        target = (HTML / page).parent / unquote(parts.path) if parts.path else HTML / page
        anchor = unquote(parts.fragment)
        if not target.is_file() or (anchor and anchor not in contents(target).anchors):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_its_icon(page):
    """A browser asks the server's root for one otherwise, in vain."""
    (icon,) = contents(HTML / page).icons
    assert (HTML / page).parent.joinpath(icon).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_images_say_what_they_show(page):
    """In words: without an alternative text of its own, an image gets its file's name as one."""
    ours = [(src, alt) for src, alt in contents(HTML / page).images if "_static/" not in src]
    assert not [src for src, alt in ours if len(alt.split()) < 3]


@pytest.mark.parametrize("name", listed_pages())
def test_a_page_offers_its_notebook(name):
    """What is in it: test_reader_notebooks.py."""
    offered = [
        link for link in contents(HTML / f"{name}.html").links if link.endswith(f"_sources/{name}.ipynb")
    ]
    assert len(offered) == 1


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_heavy(page):
    assert (HTML / page).stat().st_size <= PAGE_BYTES


def test_the_site_is_not_heavy():
    assert sum(p.stat().st_size for p in HTML.rglob("*") if p.is_file()) <= SITE_BYTES


def test_a_first_visit_is_not_heavy():
    """Served compressed: a page with a figure and formulas, and all that it loads."""
    page = HTML / "book/ch6_factorized_second_order/kfac.html"
    text = page.read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|link)\b[^>]*\b(?:src|href)="([^"?]+\.(?:js|css))[^"]*"', text)
    files = {page, *((page.parent / unquote(link)).resolve() for link in loaded)}
    files |= {file for pattern in ON_DEMAND for file in (HTML / "_static").glob(pattern)}
    assert len(files) > 25
    assert sum(len(gzip.compress(file.read_bytes())) for file in files) <= VISIT_BYTES
