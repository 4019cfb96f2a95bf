"""A page as JupyterLab runs it: the explorers are widgets, and a saved notebook keeps their state.

That every slider of every explorer moves the picture is in tests/lab/test_explorers.py.
"""

import nbformat
import pytest
from book.test_pages import BOOK
from nbclient import NotebookClient

PAGE = BOOK / "ch4_experimental_setup/biased_random_search.ipynb"
STATE, VIEW = (f"application/vnd.jupyter.widget-{name}+json" for name in ("state", "view"))


@pytest.mark.slow
def test_a_page_runs_and_keeps_the_state_of_its_widgets(monkeypatch, quick_kernels):
    monkeypatch.delenv("SOGRID_BOOK", raising=False)
    page = nbformat.read(PAGE, as_version=4)
    resources = {"metadata": {"path": str(PAGE.parent)}}
    NotebookClient(page, timeout=300, resources=resources, store_widget_state=True).execute()
    outputs = [o for cell in page.cells if cell.cell_type == "code" for o in cell.outputs if "data" in o]
    models = page.metadata.widgets[STATE]["state"]
    (view,) = (models[o["data"][VIEW]["model_id"]] for o in outputs if VIEW in o["data"])
    assert view["state"]["children"]
    labels = {m["state"].get("description") for m in models.values() if "Slider" in m["model_name"]}
    assert "trial" in labels
