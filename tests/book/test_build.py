"""What a build does when a page raises, and when something changes that pages run on: a book of one page."""

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


@pytest.fixture
def book(tmp_path):
    """This book's configuration, extension and assets, around one page."""
    for name in ("_config.yml", "book/_ext", "book/_assets", "book/_root", "book/references.bib"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/page\n")
    for name in ("sogrid/a.py", "book/results/r.json", "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    return tmp_path


def write(book: Path, code: str) -> None:
    cells = nbformat.v4.new_markdown_cell("# A page"), nbformat.v4.new_code_cell(code)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), book / "book/page.ipynb")


def build(book: Path, **variables: str) -> int:
    """As `make book` does it."""
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "-W", "-n", "--keep-going"]
    environment = {k: v for k, v in os.environ.items() if k not in ("SOGRID_BOOK", "SOGRID_REPOSITORY")}
    result = subprocess.run(
        command, cwd=book, env=environment | variables, capture_output=True, text=True, check=False
    )
    print(result.stdout, result.stderr)
    return result.returncode


def test_a_page_runs_again_when_what_it_runs_on_has_changed(book):
    runs = book / "runs"
    write(book, f"with open({str(runs)!r}, 'a') as file:\n    file.write('x')")
    for change, expected in ((None, 1), (None, 1), ("book/results/r.json", 2), ("sogrid/a.py", 3)):
        if change:
            (book / change).write_text("two")
        assert build(book) == 0
        assert len(runs.read_text()) == expected, change


def test_a_page_that_raises_fails_every_build(book):
    write(book, "1 / 0")
    assert build(book)
    assert build(book)
    write(book, "1 / 1")
    assert build(book) == 0


def test_a_published_page_opens_in_binder_and_colab(book):
    write(book, "1")
    assert build(book) == 0
    page = book / "_build/html/book/page.html"
    services = "mybinder.org", "colab.research.google.com"
    assert not any(service in page.read_text() for service in services)
    assert build(book, SOGRID_REPOSITORY="https://github.com/someone/sogrid") == 0
    links = re.findall(r'href="(https://[^"]+)"', page.read_text())
    wanted = (
        "https://mybinder.org/v2/gh/someone/sogrid/main?urlpath=lab/tree/book/page.ipynb",
        "https://colab.research.google.com/github/someone/sogrid/blob/main/book/page.ipynb",
    )
    assert set(wanted) <= set(links)
