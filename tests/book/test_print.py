"""Printed pages: what Chromium makes of them, read back with pdfium."""

import io
import re

import pypdf
import pypdfium2
import pytest
from book.pdf import bind, contents
from book.pdf import printed as pdf_of
from book.screenshots import DESKTOP, HTML, find_chromium, resize, set_theme, settle

pytestmark = pytest.mark.browser

PAGES = {
    "explorer": "book/ch3_second_order/gauss_newton_and_fisher.html",
    "mathematics": "book/ch6_factorized_second_order/local_criterion.html",
}
if not all((HTML / page).is_file() for page in PAGES.values()):
    pytest.skip("no built book: run `make book` first", allow_module_level=True)
if find_chromium() is None:
    pytest.skip("no Chromium with its driver on the PATH", allow_module_level=True)

MARGIN = 24
"""White on every side, in points."""

WORDS = """
const shown = (e) => e.checkVisibility({ visibilityProperty: true }) && !e.closest("details:not([open])");
const texts = [...document.querySelectorAll(".bd-article :is(p, h1, h2, figcaption, pre)")].filter(shown);
return texts.map((e) => e.innerText).join(" ");
"""
AROUND = 'return [...document.querySelectorAll("nav.bd-links a")].map((a) => a.innerText.trim())'

WIDER = """
dispatchEvent(new Event("beforeprint"));
document.querySelector(".bd-article").style.width = "500px";
const wider = [...document.querySelectorAll(".sogrid-plot svg.main-svg")].map(
  (svg) => svg.getBoundingClientRect().right - svg.closest(".sogrid-plot").getBoundingClientRect().right
);
return [wider.length, Math.max(...wider), document.querySelectorAll("svg.main-svg:not([viewBox])").length];
"""
"""How much figures stick out of a narrow article, before a script could draw them again."""


@pytest.fixture(scope="module", params=PAGES.values(), ids=PAGES.keys())
def printed(driver, request):
    """A dark page's words and the titles around it, and what is on the paper: words and pictures."""
    resize(driver, DESKTOP)
    driver.get((HTML / request.param).as_uri())
    settle(driver)
    set_theme(driver, "dark")
    words, around = driver.execute_script(WORDS), driver.execute_script(AROUND)
    pdf = pdf_of(driver)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    figures = driver.execute_script(WIDER)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    sheets = list(pypdfium2.PdfDocument(pdf))
    text = " ".join(sheet.get_textpage().get_text_range() for sheet in sheets)
    pictures = [sheet.render(grayscale=True).to_numpy().squeeze() for sheet in sheets]
    return {"words": words, "around": around, "text": text, "pictures": pictures, "figures": figures}


@pytest.fixture(scope="module")
def bound(driver):
    """The first pages of the book as one PDF, and the lines of the contents that they are."""
    resize(driver, DESKTOP)
    lines = contents(driver)[:3]
    out = io.BytesIO()
    bind(driver, lines).write(out)
    return lines, pypdf.PdfReader(out)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]{3,}", text.lower())


def test_what_the_page_says_is_on_the_paper(printed):
    """Except where a word is broken at the end of a line."""
    there = set(words(printed["text"]))
    expected = words(printed["words"])
    assert len(expected) > 300
    assert sum(word not in there for word in expected) <= 0.01 * len(expected)


def test_the_paper_is_white_with_ink_inside_its_margins(printed):
    for picture in printed["pictures"]:
        assert picture.mean() > 220
        assert picture.min() < 100
        inside = picture[MARGIN:-MARGIN, MARGIN:-MARGIN]
        assert (picture < 255).sum() == (inside < 255).sum()


def test_figures_are_scaled_to_the_paper(printed):
    number, wider, unscaled = printed["figures"]
    assert number > 0
    assert wider <= 1
    assert unscaled == 0


def test_no_navigation_is_printed(printed):
    """The titles of other pages, which the sidebar lists, are not on every sheet, nor all on one."""
    titles = [title for title in printed["around"] if len(title) > 12]
    assert len(titles) > 10
    assert sum(title in printed["text"] for title in titles) <= 3


def test_the_outline_of_a_bound_book_is_its_contents(bound):
    lines, book = bound
    found = pypdfium2.PdfDocument(book.stream).get_toc()
    starts = {title: mark.get_dest().get_index() for mark in found if (title := mark.get_title())}
    assert list(starts) == [title for title, _ in lines]
    for title, address in lines:
        first = book.pages[starts[title]].extract_text()
        assert address is None or words(title)[0] in first.lower()


def test_links_between_pages_of_a_bound_book_lead_to_sheets(bound):
    """And those to the rest of the book are as they were."""
    lines, book = bound
    notes = [note.get_object() for sheet in book.pages for note in sheet.get("/Annots", ())]
    addresses = {str(note["/A"]["/URI"]).split("#")[0] for note in notes if "/A" in note}
    assert not addresses & {address for _, address in lines}
    targets = [note["/Dest"][0].get_object() for note in notes if "/Dest" in note]
    assert len({book.get_page_number(sheet) for sheet in targets}) > 2
