"""Sphinx extension of the book: execution cache, files of other packages, clean pages.

* The execution cache of jupyter-book looks at the code of a page only. Here it also depends on what the
  page runs on (the packages, the stored results, the requirements): a change there re-runs the pages.
* Pages that are not in the cache are executed before Sphinx reads them, several at once, each on one core;
  where there are many, their kernels are forks of one that has imported torch (``lab.kernels``).
* ``plotly.min.js`` and MathJax are copied from the installed wheels into the site, so that a built page
  needs no network and no large file is in git.
* Where ``SOGRID_REPOSITORY`` names the book's home on GitHub, as when it is published, pages have a button
  that leads there, and the first page links to it (``{{ home }}``). Binder and Colab have none: they would
  open a chapter's source; the notebooks that one can read are in the build, each the download of its page.
* Kernels see ``SOGRID_BOOK=1``: a figure or an explorer gives its static view.
* A page's text stays hidden until its formulas are typeset, so that it does not move under the reader.
* sphinx-thebe writes its script twice on every page, although the book does not use it: it is removed.
* Figures are numbered by chapter, with a hyphen (Fig. 6-2), for the thesis's own numbers have a point.
* A screen reader reads the line that shows hidden code as it is, not as myst-nb names it, and finds the items
  of the bibliography's list.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

from lab import kernels

WATCHED = ("sogrid", "book/lab", "book/results", "requirements.txt")
VERSIONS = ("ipywidgets", "numpy", "plotly", "torch")
KEEP = 2
AT_ONCE = 4
MANY = 3
SPOKEN = {
    '<summary aria-label="Toggle hidden content">': "<summary>",
    'role="doc-biblioentry"': 'role="listitem"',
}


def inputs_hash(root: Path) -> str:
    """Hash of everything a page's outputs depend on, apart from its own code."""
    digest = hashlib.sha256()
    for name in WATCHED:
        path = root / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and not any(
                p.startswith((".", "__pycache__")) for p in file.relative_to(root).parts
            ):
                digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    for name in VERSIONS:
        try:
            digest.update(f"{name} {version(name)}\0".encode())
        except PackageNotFoundError:
            continue
    digest.update(os.environ.get("SOGRID_DATA", "").encode())
    return digest.hexdigest()[:16]


def set_cache(app: Sphinx, config: Config) -> None:
    """Choose the cache folder by the hash; of the others, keep the latest."""
    folder = Path(app.outdir).parent / ".jupyter_cache"
    current = folder / inputs_hash(Path(app.srcdir))
    current.mkdir(parents=True, exist_ok=True)
    os.utime(current)
    config.nb_execution_cache_path = str(current)
    caches = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for old in caches[:-KEEP]:
        shutil.rmtree(old)


