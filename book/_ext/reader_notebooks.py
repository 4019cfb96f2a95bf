"""Sphinx extension: every page as a notebook for JupyterLab, whose Markdown knows nothing of MyST.

When Sphinx writes a page it has resolved what the page's text only names: glued numbers, citations, numbers
of figures, places in other pages. From there the text is written down again as plain Markdown, cell by cell,
between the code cells of the chapter, which stay as they are. Code that a reader of the book does not see is
collapsed; drawings are inside the notebook; a reference is a link to a cell.

The notebooks are in ``_build/lab``, which ``make lab`` opens, and each is the download of its page. A node
that has no Markdown here is a warning, and so fails the build.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from base64 import b64encode
from collections.abc import Callable
from functools import cache
from html import escape
from mimetypes import guess_type
from pathlib import Path
from textwrap import indent

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

FOLDER = "lab"
PLUMBING = {"remove-input", "remove-cell"}
BEHIND = "# Behind the scenes: numbers, tables and checks of the text\n"  # the line that JupyterLab shows
CELL_LINES = 10_000  # by which myst-nb numbers the lines of a cell
SPECIAL = re.compile(r"([\\`*_\[\]<>$~|&])")
BLOCK_MARK = re.compile(r"^(\d*)([-+#.)])(?=[\s#]|$)")  # of an item or a heading
BANNER = """\
**{title}**, a page of *{book}*: `{place}`

{run}Keep what you change under another name: this file is written anew with the book.

