"""A page of explorers without a book: their HTML, the book's scripts and style, the theme's style."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "book" / "_assets"
THEMES = "pydata_sphinx_theme", "sphinx_book_theme"

PAGE = """<!DOCTYPE html>
<html lang="en" data-theme="light" data-mode="light">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explorers</title><link rel="icon" href="data:,">
{styles}
<link rel="stylesheet" href="css/sogrid-book.css">
<script defer src="js/sogrid-book.js"></script>
<script defer src="js/sogrid-formulas.js"></script>
<script defer src="js/sogrid-explorers.js"></script>
</head>
<body>
<main class="bd-content" style="display: block; width: 100%; max-width: 50rem; margin: auto; padding: 1rem">
<article class="bd-article"><h1>Explorers</h1>
{cells}
<p id="after">What comes after does not move.</p>
</article></main></body></html>
"""
CELL = (
    '<div class="cell docutils container"><div class="cell_output docutils container">'
    '<div class="output text_html">{}</div></div></div>'
)


def write_page(folder: Path, name: str, explorers: Iterable[str]) -> Path:
    """Write the page and all it needs into ``folder``; ``explorers`` are their HTML.

    Pages of one folder share their scripts, which a browser compiles once.
    """
    shutil.copytree(ASSETS, folder, dirs_exist_ok=True)
    plotly = folder / "vendor/plotly/plotly.min.js"
    plotly.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(_package("plotly") / "package_data/plotly.min.js", plotly)
    links = []
    for theme in THEMES:
        for file in (_package(theme) / "theme" / theme / "static/styles").glob("*-theme.css"):
            shutil.copy2(file, folder / "css" / file.name)
            links.append(f'<link rel="stylesheet" href="css/{file.name}">')
    page = folder / f"{name}.html"
    cells = "\n".join(map(CELL.format, explorers))
    page.write_text(PAGE.format(styles="\n".join(links), cells=cells), encoding="utf-8")
    return page


def _package(name: str) -> Path:
    return Path(os.path.dirname(find_spec(name).origin))