def execute_pages(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Execute what is not in the cache; a page that fails is not cached, so that Sphinx runs it and tells."""
    if app.config.nb_execution_mode != "cache":
        return
    cache = get_cache(app.config.nb_execution_cache_path)
    files = [Path(env.doc2path(name)) for name in docnames]
    listed = [cache.add_nb_to_project(str(file)).pk for file in files if file.suffix == ".ipynb"]
    pages = [page.pk for page in cache.list_unexecuted(filter_pks=listed)]
    executor = load_executor("local-serial", cache, logging.getLogger(__name__))
    timeout, at_once = app.config.nb_execution_timeout, max(1, min(AT_ONCE, os.cpu_count() or 1, len(pages)))
    if at_once > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the kernels share the machine
    with kernels.warm() if len(pages) >= MANY else nullcontext(), ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda pk: executor.run_and_cache(filter_pks=[pk], timeout=timeout), pages))


def set_home(app: Sphinx, config: Config) -> None:
    """A button and a link to where the book lives, if that is known."""
    home = "in the folder that this book was built from"
    if repository := os.environ.get("SOGRID_REPOSITORY"):
        config.html_theme_options |= {"repository_url": repository, "use_repository_button": True}
        home = f"on [GitHub]({repository})"
    config.myst_substitutions = {**config.myst_substitutions, "home": home}


def copy_vendor(app: Sphinx) -> None:
    """Copy plotly.js and MathJax to ``_static/vendor``, where they are new or have changed."""
    if app.builder.format != "html":
        return
    plotly = package_folder("plotly") / "package_data"
    mathjax = package_folder("sphinx-mathjax-offline") / "static/mathjax"
    target = Path(app.outdir) / "_static/vendor"
    copies = {plotly / "plotly.min.js": target / "plotly/plotly.min.js"}
    for pattern in ("tex-chtml.js", "output/chtml/fonts/woff-v2/*.woff", "input/tex/extensions/*.js"):
        for file in mathjax.glob(pattern):
            copies[file] = target / "mathjax" / file.relative_to(mathjax)
    for source, copy in copies.items():
        new = source.stat()
        if copy.exists() and (copy.stat().st_size, copy.stat().st_mtime) == (new.st_size, new.st_mtime):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy)


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"the book needs the package {name}: install requirements.txt")
    return Path(spec.submodule_search_locations[0])


def chapters_of(env: BuildEnvironment) -> dict[str, str]:
    """Page → what stands before the numbers of its figures: its chapter, or its letter."""
    chapters = {}
    for part in env.external_site_map.root.subtrees:
        chapter = re.match(r"Chapter (\d)", part.caption or "")
        for page in part.items:
            if found := chapter or re.match(r"book/appendix_(\w)_", page):
                chapters[page] = found[1].upper()
    return chapters


def number_through(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Give figures Sphinx's own numbers again, which it compares with those of the last build."""
    env.toc_fignumbers = getattr(env, "sogrid_fignumbers", env.toc_fignumbers)
    return []


def number_by_chapter(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Of figures that are numbered through, number those of each chapter."""
    through = env.sogrid_fignumbers = env.toc_fignumbers
    figures = sorted(
        (number, page, name)
        for page, kinds in through.items()
        for name, number in kinds.get("figure", {}).items()
    )
    env.toc_fignumbers = {page: {**kinds, "figure": {}} for page, kinds in through.items()}
    chapters, counts = chapters_of(env), Counter()
    for _, page, name in figures:
        chapter = chapters.get(page, "")
        counts[chapter] += 1
        label = f"{chapter}-{counts[chapter]}" if chapter else f"{counts[chapter]}"
        env.toc_fignumbers[page]["figure"][name] = (label,)
    return []


def remove_thebe(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Take sphinx-thebe's scripts off the page."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in str(getattr(script, "filename", script) or "")
        and "thebe" not in str((getattr(script, "attributes", None) or {}).get("body", ""))
    ]


def tidy_body(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Put right what screen readers hear."""
    body = context.get("body", "")
    for old, new in SPOKEN.items():
        body = body.replace(old, new)
    context["body"] = body


def setup(app: Sphinx) -> dict:
    os.environ["SOGRID_BOOK"] = "1"
    # Set by a script, so that a reader without scripts sees the page; sogrid-book.js takes it away.
    app.add_js_file(None, body='document.documentElement.classList.add("sogrid-typesetting")')
    # After the configuration's own, sogrid-book.js (800), which they use.
    app.add_js_file("js/sogrid-formulas.js", priority=850, loading_method="defer")
    app.add_js_file("js/sogrid-explorers.js", priority=900, loading_method="defer")
    app.connect("config-inited", set_cache)
    app.connect("config-inited", set_home)
    app.connect("builder-inited", copy_vendor)
    app.connect("env-before-read-docs", execute_pages)
    app.connect("env-get-updated", number_through, priority=100)
    app.connect("env-get-updated", number_by_chapter, priority=900)  # after Sphinx, which takes 500
    app.connect("html-page-context", remove_thebe, priority=900)
    app.connect("html-page-context", tidy_body)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
