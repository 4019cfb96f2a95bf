"""Experiments as data: profiles, continuing, refusals."""

import signal

import pytest

from sogrid.experiments import reproduce as module
from sogrid.experiments.benchmarks import METHODS
from sogrid.experiments.checkpoints import FOLDER, Checkpoint, Interrupted
from sogrid.experiments.data import DataError
from sogrid.experiments.parameters import ParameterError, checked
from sogrid.experiments.records import Record
from sogrid.experiments.reference import thesis_values
from sogrid.experiments.reproduce import EXPERIMENTS, Profile, reproduce
from sogrid.optimizers import ACP

FIG = "fig6_2_mnist_autoencoder"


@pytest.fixture
def tiny(monkeypatch):
    """The smoke profile with two updates and two methods."""
    monkeypatch.setitem(module.PROFILES, "smoke", Profile(2, full=False, evaluate_on=50))
    monkeypatch.setattr(module, "SMOKE_EXAMPLES", 200)
    plan = EXPERIMENTS[FIG]
    few = {key: plan.settings[key] for key in ("standard_sgd", "acp_fixedalpha")}
    monkeypatch.setitem(
        module.EXPERIMENTS, FIG, module.Experiment(plan.figure, plan.dataset, plan.task, few, plan.chosen)
    )


def test_a_record_is_left_and_continued(tiny, tmp_path, monkeypatch):
    content = reproduce(FIG, out=tmp_path)
    path = tmp_path / f"{FIG}.smoke.json"
    assert Record.read(path) == content
    assert [run["method"] for run in content["runs"]] == ["standard_sgd", "acp_fixedalpha"]
    assert content["settings"]["data"]["variant"] == "MNIST, embedded subset, first 200"
    monkeypatch.setattr(module, "run", None)  # nothing is run again
    assert reproduce(FIG, out=tmp_path)["runs"] == content["runs"]


def test_another_seed_is_added_to_the_same_record(tiny, tmp_path):
    reproduce(FIG, out=tmp_path)
    content = reproduce(FIG, out=tmp_path, seed=1)
    assert [run["seed"] for run in content["runs"]] == [0, 0, 1, 1]


def test_a_full_profile_refuses_the_embedded_digits(tmp_path, monkeypatch):
    monkeypatch.delenv("SOGRID_DATA", raising=False)
    load = module.data.load
    monkeypatch.setattr(module.data, "load", lambda name, **o: load(name, **{**o, "source": "embedded"}))
    with pytest.raises(DataError, match="SOGRID_DATA"):
        reproduce(FIG, profile="laptop", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stopped_figure_goes_on_with_the_method_under_way(tiny, tmp_path, monkeypatch):
    straight = reproduce(FIG, out=tmp_path / "straight")["runs"]
    step, count = ACP.step, [0]

    def stop(self, closure=None):
        count[0] += 1
        if count[0] == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, closure)

    monkeypatch.setattr(ACP, "step", stop)
    with pytest.raises(Interrupted, match="stopped by SIGINT after update 1 of 2"):
        reproduce(FIG, out=tmp_path)
    kept = tmp_path / FOLDER / f"{FIG}.smoke.acp_fixedalpha.seed0.pt"
    assert kept.exists()
    reproduce(FIG, out=tmp_path, seed=1)  # another run's state is left alone
    assert kept.exists()
    runs = reproduce(FIG, out=tmp_path)["runs"]
    assert runs[-1]["train"] == straight[-1]["train"]
    assert runs[-1]["resumed"][0]["update"] == 1
    assert not kept.parent.exists()


def test_a_run_that_another_process_has_finished_meanwhile_is_not_run_again(tiny, tmp_path, monkeypatch):
    other = reproduce(FIG, out=tmp_path / "other")
    enter = Checkpoint.__enter__

    def late(self):
        path = tmp_path / f"{FIG}.smoke.json"
        if not path.exists():
            path.write_bytes((tmp_path / "other" / path.name).read_bytes())
        return enter(self)

    monkeypatch.setattr(Checkpoint, "__enter__", late)
    assert reproduce(FIG, out=tmp_path)["runs"] == other["runs"]


def test_bars_may_be_left_out(tiny, tmp_path, capsys):
    reproduce(FIG, out=tmp_path, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("wrong", [{"experiment": "fig9"}, {"experiment": FIG, "profile": "huge"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match="must be one of"):
        reproduce(**wrong)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_method_of_the_thesis_figure_has_settings_it_takes(name):
    plan = EXPERIMENTS[name]
    assert set(plan.settings) == set(thesis_values(plan.figure)["methods"])
    for method, settings in plan.settings.items():
        assert set(settings) == {*METHODS[method].settings, "scale"}


def test_parameters_are_checked_by_name_and_type():
    declared = {"__annotations__": {"profile": str, "lr": float}}
    assert checked({**declared, "profile": "smoke", "lr": 1, "_": 3, "In": []}) == {
        "profile": "smoke",
        "lr": 1.0,
    }
    with pytest.raises(ParameterError, match="unknown parameter 'profle'"):
        checked({**declared, "profile": "smoke", "lr": 0.1, "profle": "laptop"})
    with pytest.raises(ParameterError, match="'lr' must be float, got 'fast'"):
        checked({**declared, "profile": "smoke", "lr": "fast"})
    with pytest.raises(ParameterError, match="'profile' must be str, got True"):
        checked({**declared, "profile": True, "lr": 0.1})
