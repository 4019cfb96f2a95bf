"""The book's sources agree with each other and with the tree, whether or not a book is built."""

import json
import re
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
NOTEBOOKS = sorted(p for p in BOOK.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MAP = "how_this_companion_is_made.ipynb"
COLUMNS = {2: ROOT / "sogrid", 3: ROOT / "tests", 4: BOOK / "experiments"}


def listed_pages() -> list[str]:
    """Pages of _toc.yml, in order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))

    def files(entry):
        if isinstance(entry, list):
            return [f for e in entry for f in files(e)]
        found = [entry[key] for key in ("root", "file") if key in entry]
        return found + [f for key in ("parts", "chapters", "sections") for f in files(entry.get(key, []))]

    return files(toc)


def pages_of(captions: str) -> list[str]:
    """Pages of the parts of _toc.yml whose captions begin so, a pattern."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    return [
        page["file"] for part in parts if re.match(captions, part["caption"]) for page in part["chapters"]
    ]


def table_rows(page: str) -> list[list[str]]:
    """Cells of every table row of a page's text, header and rule left out."""
    text = (BOOK / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    lines = text.splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [
        r
        for i, r in enumerate(rows)
        if ":--" not in r[0] and (i + 1 == len(rows) or ":--" not in rows[i + 1][0])
    ]


def map_entries():
    """(path, planned) for every file that the map names."""
    for row in table_rows(MAP):
        for column, folder in COLUMNS.items():
            for name, planned in re.findall(r"`([^`]+)`( \*planned\*)?", row[column]):
                yield folder / name, bool(planned)


def test_every_listed_page_exists():
    pages = listed_pages()
    assert pages[0] == "book/index"
    assert len(set(pages)) == len(pages)
    missing = [p for p in pages if not any((ROOT / p).with_suffix(s).is_file() for s in (".md", ".ipynb"))]
    assert not missing


def test_every_page_is_listed():
    sources = [*NOTEBOOKS, *BOOK.rglob("*.md")]
    hidden = ("_", ".")
    pages = {
        p.relative_to(ROOT).with_suffix("").as_posix()
        for p in sources
        if not any(part.startswith(hidden) for part in p.relative_to(BOOK).parts)
        and p.relative_to(BOOK).parts[0] not in ("experiments", "lab", "results")
    }
    assert pages == set(listed_pages())


def test_templates_are_not_pages():
    assert not [p for p in listed_pages() if p.startswith("book/experiments")]


def test_map_names_files_that_exist():
    entries = list(map_entries())
    assert len(entries) > 40
    missing = sorted(str(p.relative_to(ROOT)) for p, planned in entries if not planned and not p.is_file())
    assert not missing, f"add *planned* behind them in book/{MAP}, or write them"


def test_map_plans_only_what_is_missing():
    there = sorted({str(p.relative_to(ROOT)) for p, planned in map_entries() if planned and p.is_file()})
    assert not there, f"remove *planned* behind them in book/{MAP}"


def test_map_links_the_chapters():
    linked = {link for row in table_rows(MAP) for link in re.findall(r"\]\(([^)]+)\)", row[1])}
    chapters = {page.removeprefix("book/") for page in pages_of(r"Chapter \d|Appendices")}
    assert {Path(link).with_suffix("").as_posix() for link in linked} == chapters


def test_map_lists_every_template():
    templates = {p.name for p in (BOOK / "experiments").glob("*.ipynb")}
    assert templates <= {p.name for p, planned in map_entries() if not planned}


def test_notation_names_code_that_exists():
    names = {
        name
        for row in table_rows("notation.md")
        for name in re.findall(
            r"`((?:curvature|kronecker|losses|networks|optimizers|statistics)\.[\w.]+)`", row[2]
        )
    }
    assert len(names) > 15
    for name in sorted(names):
        module, _, attribute = name.rpartition(".")
        while not (ROOT / "sogrid" / f"{module.replace('.', '/')}.py").is_file() and "." in module:
            module, _, head = module.rpartition(".")
            attribute = f"{head}.{attribute}"
        target = reduce(getattr, attribute.split("."), import_module(f"sogrid.{module}"))
        assert target is not None, name


def test_every_reference_has_a_link():
    entries = re.split(r"\n(?=@)", (BOOK / "references.bib").read_text(encoding="utf-8"))
    assert len(entries) > 40
    bare = [entry.split(",")[0] for entry in entries if not re.search(r"^  (doi|eprint|url) ", entry, re.M)]
    assert not bare, "add a DOI, an arXiv number (eprint) or an address"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(BOOK).as_posix())
def test_notebook_stores_no_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    stored = [c for c in cells if c.get("outputs") or c.get("execution_count") is not None]
    assert not stored, "run nbstripout (make format)"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(BOOK).as_posix())
def test_figures_of_a_page_are_named_and_captioned(path):
    """A cell with one of the two has the other, and no name is used twice on a page."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    figures = [
        c["metadata"]["mystnb"]["figure"] for c in cells if "figure" in c["metadata"].get("mystnb", {})
    ]
    assert all(f.get("name") and f.get("caption") for f in figures)
    assert len({f["name"] for f in figures}) == len(figures)


BEYOND = [ROOT / f"{page}.ipynb" for page in pages_of("Chapter 7")]
CHAPTERS = [p for p in NOTEBOOKS if re.match("(ch[1-6]|appendix)", p.relative_to(BOOK).as_posix())]


@pytest.mark.parametrize(
    "path",
    [*CHAPTERS, *BEYOND, BOOK / "step_costs.ipynb", BOOK / "when_to_refresh.ipynb"],
    ids=lambda p: p.relative_to(BOOK).as_posix(),
)
def test_a_chapter_opens_with_a_question_and_its_figure(path):
    """And nothing between the two: the code of the figure is folded."""
    text, figure = json.loads(path.read_text(encoding="utf-8"))["cells"][:2]
    opening = (
        r"^# .+\n\n(.*\s)?\*[^*]+\?\*"
        if path in [*BEYOND, BOOK / "when_to_refresh.ipynb"]
        else r"^# .+\n\n\*[^*]+\?\*"
    )
    assert re.search(opening, "".join(text["source"]), re.MULTILINE)
    assert "hide-input" in figure["metadata"]["tags"]
    assert figure["metadata"]["mystnb"]["figure"]["caption"]
