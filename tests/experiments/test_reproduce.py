"""Experiments as data: profiles, continuing, refusals."""

import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from searched import VALUES, leave_searches

from sogrid.experiments import reproduce as module
from sogrid.experiments.benchmarks import BENCHMARKS, METHODS
from sogrid.experiments.checkpoints import FOLDER, Checkpoint, Interrupted
from sogrid.experiments.data import DataError
from sogrid.experiments.parameters import ParameterError, checked
from sogrid.experiments.records import Record, RecordError
from sogrid.experiments.reference import thesis_values
from sogrid.experiments.reproduce import (
    AE,
    CIFAR,
    EXPERIMENTS,
    PROFILES,
    Curves,
    Profile,
    Searches,
    Sweep,
    reproduce,
    search_path,
    tune,
    tuned_methods,
)
from sogrid.experiments.tuning import SAMPLERS, SearchError, chosen
from sogrid.optimizers import ACP

FIG = "fig6_2_mnist_autoencoder"
FEW = ("standard_sgd", "acp_fixedalpha")
CURVES = [name for name, plan in EXPERIMENTS.items() if isinstance(plan, Curves)]
SWEEP = "learning_rates"
SEARCHES = [name for name, plan in EXPERIMENTS.items() if isinstance(plan, Searches)]


@pytest.fixture
def small(monkeypatch):
    """The smoke profile with two updates, on 200 digits, of the small autoencoder."""
    updates, network = {AE: 2, CIFAR: 2}, BENCHMARKS["mnist_small_autoencoder"].network
    monkeypatch.setitem(BENCHMARKS, AE, replace(BENCHMARKS[AE], network=network))
    profile = Profile(updates, 2, updates, (2, 1), (2, 4, 1), (3, 2), full=False, evaluate_on=50)
    monkeypatch.setitem(module.PROFILES, "smoke", profile)
    monkeypatch.setattr(module, "SMOKE_EXAMPLES", 200)


@pytest.fixture
def tiny(small, monkeypatch, tmp_path):
    """The same for a figure of two methods, whose hyperparameters have been searched."""
    monkeypatch.setitem(module.EXPERIMENTS, FIG, Curves("fig6_2", AE, FEW))
    for folder in ("", "straight", "other"):
        leave_searches(tmp_path / folder, AE)


def test_a_record_is_left_and_continued(tiny, tmp_path, monkeypatch):
    content = reproduce(FIG, out=tmp_path)
    path = tmp_path / f"{FIG}.smoke.json"
    assert Record.read(path) == content
    assert [run["method"] for run in content["runs"]] == list(FEW)
    assert content["runs"][1]["settings"] == {"lr": 0.01, "damping": 0.5, "scale": 4.0}
    assert content["settings"]["hyperparameters"].startswith("by biased random search (2 trials of 4 updates")
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
    with pytest.raises(DataError, match="SOGRID_DATA"):
        tune(AE, profile="laptop", out=tmp_path)
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


def test_some_methods_first_and_the_others_later(tiny, tmp_path):
    """As two processes do who share the work; the record is the same but for the order of its runs."""
    reproduce(FIG, out=tmp_path, methods=FEW[1:])
    content = reproduce(FIG, out=tmp_path)
    assert [run["method"] for run in content["runs"]] == [*FEW[1:], FEW[0]]
    other = reproduce(FIG, out=tmp_path / "other")
    assert other["settings"] == content["settings"]
    assert {run["method"]: run["train"] for run in other["runs"]} == {
        run["method"]: run["train"] for run in content["runs"]
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"experiment": "fig9"},
        {"experiment": FIG, "profile": "huge"},
        {"experiment": FIG, "methods": ["standard_sgd", "adam"]},
        {"experiment": "fig4_1_three_searches", "methods": ["standard_sgd"]},
    ],
)
def test_unknown_names_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="must be one of"):
        reproduce(**wrong, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"benchmark": "mnist"},
        {"benchmark": AE, "profile": "huge"},
        {"benchmark": AE, "methods": ["jaco_update_hessian"]},
    ],
)
def test_unknown_names_are_refused_by_a_search(wrong, tmp_path):
    with pytest.raises(ValueError, match="must be one of"):
        tune(**wrong, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CURVES)
def test_a_figure_has_the_methods_of_the_thesis_figure(name):
    """And, of ours, only variants of one that is there."""
    plan = EXPERIMENTS[name]
    theirs = set(thesis_values(plan.figure)["methods"])
    ours = set(plan.methods) - theirs
    assert theirs <= set(plan.methods)
    assert {METHODS[method].tuned_as for method in ours} <= theirs
    assert len(set(plan.methods)) == len(plan.methods)