{ways}"""
RUN = """\
**Run ▸ Run All Cells** draws the figures and brings sliders to life. A bar is folded code: click it. Numbers
in the text are those of the book. """
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}  # JupyterLab asks otherwise

logger = logging.getLogger(__name__)


class NoMarkdownError(Exception):
    """A node of a kind that this module does not know."""


class Markdown:
    """Markdown of resolved nodes, as JupyterLab reads it: GitHub's, with `$` mathematics and some HTML.

    Args:
        folder: Where the names of images begin.
        link: From a reference to its address.
        number: From a figure to what is written before its caption.
    """

    def __init__(self, folder: Path, link: Callable, number: Callable):
        self.folder, self.link, self.number = folder, link, number

    def inline(self, node: nodes.Node) -> str:
        """Of a node inside a paragraph."""
        return self._method("inline", node)(node)

    def block(self, node: nodes.Node) -> str:
        """Of a node that is a paragraph or holds some."""
        return self._method("block", node)(node)

    def _method(self, kind, node):
        method = getattr(self, f"{kind}_{type(node).__name__}", None)
        if method is None:
            raise NoMarkdownError(f"{type(node).__name__} ({kind})")
        return method

    def line(self, node: nodes.Element) -> str:
        """Of the children of a node that is one line."""
        return BLOCK_MARK.sub(r"\1\\\2", " ".join(self.children(node).split()))

    def blocks(self, node: nodes.Element) -> str:
        return "\n\n".join(filter(None, map(self.block, node.children)))

    # Inside a paragraph.

    def children(self, node):
        return "".join(map(self.inline, node.children))

    def nothing(self, node):
        return ""

    inline_inline = inline_term = children
    inline_target = inline_index = nothing

    def inline_Text(self, node):
        return SPECIAL.sub(r"\\\1", str(node))

    def inline_emphasis(self, node):
        return f"*{self.children(node)}*"

    def inline_strong(self, node):
        return f"**{self.children(node)}**"

    def inline_literal(self, node):
        text = node.astext().replace("\n", " ")
        return f"`{text}`" if "`" not in text else f"`` {text} ``"

    def inline_math(self, node):
        return f"${' '.join(node.astext().split())}$"

    def inline_reference(self, node):
        return f"[{self.children(node)}](<{self.link(node)}>)"

    inline_literal_emphasis, inline_literal_strong = children, inline_literal
    inline_number_reference = inline_reference

    # Paragraphs, and what holds them.

    block_paragraph = block_compact_paragraph = line
    block_container = block_compound = block_glossary = block_definition = block_desc_content = blocks
    block_field_body = block_desc = blocks
    block_target = block_index = block_comment = block_toctree = nothing

    def block_PassthroughTextElement(self, node):
        return f"**{self.line(node)}**"

    block_rubric = block_field_name = block_PassthroughTextElement

    def block_title(self, node):
        """Of a margin note, if it has one; those of sections are headings."""
        return self.block_PassthroughTextElement(node) if node.astext() else ""

    def block_math_block(self, node):
        tag = rf" \tag{{{node['number']}}}" if node.get("label") else ""
        return f"$$\n{node.astext().strip()}{tag}\n$$"

    def block_literal_block(self, node):
        language = node.get("language", "default")
        fence = "~~~" if "```" in node.astext() else "```"
        return f"{fence}{'' if language == 'default' else language}\n{node.astext()}\n{fence}"

    def block_doctest_block(self, node):
        return f"```pycon\n{node.astext()}\n```"

    def block_transition(self, node):
        return "---"

    def block_block_quote(self, node):
        return indent(self.blocks(node), "> ", lambda line: True)

    block_sidebar = block_block_quote  # a margin note

    def items(self, node, marks):
        items = [
            indent(self.blocks(item), " " * (len(mark) + 1))[len(mark) + 1 :]
            for item, mark in zip(node, marks, strict=True)
        ]
        return "\n".join(f"{mark} {item}" for mark, item in zip(marks, items, strict=True))

    def block_bullet_list(self, node):
        return self.items(node, ["-"] * len(node))

    def block_enumerated_list(self, node):
        start = node.get("start", 1)
        return self.items(node, [f"{i}." for i in range(start, start + len(node))])

    def block_definition_list(self, node):
        return "\n\n".join(
            f"**{', '.join(self.line(n) for n in item if isinstance(n, nodes.term))}**\n\n"
            + "\n\n".join(self.block_block_quote(n) for n in item if isinstance(n, nodes.definition))
            for item in node
        )

    def block_field_list(self, node):
        return "\n\n".join(f"{self.block(name)}\n\n{self.block_block_quote(body)}" for name, body in node)

    def block_desc_signature(self, node):
        return f"**`{node.astext()}`**"

    def block_citation(self, node):
        return f"- {' '.join(map(self.block, node[1:]))}"

    def block_table(self, node):
        (group,) = node.findall(nodes.tgroup)
        rows = [list(row) for part in group[-2:] for row in part if isinstance(row, nodes.row)]
        texts = [["<br>".join(map(self.block, entry)) for entry in row] for row in rows]
        sides = ["--:" if "text-right" in entry["classes"] else ":--" for entry in rows[0]]
        if not isinstance(group[-2], nodes.thead):
            texts.insert(0, [""] * len(sides))
        return "\n".join(f"| {' | '.join(row)} |" for row in [texts[0], sides, *texts[1:]])

    def block_figure(self, node):
        return "\n\n".join(self.caption(n) if isinstance(n, nodes.caption) else self.block(n) for n in node)

    def caption(self, node):
        return f"*{self.number(node.parent)}.* {self.line(node)}"

    def block_image(self, node):
        data = b64encode((self.folder / node["uri"]).read_bytes()).decode()
        address = f"data:{guess_type(node['uri'])[0]};base64,{data}"
        return f'<img class="jp-needs-light-background" src="{address}" alt="{escape(node.get("alt", ""))}">'

    def block_dropdown_main(self, node):
        title, body = node
        return f"<details><summary>{escape(title[0].astext())}</summary>\n\n{self.blocks(body)}\n\n</details>"

    def block_unenumerable_node(self, node):
        """A theorem or an algorithm, of sphinx-proof."""
        title, body = (node[0], node[1]) if isinstance(node[0], nodes.title) else (None, node[0])
        name = f"**{node['realtype'].capitalize()}**{self.children(title) if title else ''}"
        return indent(f"{name}\n\n{self.blocks(body)}", "> ", lambda line: True)

    def heading(self, node: nodes.title, level: int) -> str:
        return f"{'#' * level} {self.line(node)}"


def cells_of(doctree: nodes.document):
    """Yield ``(cell, level, node)`` for a page's blocks: titles (of a level from 1) and whatever else (0).

    A cell is its number in the page's notebook, or, where the page is none, that of a section.
    """
    cell, notebook = 0, doctree["source"].endswith(".ipynb")

    def walk(section, level):
        nonlocal cell
        for node in section:
            if isinstance(node, nodes.section):
                yield from walk(node, level + 1)
                continue
            title = isinstance(node, nodes.title)
            if notebook:
                lines = (getattr(n, "line", None) or 0 for n in node.findall())
                cell = next((line // CELL_LINES - 1 for line in lines if line >= CELL_LINES), cell)
            elif title:
                cell += 1
            yield cell, level * title, node

    yield from walk(doctree, 0)


class Reader:
    """The notebook of one page of a book."""

    def __init__(self, app: Sphinx, page: str):
        self.app, self.env, self.page = app, app.env, page

    def notebook(self, doctree: nodes.document) -> nbformat.NotebookNode:
        """The page's text as Markdown between its code cells, each with its place as its id.

        Raises:
            NoMarkdownError: If the page has a node of a kind that has no Markdown.
        """
        writer = Markdown(Path(self.app.srcdir), self.link, self.number)
        source, texts, captions = Path(self.env.doc2path(self.page)), {}, {}
        for cell, level, node in cells_of(doctree):
            if isinstance(node, nodes.container) and node.get("nb_element") == "cell_code":
                captions[cell] = [writer.caption(n) for n in node.findall(nodes.caption)]
            else:
                texts.setdefault(cell, []).append(
                    writer.heading(node, level) if level else writer.block(node)
                )
        if source.suffix == ".ipynb":
            book = nbformat.read(source, as_version=4)
        else:
            book = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
        sources = [*book.cells, *[None] * (1 + max(texts) - len(book.cells))]
        book.cells = [text_cell("reader", [self.banner(writer, bool(book.cells))])]
        for i, cell in enumerate(sources):
            if cell and cell.cell_type == "code":
                book.cells += [code_cell(f"{i}", cell), text_cell(f"{i}-caption", captions.get(i, []))]
            else:
                book.cells.append(text_cell(f"{i}", texts.get(i, [])))
        book.cells = [cell for cell in book.cells if cell.source]
        return book

    def link(self, reference: nodes.reference) -> str:
        """Address of what is referred to: a cell of this or another notebook, or one of the web."""
        file, _, anchor = reference.get("refuri", "#" + reference.get("refid", "")).partition("#")
        if not reference.get("internal") and "refuri" in reference:
            return reference["refuri"]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(self.page), file)).removesuffix(".html")
        cell = places(self.env, target if file else self.page).get(anchor)
        return (self.beside(target) if file else "") + ("" if cell is None else f"#cell-id={cell}")

    def beside(self, page: str) -> str:
        """Address of another page."""
        return posixpath.relpath(page, posixpath.dirname(self.page)) + ".ipynb"

    def number(self, figure: nodes.figure) -> str:
        """What the book calls a figure."""
        number = self.env.toc_fignumbers[self.page]["figure"][figure["ids"][0]]
        return self.app.config.numfig_format["figure"] % ".".join(map(str, number))

    def banner(self, writer: Markdown, runs: bool) -> str:
        """Which page this is, where the book is, and what there is beside it."""
        root, titles = self.env.config.root_doc, self.env.titles
        _, before, after = self.env.collect_relations().get(self.page, (None, None, None))

        def way(page, form):
            return form.format(f"[{writer.children(titles[page])}](<{self.beside(page)}>)") if page else ""

        ways = (
            way(before, "← {}"),
            way(root if root not in (self.page, before) else None, "{}"),
            way(after, "{} →"),
        )
        title, address = self.app.config.html_title, os.environ.get("SOGRID_REPOSITORY")
        return BANNER.format(
            ways=" · ".join(filter(None, ways)),
            title=writer.children(titles[self.page]),
            book=f"[{title}](<{address}>)" if address else title,
            run=RUN if runs else "",
            place=f"_build/{Path(self.app.outdir).name}/{self.page}.html",
        )


def text_cell(name: str, blocks: list[str]) -> nbformat.NotebookNode:
    """A cell of text."""
    return nbformat.v4.new_markdown_cell("\n\n".join(filter(None, blocks)), id=name)


def code_cell(name: str, cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The chapter's code, collapsed where the book does not show it."""
    tags = set(cell.metadata.get("tags", []))
    metadata = {"source_hidden": True} if tags & {"hide-input", *PLUMBING} else {}
    metadata |= {"outputs_hidden": True} if "remove-cell" in tags else {}
    source = BEHIND * bool(tags & PLUMBING) + cell.source
    return nbformat.v4.new_code_cell(source, id=name, metadata={"jupyter": metadata} if metadata else {})


