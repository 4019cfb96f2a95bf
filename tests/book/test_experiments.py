"""Each papermill template runs at smoke scale, leaves a record, and refuses wrong parameters."""

import os
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
from searched import leave_searches

from sogrid.experiments.benchmarks import METHODS
from sogrid.experiments.records import Record
from sogrid.experiments.reproduce import EXPERIMENTS, PROFILES, VARIANTS, Curves, Searches

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "book" / "experiments").glob("*.ipynb"))


def test_every_experiment_has_its_template():
    assert [t.stem for t in TEMPLATES] == sorted(EXPERIMENTS)


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.stem)
def test_template_runs_and_leaves_a_record(template, tmp_path):
    """As a user does it, from the command line; no SOGRID_DATA, no network, hyperparameters of one's own."""
    plan = EXPERIMENTS[template.stem]
    environment = {k: v for k, v in os.environ.items() if k != "SOGRID_DATA"} | {"OMP_NUM_THREADS": "1"}
    if not isinstance(plan, Searches):
        leave_searches(tmp_path, plan.benchmark)
    command = [sys.executable, "-m", "papermill", str(template), str(tmp_path / "out.ipynb")]
    command += ["-p", "profile", "smoke", "-p", "out", str(tmp_path), "--no-progress-bar"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    content = Record.read(tmp_path / f"{template.stem}.smoke.json")
    if isinstance(plan, Curves):
        assert [run["method"] for run in content["runs"]] == list(plan.methods)
        for run in content["runs"]:
            assert run["status"] == "finished"
            updates = content["settings"]["updates"]
            variant = METHODS[run["method"]].tuned_as is not None
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


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.stem)
def test_template_documents_its_parameters(template):
    found = papermill.inspect_notebook(str(template))
    assert {"profile", "seed", "device", "out"} <= set(found)
    assert all(p["inferred_type_name"] in ("str", "int", "float") for p in found.values())
    assert all(p["help"] for p in found.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("profil", "smoke"), ("seed", "three")])
def test_template_refuses_a_wrong_parameter_by_name(name, value, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=rf"'{name}'"):
        papermill.execute_notebook(
            str(TEMPLATES[0]),
            str(tmp_path / "out.ipynb"),
            {name: value, "out": str(tmp_path)},
            progress_bar=False,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]