def test_every_figure_of_the_thesis_that_has_experiments_is_there():
    figures = ["fig2_2", "fig4_1", "fig5_1", "fig6_1", "fig6_2", "fig6_3"]
    theirs = {name: plan.figure for name, plan in EXPERIMENTS.items() if not isinstance(plan, Sweep)}
    assert list(theirs.values()) == figures
    assert all(name.startswith(figure) for name, figure in theirs.items())


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_says_how_far_every_experiment_goes(profile):
    scale = PROFILES[profile]
    for plan in EXPERIMENTS.values():
        if isinstance(plan, Curves):
            assert scale.updates[plan.benchmark] > 0
            assert scale.trial_updates[plan.benchmark] <= scale.updates[plan.benchmark]
        elif isinstance(plan, Sweep):
            rates, updates = scale.sweep
            assert rates > 1
            assert updates > 0
        else:
            searches, trials, updates = plan.plan(scale)
            assert min(searches, trials, updates) > 0
            assert set(plan.samplers) <= set(SAMPLERS)
            grid = round(trials ** (1 / len(plan.domain)))
            assert grid ** len(plan.domain) == trials or "grid" not in plan.samplers


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_evaluated_where_the_thesis_reads_are(name):
    plan = EXPERIMENTS[name]
    for axis in (
        curve["x"] for key, curve in thesis_values(plan.figure)["curves"].items() if key.endswith("by_update")
    ):
        wanted = {max(int(x) - (int(x) % 10 == 1), 0) for x in axis}
        assert wanted <= set(module._points(plan.benchmark, int(max(axis))))


# Hyperparameters


