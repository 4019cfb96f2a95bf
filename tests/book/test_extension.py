"""The book's Sphinx extensions: what the cache depends on, what a page loses, what JupyterLab is given."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils import nodes

FOLDER = Path(__file__).resolve().parents[2] / "book" / "_ext"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def extension():
    return load("sogrid_book")


@pytest.fixture
def project(tmp_path):
    """A tree with one file of each kind the cache watches, and a page."""
    for name in ("sogrid/a.py", "book/lab/a.py", "book/results/r.json", "requirements.txt", "book/index.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["sogrid/a.py", "sogrid/new.py", "book/lab/new.py", "book/results/r.json", "requirements.txt"]
)
def test_cache_depends_on_what_a_page_runs_on(extension, project, name):
    before = extension.inputs_hash(project)
    assert before == extension.inputs_hash(project)
    (project / name).write_text("two")
    assert extension.inputs_hash(project) != before


def test_cache_depends_on_the_data_folder(extension, project, monkeypatch):
    monkeypatch.setenv("SOGRID_DATA", "here")
    before = extension.inputs_hash(project)
    monkeypatch.setenv("SOGRID_DATA", "there")
    assert extension.inputs_hash(project) != before


@pytest.mark.parametrize(
    "name", ["book/index.md", "sogrid/__pycache__/a.pyc", "sogrid/.hidden", "book/lab/.ruff_cache/a"]
)
def test_cache_does_not_depend_on_prose_or_leftovers(extension, project, name):
    before = extension.inputs_hash(project)
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text("two")
    assert extension.inputs_hash(project) == before


def test_old_caches_are_removed(extension, project):
    folder = project / "_build/.jupyter_cache"
    for age, name in enumerate(["new", "old", "older"]):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    config = SimpleNamespace()
    extension.set_cache(SimpleNamespace(outdir=project / "_build/html", srcdir=project), config)
    current = Path(config.nb_execution_cache_path)
    assert {p.name for p in folder.iterdir()} == {current.name, "new"}


def test_only_a_book_with_a_home_links_to_it(extension, monkeypatch):
    config = SimpleNamespace(html_theme_options={}, myst_substitutions={})
    monkeypatch.delenv("SOGRID_REPOSITORY", raising=False)
    extension.set_home(None, config)
    assert not config.html_theme_options
    assert "github" not in config.myst_substitutions["home"].lower()
    monkeypatch.setenv("SOGRID_REPOSITORY", "https://github.com/someone/sogrid")
    extension.set_home(None, config)
    assert config.html_theme_options["repository_url"] == "https://github.com/someone/sogrid"
    assert "launch_buttons" not in config.html_theme_options
    assert "https://github.com/someone/sogrid" in config.myst_substitutions["home"]


def test_figures_are_numbered_by_chapter(extension):
    pages = {
        "book/index": {"front": (1,)},
        "book/ch2_optimization/gradient_descent": {"a": (2,), "b": (3,)},
        "book/ch2_optimization/hyperparameters": {"a": (4,)},
        "book/new": {"a": (6,)},
        "book/appendix_b_fisher": {"a": (5,)},
        "book/step_costs": {"a": (7,)},
    }
    through = {page: {"figure": figures} for page, figures in pages.items()} | {"book/status": {}}
    parts = {
        "Chapter 2: optimization": [
            "book/ch2_optimization/gradient_descent",
            "book/ch2_optimization/hyperparameters",
        ],
        "Chapter 7: beyond": ["book/new"],
        "Appendices": ["book/appendix_b_fisher"],
        "Chapters of others": ["book/step_costs"],
    }
    subtrees = [SimpleNamespace(caption=caption, items=items) for caption, items in parts.items()]
    subtrees.append(SimpleNamespace(caption=None, items=["book/status"]))
    site = SimpleNamespace(root=SimpleNamespace(subtrees=subtrees))
    env = SimpleNamespace(toc_fignumbers=through, external_site_map=site)
    extension.number_by_chapter(None, env)
    found = {page: [n for (n,) in kinds["figure"].values()] for page, kinds in env.toc_fignumbers.items()}
    assert list(found.values()) == [["1"], ["2-1", "2-2"], ["2-3"], ["7-1"], ["B-1"], ["2"], []]
    extension.number_through(None, env)
    assert env.toc_fignumbers is through


def test_thebe_is_taken_off_the_page(extension):
    scripts = [
        SimpleNamespace(filename="_static/sphinx-thebe.js", attributes={}),
        SimpleNamespace(
            filename=None, attributes={"body": 'const THEBE_JS_URL = ""; const thebe_selector = ""'}
        ),
        SimpleNamespace(filename="_static/js/sogrid-book.js", attributes={"defer": "defer"}),
        "_static/copybutton.js",
    ]
    context = {"script_files": list(scripts)}
    extension.remove_thebe(None, "page", "page.html", context, None)
    assert context["script_files"] == scripts[2:]


def test_screen_readers_hear_what_is_there(extension):
    summary, entry = (
        '<summary aria-label="Toggle hidden content">',
        '<div class="citation" role="doc-biblioentry">',
    )
    context = {"body": f"{summary}\n<p>Show code cell source</p>{entry}"}
    extension.tidy_body(None, "page", "page.html", context, None)
    assert context["body"] == (
        '<summary>\n<p>Show code cell source</p><div class="citation" role="listitem">'
    )


def test_a_missing_package_is_named(extension):
    with pytest.raises(RuntimeError, match="no-such-package"):
        extension.package_folder("no-such-package")


@pytest.fixture(scope="module")
def markdown():
    """The writer of reader notebooks, with references to `there`."""
    module = load("reader_notebooks")
    return module.Markdown(Path(), lambda reference: "there", lambda figure: "Fig. 1"), module.NoMarkdownError


def paragraph(*children):
    return nodes.paragraph("", "", *children)


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (paragraph(nodes.Text("a_1 * b $ <c> [d]\n`e`")), r"a\_1 \* b \$ \<c\> \[d\] \`e\`"),
        (paragraph(nodes.Text("1. no item")), r"1\. no item"),
        (paragraph(nodes.Text("2.1.2")), "2.1.2"),
        (paragraph(nodes.math("", "a\n|b|")), "$a |b|$"),
        (paragraph(nodes.literal("", "a`b")), "`` a`b ``"),
        (paragraph(nodes.reference("", "", nodes.emphasis("", "a"))), "[*a*](<there>)"),
        (nodes.bullet_list("", nodes.list_item("", *map(paragraph, map(nodes.Text, "ab")))), "- a\n\n  b"),
        (nodes.enumerated_list("", nodes.list_item("", paragraph(nodes.Text("a"))), start=3), "3. a"),
        (nodes.math_block("", "a\n"), "$$\na\n$$"),
        (nodes.literal_block("", "a = 1", language="python"), "```python\na = 1\n```"),
        (nodes.block_quote("", paragraph(nodes.Text("a")), paragraph(nodes.Text("b"))), "> a\n> \n> b"),
    ],
)
def test_text_is_written_for_jupyterlab(markdown, node, text):
    assert markdown[0].block(node) == text


def test_a_node_without_markdown_is_named(markdown):
    writer, error = markdown
    with pytest.raises(error, match="topic"):
        writer.block(nodes.topic())


def test_a_page_without_its_notebook_is_read_again(tmp_path):
    notebooks = load("reader_notebooks").Notebooks()
    app = SimpleNamespace(outdir=tmp_path / "html")
    env = SimpleNamespace(found_docs={"book/a", "book/b"})
    assert notebooks.missing(app, env) == ["book/a", "book/b"]
    notebooks.file(app, "book/a").parent.mkdir(parents=True)
    notebooks.file(app, "book/a").touch()
    assert notebooks.missing(app, env) == ["book/b"]
