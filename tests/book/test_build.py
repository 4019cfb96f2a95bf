"""What builds do when a page raises, when what pages run on changes, and when the book is published.

A book of two pages, built three times, is looked at by every test.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from book.test_pages import ROOT

pytestmark = pytest.mark.slow


def write(book: Path, page: str, code: str) -> None:
    cells = nbformat.v4.new_markdown_cell("# A page"), nbformat.v4.new_code_cell(code)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), book / f"book/{page}.ipynb")


def build(book: Path, **variables: str) -> dict:
    """As `make book` does it: whether it failed, and how often the first page has run until now."""
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "-W", "-n", "--keep-going"]
    environment = {k: v for k, v in os.environ.items() if k not in ("SOGRID_BOOK", "SOGRID_REPOSITORY")}
    result = subprocess.run(
        command, cwd=book, env=environment | variables, capture_output=True, text=True, check=False
    )
    print(result.stdout, result.stderr)
    return {"failed": bool(result.returncode), "runs": len((book / "runs").read_text())}


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """This book's configuration, extension and assets around two pages, the second of which raises.

    Built as it is; once more; and mended, with another record, for its home on GitHub.
    """
    book = tmp_path_factory.mktemp("book")
    for name in ("_config.yml", "book/_ext", "book/_assets", "book/_root", "book/references.bib"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (book / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, book / name)
    toc = "format: jb-book\nroot: book/counts\nchapters:\n- file: book/raises\n"
    (book / "_toc.yml").write_text(toc)
    for name in ("sogrid/a.py", "book/results/r.json", "requirements.txt"):
        (book / name).parent.mkdir(exist_ok=True)
        (book / name).write_text("one")
    write(book, "counts", f"with open({str(book / 'runs')!r}, 'a') as file:\n    file.write('x')")
    write(book, "raises", "1 / 0")
    broken = [build(book), build(book)]
    write(book, "raises", "1 / 1")
    (book / "book/results/r.json").write_text("two")
    mended = build(book, SOGRID_REPOSITORY="https://github.com/someone/sogrid")
    page = (book / "_build/html/book/counts.html").read_text()
    links = re.findall(r'href="(https://[^"]+)"', page)
    return [
        *broken,
        mended | {"links": links, "notebook": (book / "_build/lab/book/counts.ipynb").read_text()},
    ]


def test_a_page_that_raises_fails_every_build(builds):
    assert [build["failed"] for build in builds] == [True, True, False]


def test_a_page_runs_again_only_when_what_it_runs_on_has_changed(builds):
    """Which files these are is in test_extension.py."""
    assert [build["runs"] for build in builds] == [1, 1, 2]


def test_a_published_page_links_to_its_home_and_to_no_raw_notebook(builds):
    links = builds[-1]["links"]
    assert "https://github.com/someone/sogrid" in links
    assert not [link for link in links if "mybinder" in link or "colab" in link]


def test_a_notebook_says_where_the_book_is(builds):
    """If that is known."""
    assert "https://github.com/someone/sogrid" in builds[-1]["notebook"]