def test_without_a_search_one_is_told_which_command_makes_it(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RESULTS", tmp_path / "book")
    with pytest.raises(SearchError, match=f"python -m sogrid search {AE} --profile smoke --out {tmp_path}$"):
        reproduce(FIG, out=tmp_path)
    leave_searches(tmp_path, AE, methods=["standard_sgd"])
    command = f"search {AE} --profile smoke --out {tmp_path} --methods acp_fixedalpha first"
    with pytest.raises(SearchError, match=f"acp_fixedalpha on {AE}.*{command}"):
        reproduce(FIG, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [search_path("", AE, "smoke").name], "nothing was begun"
    reproduce(FIG, out=tmp_path, methods=["standard_sgd"])


def test_ones_own_search_of_the_profile_comes_first_then_that_at_laptop_scale_then_the_books(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "RESULTS", tmp_path / "book")
    for k, place in enumerate([("", "smoke"), ("", "laptop"), ("book", "laptop")], start=1):
        (search_path(tmp_path / place[0], AE, place[1])).unlink(missing_ok=True)
        leave_searches(tmp_path / place[0], AE, profile=place[1], lr=k * 0.001)
    options = dict(out=tmp_path, methods=FEW[:1])
    for k, place in enumerate([("", "smoke"), ("", "laptop"), ("book", "laptop")], start=1):
        (run,) = reproduce(FIG, **options)["runs"]
        assert run["settings"]["lr"] == k * 0.001
        (tmp_path / f"{FIG}.smoke.json").unlink()
        search_path(tmp_path / place[0], AE, place[1]).unlink()


def test_a_figure_with_a_method_that_only_the_shorter_searches_have_is_tuned_by_them(
    tiny, tmp_path, monkeypatch
):
    """All of it, whichever of its methods are asked for."""
    book = tmp_path / "book"
    monkeypatch.setattr(module, "RESULTS", book)
    leave_searches(book, AE, profile="short", lr=0.002)
    for there, asked, lr in ((FEW[:1], FEW[:1], 0.002), (FEW[:1], FEW, 0.002), (FEW, FEW[:1], 0.001)):
        search_path(book, AE, "laptop").unlink(missing_ok=True)
        leave_searches(book, AE, methods=there, profile="laptop", lr=0.001)
        runs = reproduce(FIG, out=tmp_path / f"{len(there)}{len(asked)}", methods=asked)["runs"]
        assert {run["settings"]["lr"] for run in runs} == {lr}


@pytest.mark.parametrize(
    ("name", "methods", "changed"),
    [(FIG, ["standard_sgd"], "lr"), (FIG, ["acp_fixedalpha"], "damping"), (SWEEP, ["kfac"], "damping")],
)
def test_a_record_has_one_choice_for_each_method(tiny, tmp_path, name, methods, changed):
    before = reproduce(name, out=tmp_path, methods=methods)
    search_path(tmp_path, AE, "smoke").unlink()
    leave_searches(tmp_path, AE, **{changed: 0.02})
    options = dict(out=tmp_path, seed=1)
    with pytest.raises(RecordError, match=f"runs of {methods[0]} with .*{VALUES[changed]}.*0.02.*folder"):
        reproduce(name, **options)
    path = module.record_path(tmp_path, name, "smoke")
    assert module.Record.read(path) == before, "nothing was begun"
    if name == SWEEP:
        search_path(tmp_path, AE, "smoke").unlink()
        leave_searches(tmp_path, AE, lr=0.02)  # the sweep's own
        assert len(reproduce(name, **options, methods=methods)["runs"]) == 2 * len(before["runs"])


def test_a_variant_takes_over_the_hyperparameters_of_its_method(small, tmp_path, monkeypatch):
    leave_searches(tmp_path, AE)
    methods = ("jaco_update", "jaco_update_without")
    profile = Profile({AE: 10}, 2, {AE: 2}, (2, 1), (2, 4, 1), full=False, evaluate_on=50)
    monkeypatch.setitem(module.PROFILES, "smoke", profile)
    runs = reproduce("fig5_1_updated_backpropagation", out=tmp_path, methods=methods)["runs"]
    assert [run["method"] for run in runs] == list(methods)
    assert runs[0]["settings"] == runs[1]["settings"]
    assert runs[0]["train"][0] == runs[1]["train"][0]
    last = runs[0]["update"].index(10 // module.VARIANTS)
    assert runs[0]["train"][last] != runs[1]["train"][last]
    assert (runs[0]["update"][-1], runs[1]["update"]) == (10, runs[0]["update"][: last + 1]), "a fifth"


def test_a_bounded_method_has_a_learning_rate_of_its_own_and_what_was_found_for_it(
    small, tmp_path, monkeypatch
):
    """Or, where it has not been searched, for the method without the bound; and so has its variant."""
    methods = ["acp_bounded", "acp_bounded_low_rank"]
    monkeypatch.setitem(module.COMPARISONS, "bounded", Curves("fig6_2", AE, tuple(methods)))
    leave_searches(tmp_path, AE)
    found = Record.read(search_path(tmp_path, AE, "smoke"))["runs"]
    best = next(chosen(search) for search in found if search["method"] == "acp_fixedalpha")
    assert METHODS["acp_bounded"].lr not in (None, best["lr"])
    for run in reproduce("bounded", out=tmp_path, methods=methods)["runs"]:
        assert run["settings"] == {**best, "lr": METHODS["acp_bounded"].lr}
    own = {"damping": 0.1, "max_change": 0.05, "scale": 3.0, "lr": METHODS["acp_bounded"].lr}
    leave_searches(tmp_path / "own", AE, methods=["acp_fixedalpha", "acp_bounded"], **own)
    bounded, low_rank = reproduce("bounded", out=tmp_path / "own", methods=methods)["runs"]
    assert bounded["settings"] == low_rank["settings"] == own
    assert (bounded["update"][-1], low_rank["update"][-1]) == (2, 0), "a variant is trained for a fifth"


def test_what_a_search_finds_is_all_that_a_method_needs(small):
    task = module._task(AE, "smoke", "cpu")
    for method in tuned_methods()[AE]:
        found = {key: (VALUES | {"max_change": 0.1})[key] for key in METHODS[method].searched}
        _, optimizer = METHODS[method].build(task, found, torch.Generator().manual_seed(0))
        assert found.get("lr") or optimizer.defaults["lr"] == METHODS[method].lr


def test_the_bound_that_was_found_is_the_bound(small):
    """And the row's own where none was."""
    task, settings = module._task(AE, "smoke", "cpu"), {"lr": 10.0, "damping": 0.1, "scale": 4.0}
    for name in (name for name in METHODS if "bounded" in name):
        own = {key: settings[key] for key in (*METHODS[name].settings, "scale")}
        for given, expected in (({}, 0.1), ({"max_change": 0.03}, 0.03)):
            _, optimizer = METHODS[name].build(task, own | given, torch.Generator().manual_seed(0))
            assert optimizer.defaults["max_change"] == expected
    with pytest.raises(ValueError, match="takes the settings"):
        METHODS["kfac"].build(task, settings | {"max_change": 0.1}, torch.Generator())


def test_a_search_finds_hyperparameters_that_the_figure_then_uses(small, tmp_path):
    found = tune(AE, out=tmp_path, methods=FEW, storage="", progress=False)  # as of an empty variable
    assert search_path(tmp_path, AE, "smoke").with_suffix(".sqlite3").exists()
    assert Record.read(search_path(tmp_path, AE, "smoke")) == found
    assert {run["method"] for run in found["runs"]} == set(FEW)
    assert all(len(run["trials"]["loss"]) == 2 for run in found["runs"])
    runs = reproduce(FIG, out=tmp_path, methods=FEW, progress=False)["runs"]
    best = {run["method"]: chosen(run) for run in found["runs"]}
    assert {run["method"]: run["settings"] for run in runs} == best


def test_a_search_begins_with_what_an_earlier_one_has_chosen(small, tmp_path):
    """For each method that it has, or that is a variant of one it has."""
    earlier = leave_searches(tmp_path / "earlier", AE, methods=["standard_sgd", "jaco_update"])
    methods = ["standard_sgd", "bn", "jaco_update_bounded"]
    runs = tune(AE, out=tmp_path, methods=methods, begin_with=earlier, progress=False)["runs"]
    found = {run["method"]: run for run in runs}
    begun = {m: {k: column[0] for k, column in run["trials"].items()} for m, run in found.items()}
    for method, names in (("standard_sgd", ["lr", "scale"]), ("jaco_update_bounded", ["scale"])):
        assert found[method]["first"] == {name: VALUES[name] for name in names}
        assert found[method]["first"].items() <= begun[method].items()
    assert "first" not in found["bn"]
    assert begun["bn"]["lr"] != VALUES["lr"]
    other = leave_searches(tmp_path / "other", CIFAR, methods=["standard_sgd"])
    with pytest.raises(SearchError, match="is no record of a search on mnist_autoencoder"):
        tune(AE, out=tmp_path, methods=["standard_sgd"], begin_with=other, progress=False)
    far = leave_searches(tmp_path / "far", AE, methods=["mean_only_bn"], lr=100.0)
    with pytest.raises(SearchError, match=r"mean_only_bn cannot begin with lr = 100.* domain \(0.003 to 3\)"):
        tune(AE, out=tmp_path, methods=["mean_only_bn"], begin_with=far, progress=False)


@pytest.mark.parametrize("benchmark", tuned_methods())
def test_every_method_is_searched_alike(benchmark, monkeypatch, tmp_path):
    """Same trials, updates, criterion, sampler and seed; the same ends for each hyperparameter it has."""
    plans = []

    def note(task, plan, **options):
        plans.append(plan)
        trials = {key: [1.0] for key in (*plan.domain, "loss", "second", "seed")}
        return {"method": plan.method, "sampler": plan.sampler, "seed": plan.seed, "trials": trials}

    monkeypatch.setattr(module, "search", note)
    monkeypatch.setattr(module, "open_storage", lambda url: None)
    task = BENCHMARKS[benchmark].task(module.as_cifar10(module.data.load("mnist", source="embedded")))
    monkeypatch.setattr(module, "_task", lambda *_: task)
    for profile in PROFILES:
        plans.clear()
        tune(benchmark, profile=profile, out=tmp_path, progress=False)
        scale = PROFILES[profile]
        assert sorted(plan.method for plan in plans) == sorted(tuned_methods()[benchmark])
        for plan in plans:
            assert (plan.trials, plan.updates) == (scale.trials, scale.trial_updates[benchmark])
            assert (plan.evaluate_on, plan.sampler, plan.seed) == (scale.evaluate_on, "biased", 0)
            assert (plan.halvings, plan.finalists) == (scale.halvings, scale.finalists)
            assert not plan.halvings or plan.rungs[0] > 0
            bounded = "bounded" in plan.method  # any large learning rate will do, but which bound?
            damped = {"damping"} & {*METHODS[plan.method].settings}
            assert set(plan.domain) == {"max_change" if bounded else "lr", *damped, "scale"}
            assert all(plan.domain[key] == BENCHMARKS[benchmark].domain[key] for key in plan.domain)


def test_every_curve_has_been_searched_or_is_a_variant_of_one_that_has():
    for name in (*CURVES, SWEEP):
        plan = EXPERIMENTS[name]
        known = tuned_methods()[plan.benchmark]
        assert all({method, METHODS[method].tuned_as} & {*known} for method in plan.methods)


# Runs that two figures have in common


def test_a_run_that_another_figure_has_is_taken_over(tiny, tmp_path, monkeypatch):
    first = reproduce(FIG, out=tmp_path)
    (sgd,) = [run for run in first["runs"] if run["method"] == "standard_sgd"]
    content = reproduce("fig6_1_centering", out=tmp_path, methods=FEW)
    assert sgd in content["runs"]
    assert content["runs"][1:] == first["runs"][1:]
    other = reproduce("fig6_1_centering", out=tmp_path, methods=FEW[:1], seed=1)
    assert other["runs"][-1]["train"] != sgd["train"]


def test_a_run_of_another_scale_or_of_other_hyperparameters_is_not_taken_over(tiny, tmp_path, monkeypatch):
    first = reproduce(FIG, out=tmp_path, methods=FEW[:1])["runs"]
    search_path(tmp_path, AE, "smoke").unlink()
    leave_searches(tmp_path, AE, lr=0.02)
    content = reproduce("fig6_1_centering", out=tmp_path, methods=FEW[:1])
    assert content["runs"][0]["settings"]["lr"] == 0.02
    longer = Profile({AE: 3}, 2, {AE: 2}, (2, 1), (2, 4, 1), full=False, evaluate_on=50)
    monkeypatch.setitem(module.PROFILES, "smoke", longer)
    (tmp_path / "fig6_1_centering.smoke.json").unlink()
    (run,) = reproduce("fig6_1_centering", out=tmp_path, methods=FEW[:1])["runs"]
    assert run["update"][-1] == 3
    assert first[0]["update"][-1] == 2


def test_another_figures_damaged_record_is_no_hindrance(tiny, tmp_path):
    (tmp_path / "fig6_9.smoke.json").write_text("{")
    assert len(reproduce(FIG, out=tmp_path)["runs"]) == 2


# A sweep of learning rates


def test_a_sweep_runs_every_method_at_every_rate_with_what_else_was_chosen_for_it(tiny, tmp_path):
    methods = ["kfac", "kfac_bounded"]
    content = reproduce(SWEEP, out=tmp_path, methods=methods, seed=1)
    plan, (count, updates) = EXPERIMENTS[SWEEP], module.PROFILES["smoke"].sweep
    rates = np.geomspace(*plan.rates, count)
    found = [(run["method"], run["settings"]["lr"]) for run in content["runs"]]
    assert [method for method, _ in found] == [m for m in methods for _ in rates]
    assert [lr for _, lr in found] == pytest.approx([*rates, *rates])
    for run in content["runs"]:
        assert (run["seed"], run["update"][-1]) == (1, updates)
        assert {**run["settings"], "lr": VALUES["lr"]} == VALUES
    assert content["settings"]["updates"] == updates
    assert reproduce(SWEEP, out=tmp_path, methods=methods, seed=1)["runs"] == content["runs"]


# Figures that are searches


@pytest.mark.parametrize("name", SEARCHES)
def test_a_figure_of_searches(small, name, tmp_path):
    content = reproduce(name, out=tmp_path, progress=False)
    plan = EXPERIMENTS[name]
    searches, trials, updates = plan.plan(module.PROFILES["smoke"])
    keys = [(run["sampler"], run["seed"]) for run in content["runs"]]
    assert keys == [(sampler, seed) for seed in range(searches) for sampler in plan.samplers]
    for run in content["runs"]:
        assert run["method"] == "standard_sgd"
        assert run["updates"] == updates
        assert run["domain"] == {key: list(ends) for key, ends in plan.domain.items()}
        assert all(len(column) == trials for column in run["trials"].values())
    assert reproduce(name, out=tmp_path, progress=False)["runs"] == content["runs"]
    assert not (tmp_path / FOLDER).exists()


def test_searches_of_a_figure_go_on_from_another_seed_and_for_one_sampler(small, tmp_path):
    name = "fig4_1_three_searches"
    content = reproduce(name, out=tmp_path, methods=["random"], seed=7, progress=False)
    assert [(run["sampler"], run["seed"]) for run in content["runs"]] == [("random", 7), ("random", 8)]
    one, two = (run["trials"] for run in content["runs"])
    assert one["lr"] != two["lr"]
    assert (one["seed"][0], two["seed"][0]) == (8000, 9000)


# Data


def test_the_stand_in_for_cifar10_has_its_format_and_says_what_it_is():
    task = module._task(CIFAR, "smoke", "cpu")
    x, y = task.train
    assert x.shape == (module.SMOKE_EXAMPLES, 3072)
    assert y.dtype == torch.int64
    assert task.classifies
    assert re.search(r"MNIST, embedded subset.*in the format of CIFAR-10", task.data.variant)
    red, green, blue = x.unflatten(1, (3, 32, 32)).unbind(1)
    assert torch.equal(red, green)
    assert torch.equal(red, blue)
    digit = module._task(AE, "smoke", "cpu").train[0]
    assert torch.equal(red[:, 2:-2, 2:-2].flatten(1), digit)
    assert red.sum() == pytest.approx(digit.sum().item())


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