@cache
def places(env: BuildEnvironment, page: str) -> dict[str, int]:
    """The cell of everything on a page that can be referred to."""
    found = {}
    for cell, level, node in cells_of(env.get_doctree(page)):
        named = node.parent if level else node
        found |= {
            name: cell for part in [named, *node.findall(nodes.Element)] for name in part.get("ids", ())
        }
    return found


class Notebooks:
    """The notebooks of a build."""

    def __init__(self) -> None:
        self.written: list[str] = []

    @staticmethod
    def file(app: Sphinx, page: str) -> Path:
        """The notebook of a page."""
        return Path(app.outdir).parent / FOLDER / f"{page}.ipynb"

    def missing(self, app: Sphinx, env: BuildEnvironment, *changes: set[str]) -> list[str]:
        """Pages that have none, and are to be read again."""
        return [page for page in sorted(env.found_docs) if not self.file(app, page).exists()]

    def write(self, app: Sphinx, doctree: nodes.document, page: str) -> None:
        """Write that of a page which is being written."""
        if app.builder.format != "html":
            return
        try:
            notebook = Reader(app, page).notebook(doctree)
        except NoMarkdownError as kind:
            logger.warning("no Markdown for a node in JupyterLab: %s", kind, location=page)
            return
        file = self.file(app, page)
        file.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, file)
        self.written.append(page)

    def offer(self, app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
        """Have the theme's button offer that of a page which is no notebook itself."""
        if doctree and context.get("page_source_suffix") != ".ipynb":
            context["ipynb_source"] = f"{pagename}.ipynb"

    def publish(self, app: Sphinx, exception: Exception | None) -> None:
        """Put them where the button of a page looks for its source."""
        for page in self.written if exception is None else ():
            shutil.copyfile(self.file(app, page), Path(app.outdir) / "_sources" / f"{page}.ipynb")


def setup(app: Sphinx) -> dict:
    notebooks = Notebooks()
    app.connect("env-get-outdated", notebooks.missing)
    app.connect("doctree-resolved", notebooks.write, priority=100)  # before what is added for HTML alone
    app.connect("html-page-context", notebooks.offer, priority=400)
    app.connect("build-finished", notebooks.publish)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
