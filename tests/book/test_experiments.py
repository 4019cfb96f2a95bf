"""Each papermill template runs at smoke scale, leaves a record, and refuses wrong parameters."""

from collections import Counter
from importlib import import_module
from pathlib import Path

import papermill
import pytest
from click.testing import CliRunner
from papermill.cli import papermill as command_line
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from searched import leave_searches

from lab import cli
from sogrid.experiments import reproduce
from sogrid.experiments.benchmarks import METHODS
from sogrid.experiments.parameters import ParameterError
from sogrid.experiments.records import Record
from sogrid.experiments.reproduce import EXPERIMENTS, PROFILES, VARIANTS, Curves, Searches

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "book" / "experiments").glob("*.ipynb"))
STUDIES = {
    study.name: study for study in (getattr(import_module(m), name) for m, name in cli.STUDIES.values())
}
BEYOND = [t for t in TEMPLATES if t.stem in {"contest", *STUDIES}]
THESIS = [t for t in TEMPLATES if t not in BEYOND]
EVERY = pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.stem)
FIGURES = pytest.mark.parametrize("template", THESIS, ids=lambda t: t.stem)


def test_every_experiment_has_its_template():
    assert [t.stem for t in THESIS] == sorted(EXPERIMENTS)
    assert [t.stem for t in BEYOND] == sorted({"contest", *STUDIES})


@pytest.fixture
def papermilled(tmp_path, monkeypatch, quick_kernels):
    """``papermilled(template)``: its folder, after it ran as the command line does it; no SOGRID_DATA."""
    monkeypatch.delenv("SOGRID_DATA", raising=False)
    monkeypatch.chdir(ROOT)

    def papermilled_(template):
        arguments = [template, tmp_path / "out.ipynb", "-p", "profile", "smoke", "-p", "out", tmp_path]
        done = CliRunner().invoke(command_line, [*map(str, arguments), "--no-progress-bar"])
        assert done.exit_code == 0, done.exception
        return tmp_path

    return papermilled_


@pytest.mark.slow
@FIGURES
def test_template_runs_and_leaves_a_record(template, tmp_path, papermilled):
    """With hyperparameters of one's own."""
    plan = EXPERIMENTS[template.stem]
    if not isinstance(plan, Searches):
        leave_searches(tmp_path, plan.benchmark)
    content = Record.read(papermilled(template) / f"{template.stem}.smoke.json")
    if isinstance(plan, Curves):
        assert [run["method"] for run in content["runs"]] == list(plan.methods)
        for run in content["runs"]:
            assert run["status"] == "finished"
            updates = content["settings"]["updates"]
            variant = not METHODS[run["method"]].searched
            assert run["update"][-1] == (updates // VARIANTS if variant else updates)
    elif not isinstance(plan, Searches):
        rates, updates = PROFILES["smoke"].sweep
        assert [run["method"] for run in content["runs"]] == [m for m in plan.methods for _ in range(rates)]
        last = [run["update"][-1] for run in content["runs"] if run["status"] == "finished"]
        assert set(last) == {updates}
    else:
        searches, trials, updates = plan.plan(PROFILES["smoke"])
        assert len(content["runs"]) == searches * len(plan.samplers)
        for run in content["runs"]:
            assert run["updates"] == updates
            assert len(run["trials"]["loss"]) == trials


@pytest.mark.slow
@pytest.mark.parametrize("template", BEYOND, ids=lambda t: t.stem)
def test_template_of_a_study_runs_and_leaves_a_record(template, papermilled):
    content = Record.read(papermilled(template) / f"{template.stem}.smoke.json")
    if template.stem == "contest":
        assert Counter(run["part"] for run in content["runs"]) == {"search": 4, "run": 8, "longer": 4}
    else:
        study = STUDIES[template.stem]
        assert [
            {name: run[name] for name in key} for run, key in zip(content["runs"], study.keys, strict=True)
        ] == list(study.keys)
        assert all(len(run["runs"]) == 2 for run in content["runs"] if "runs" in run)


@EVERY
def test_template_documents_its_parameters(template):
    found = papermill.inspect_notebook(str(template))
    assert {"profile", "out"} <= set(found)
    assert template in BEYOND or {"seed", "device"} <= set(found)
    assert all(p["inferred_type_name"] in ("str", "int", "float") for p in found.values())
    assert all(p["help"] for p in found.values())


@pytest.fixture
def begin(monkeypatch):
    """``begin(template, parameters)``: what it asks of ``reproduce``, without a kernel."""
    asked = []
    monkeypatch.setattr(reproduce, "reproduce", lambda *names, **options: asked.append((names, options)))

    def begin_(template, parameters):
        notebook = parameterize_notebook(load_notebook_node(str(template)), parameters)
        documented, given, call = [c.source for c in notebook.cells if c.cell_type == "code"][:3]
        namespace = {}
        for source in (documented, given, call):
            exec(source, namespace)
        return asked

    return begin_


@FIGURES
def test_template_hands_its_parameters_on(template, begin):
    given = {"profile": "laptop", "seed": 3, "device": "cuda", "out": "there"}
    assert begin(template, given) == [((template.stem,), given)]


@FIGURES
@pytest.mark.parametrize(("name", "value"), [("profil", "smoke"), ("seed", "three")])
def test_template_refuses_a_wrong_parameter_by_name(template, name, value, begin):
    with pytest.raises(ParameterError, match=f"'{name}'"):
        begin(template, {name: value})


@pytest.mark.slow
def test_a_refusal_ends_papermill_and_leaves_nothing(tmp_path, quick_kernels):
    with pytest.raises(papermill.PapermillExecutionError, match="'profil'"):
        papermill.execute_notebook(
            str(TEMPLATES[0]),
            str(tmp_path / "out.ipynb"),
            {"profil": "smoke", "out": str(tmp_path)},
            progress_bar=False,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]
