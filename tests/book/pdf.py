"""The whole book as one PDF: Chromium's print of each built page, in the order of the contents.

    cd tests; python -m book.pdf OUT.pdf

Solutions are open, the sidebar is the outline, and links between pages lead to sheets.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urldefrag

from book.screenshots import DESKTOP, HTML, chromium, resize, settle
from pypdf import PageObject, PdfReader, PdfWriter
from pypdf.generic import ArrayObject, DictionaryObject, NameObject, TextStringObject

PAPER = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True, "scale": 0.7}
"""A4, in inches, and letters as large as a book's."""

CONTENTS = """
const lines = document.querySelectorAll("nav.bd-links :is(p.caption, a.reference)");
return [...lines].map((e) => [e.textContent.trim(), e.href ? e.href.split("#")[0] : null]);
"""
OPEN = 'document.querySelectorAll("details.sd-dropdown").forEach((e) => (e.open = true))'


def contents(driver) -> list[tuple[str, str | None]]:
    """The lines of the sidebar: a page's title and address, or a part's title."""
    driver.get((HTML / "book" / "index.html").as_uri())
    return driver.execute_script(CONTENTS)


def printed(driver) -> bytes:
    """The page that is open, on paper."""
    return base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", PAPER)["data"])


def bind(driver, lines: list[tuple[str, str | None]]) -> PdfWriter:
    """The pages of these lines of the contents, one after the other."""
    book, places, part = PdfWriter(), {}, None
    for title, address in lines:
        if address is None:
            part = title
            continue
        driver.get(address)
        settle(driver)
        driver.execute_script(OPEN)
        start = len(book.pages)
        page = PdfReader(io.BytesIO(printed(driver)))
        book.append(page, import_outline=False)
        if isinstance(part, str):
            part = book.add_outline_item(title=part, page_number=start)
        book.add_outline_item(title=title, page_number=start, parent=part)
        sheets = book.pages[start:]
        places[address] = [sheets[0].indirect_reference, NameObject("/Fit")]
        for name, place in page.named_destinations.items():
            sheet = sheets[page.get_destination_page_number(place)].indirect_reference
            places[f"{address}#{name[1:]}"] = [sheet, *place.dest_array[1:]]
        for note in _notes(sheets):  # names of two pages may be the same
            if isinstance(note.get("/Dest"), str):
                uri = TextStringObject(f"{address}#{note.pop('/Dest')[1:]}")
                note[NameObject("/A")] = DictionaryObject({NameObject("/URI"): uri})
    for note in _notes(book.pages):
        uri = str(note.get("/A", {}).get("/URI", ""))
        if place := places.get(uri) or places.get(urldefrag(uri).url):
            note[NameObject("/Dest")] = ArrayObject(place)
            del note["/A"]
    return book


def _notes(sheets: Iterable[PageObject]) -> Iterator[DictionaryObject]:
    """Their links."""
    return (note.get_object() for sheet in sheets for note in sheet.get("/Annots", ()))


def main(path: Path) -> None:
    """Print the book."""
    with chromium() as driver:
        resize(driver, DESKTOP)
        book = bind(driver, contents(driver))
    path.parent.mkdir(parents=True, exist_ok=True)
    book.write(path)
    print(f"{path}: {len(book.pages)} sheets, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
