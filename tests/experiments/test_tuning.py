"""Searches of hyperparameters: what is proposed, what counts, and what an interruption leaves."""

import json
import math
import re
import shutil
import signal
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy
import torch
from children import Child
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from sogrid.experiments import tuning
from sogrid.experiments.benchmarks import Task
from sogrid.experiments.records import RESULTS, Record
from sogrid.experiments.search import BiasedRandomSampler, UnitCube
from sogrid.experiments.training import run
from sogrid.experiments.tuning import (
    SAMPLERS,
    Search,
    SearchError,
    best_so_far,
    chosen,
    open_storage,
    search,
    sqlite_url,
    updates_spent,
)
from sogrid.losses import Quadratic
from sogrid.networks import MLP

PLAN = Search("standard_sgd", {"lr": (1e-3, 10.0), "scale": (1.0, 1000.0)}, 4, 2, 50)


def small_task():
    x = torch.rand(200, 6, generator=torch.Generator().manual_seed(0))
    build = lambda **options: MLP([6, 5, 6], "sigmoid", "sigmoid", **options)  # noqa: E731
    return Task("tiny", None, (x, x), (x[:10], x[:10]), build, Quadratic())


@pytest.fixture(autouse=True)
def _quick():
    """SQLite does not wait for the disk; Optuna's verbosity is as before, also after threads."""

    def careless(connection, _):
        if type(connection).__module__.startswith("sqlite3"):
            connection.execute("PRAGMA synchronous = OFF")

    before = optuna.logging.get_verbosity()
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", careless)
    yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", careless)
    optuna.logging.set_verbosity(before)


@pytest.fixture
def task():
    return small_task()


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A file with Optuna's tables, and nothing in them."""
    path = tmp_path_factory.mktemp("tables") / "s.sqlite3"
    open_storage(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture
def storage(tables, tmp_path):
    """As the program uses it."""
    return open_storage(f"sqlite:///{shutil.copy(tables, tmp_path)}")


@pytest.fixture
def memory():
    """Where the disk is not the subject."""
    return InMemoryStorage()


@pytest.fixture
def landscape(monkeypatch):
    """Instead of training: a bowl that costs nothing."""

    def bowl(task, method, settings, *, seed, **options):
        loss = 1 + (math.log10(settings["lr"]) + 1) ** 2 + math.log10(settings["scale"]) ** 2
        return {"status": "finished", "second": [0.5], "train": [loss]}

    monkeypatch.setattr(tuning, "run", bowl)


def stopped_in(monkeypatch, number, act=lambda: signal.raise_signal(signal.SIGINT)):
    """Let ``act`` happen in the middle of the ``number``-th run from now."""
    inner, count = tuning.run, [0]

    def stopping(*args, **options):
        count[0] += 1
        if count[0] == number:
            act()
        return inner(*args, **options)

    monkeypatch.setattr(tuning, "run", stopping)


def proposals(found):
    return list(zip(*(found["trials"][key] for key in found["domain"]), strict=True))


def trials_of(storage, name="s"):
    return optuna.load_study(study_name=name, storage=storage).trials


# What is proposed


@pytest.mark.parametrize(("domain", "trials"), [(1, 5), (2, 9), (2, 1), (3, 8), (3, 1000)])
def test_a_grid_is_every_combination_of_log_spaced_values_with_both_ends(domain, trials):
    ends = {"lr": (1e-3, 10.0), "damping": (0.5, 3.0), "scale": (2.0, 128.0)}
    ends = dict(list(ends.items())[:domain])
    grid = SAMPLERS["grid"](replace(PLAN, domain=ends, trials=trials), 0)
    points = round(trials ** (1 / domain))
    assert len(set(grid._all_grids)) == trials
    for key, (low, high) in ends.items():
        values = sorted({point[grid._param_names.index(key)] for point in grid._all_grids})
        expected = np.geomspace(low, high, points) if points > 1 else [low]
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        assert low == values[0] <= values[-1] <= high


@pytest.mark.parametrize(("domain", "trials"), [(2, 10), (2, 2), (3, 9)])
def test_a_grid_of_a_count_that_is_no_power_is_refused(task, memory, domain, trials):
    ends = dict.fromkeys(["lr", "scale", "damping"][:domain], (1.0, 2.0))
    plan = replace(PLAN, domain=ends, trials=trials, sampler="grid")
    with pytest.raises(
        SearchError, match=f"a grid over {domain} hyperparameters cannot have {trials} trials"
    ):
        search(task, plan, storage=memory, name="s")


def test_a_grid_search_tries_each_point_once(landscape, task, memory):
    found = search(task, replace(PLAN, sampler="grid", trials=16), storage=memory, name="s")
    expected = {(lr, s) for lr in np.geomspace(1e-3, 10, 4) for s in np.geomspace(1, 1000, 4)}
    np.testing.assert_allclose(sorted(proposals(found)), sorted(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "optunas"), [("random", optuna.samplers.RandomSampler), ("biased", BiasedRandomSampler)]
)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_search_proposes_what_its_sampler_does_alone(landscape, task, memory, sampler, optunas, seed):
    plan = replace(PLAN, sampler=sampler, trials=12, seed=seed)
    found = search(task, plan, storage=memory, name="s")
    study = optuna.create_study(sampler=optunas(100_003 * seed))

    def objective(trial):
        settings = {key: trial.suggest_float(key, *ends, log=True) for key, ends in PLAN.domain.items()}
        return tuning.run(None, None, settings, seed=0)["train"][-1]

    study.optimize(objective, 12)
    expected = [tuple(trial.params[key] for key in PLAN.domain) for trial in study.trials]
    np.testing.assert_allclose(proposals(found), expected, rtol=1e-5)
    lows, highs = zip(*PLAN.domain.values(), strict=True)
    assert (np.array(lows) <= proposals(found)).all()
    assert (proposals(found) <= np.array(highs)).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seed", [42_949, 2**31 - 1])
def test_large_seeds(sampler, seed):
    """Each trial's sampler has one a hundred thousand times as large, which NumPy would refuse."""
    plan = replace(PLAN, sampler=sampler, seed=seed)
    study = optuna.create_study(sampler=SAMPLERS[sampler](plan, 100_003 * seed + 7))
    study.enqueue_trial({"x": 0.5})
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) if sampler != "grid" else 0.0, n_trials=2)
    assert len(study.trials) == 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_repeats_itself(landscape, task, storage, sampler):
    """Whatever the storage."""

    def once(storage, seed):
        return search(task, replace(PLAN, sampler=sampler, seed=seed, trials=9), storage=storage, name="s")

    one, two, other = once(InMemoryStorage(), 1), once(storage, 1), once(InMemoryStorage(), 2)
    assert one["trials"] == two["trials"]
    assert proposals(one) != proposals(other)


# What counts


def test_a_search_is_runs_of_the_training_loop(task, memory):
    """Each trial with a seed of its own, the criterion being the training loss at the end."""
    plan = replace(PLAN, domain={"lr": (0.01, 0.1), "scale": (1.0, 4.0)}, seed=2)
    found = search(task, plan, storage=memory, name="s")
    assert found["trials"]["seed"] == [3000, 3001, 3002, 3003]
    for lr, scale, loss, seed in zip(
        *(found["trials"][k] for k in ("lr", "scale", "loss", "seed")), strict=True
    ):
        settings, options = {"lr": lr, "scale": scale}, {"updates": 2, "points": [0, 1, 2], "evaluate_on": 50}
        by_hand = run(task, "standard_sgd", settings, seed=seed, progress=None, **options)
        assert loss == pytest.approx(by_hand["train"][-1], rel=1e-4)  # hyperparameters have six digits
    assert all(second > 0 for second in found["trials"]["second"])
    assert {key: found[key] for key in ("method", "sampler", "seed", "updates", "evaluate_on")} == {
        "method": "standard_sgd", "sampler": "biased", "seed": 2, "updates": 2, "evaluate_on": 50,
    }  # fmt: skip
    assert set(found["provenance"]) == {"date", "commit", "versions", "machine"}


def test_a_diverged_trial_is_infinite_in_the_study_none_in_the_record_and_never_chosen(
    landscape, task, memory, monkeypatch
):
    bowl = tuning.run

    def diverging(task, method, settings, **options):
        if settings["lr"] > 0.1:
            return {"status": "diverged", "second": [], "train": []}
        return bowl(task, method, settings, **options)

    monkeypatch.setattr(tuning, "run", diverging)
    found = search(task, replace(PLAN, trials=15, sampler="random"), storage=memory, name="s")
    losses = found["trials"]["loss"]
    assert [loss is None for loss in losses] == [lr > 0.1 for lr in found["trials"]["lr"]]
    assert 0 < losses.count(None) < 15
    assert [trial.value == math.inf for trial in trials_of(memory)] == [loss is None for loss in losses]
    assert all(
        (loss is None) == (s is None) for loss, s in zip(losses, found["trials"]["second"], strict=True)
    )
    best = min(loss for loss in losses if loss is not None)
    assert chosen(found)["lr"] == found["trials"]["lr"][losses.index(best)] <= 0.1


def test_a_real_divergence_is_one(task, memory):
    plan = replace(PLAN, domain={"lr": (1e30, 1e38), "scale": (1.0, 2.0)}, trials=3, updates=20)
    task = replace(task, network=lambda **options: MLP([6, 5, 6], "relu", **options))
    found = search(task, plan, storage=memory, name="s")
    assert found["trials"]["loss"] == [None] * 3
    with pytest.raises(SearchError, match="every trial of standard_sgd diverged: search another domain"):
        chosen(found)
    assert best_so_far(found) == [math.inf] * 3


def test_the_best_trial_is_chosen_the_first_of_equals():
    trials = {"lr": [0.1, 0.2, 0.3, 0.4], "scale": [1, 2, 3, 4], "loss": [None, 2.0, 1.0, 1.0]}
    found = {"method": "m", "domain": {"lr": None, "scale": None}, "trials": trials}
    assert chosen(found) == {"lr": 0.3, "scale": 3}
    assert best_so_far(found) == [math.inf, 2.0, 1.0, 1.0]
    trials["loss"] = [3.0, None, 4.0, 0.5]
    assert best_so_far(found) == [3.0, 3.0, 3.0, 0.5]


def test_a_search_is_open_to_optunas_plots(landscape, task, memory):
    search(task, replace(PLAN, trials=8), storage=memory, name="s")
    study = optuna.load_study(study_name="s", storage=memory)
    assert optuna.visualization.plot_contour(study).to_json()
    assert study.best_value < math.inf


def test_optunas_dashboard_shows_a_search(landscape, task, storage):
    """What its page asks for: the studies, and the trials of one."""
    dashboard = pytest.importorskip("optuna_dashboard", reason="needs optuna-dashboard, which is optional")
    from wsgiref.util import setup_testing_defaults

    found = search(task, PLAN, storage=storage, name="s")

    def get(path):
        environment = {"PATH_INFO": path}
        setup_testing_defaults(environment)
        body = b"".join(dashboard.wsgi(storage)(environment, lambda *head: None))
        return json.loads(body)

    (summary,) = get("/api/studies")["study_summaries"]
    assert summary["study_name"] == "s"
    trials = get(f"/api/studies/{summary['study_id']}")["trials"]
    values = [[float(p["param_external_value"]) for p in trial["params"]] for trial in trials]
    np.testing.assert_allclose(values, proposals(found), rtol=1e-5)
    np.testing.assert_allclose([t["values"][0] for t in trials], found["trials"]["loss"], rtol=1e-5)


# Halving, and the finals

HALVED = replace(PLAN, trials=32, updates=80, halvings=3, finalists=3)


@pytest.fixture
def falling(monkeypatch):
    """Instead of training: curves that fall the lower, the nearer to the bottom of the bowl they are."""
    seen = []

    def run(task, method, settings, *, seed, points, go_on=None, **options):
        distance = (math.log10(settings["lr"]) + 1) ** 2 + math.log10(settings["scale"]) ** 2
        losses = [1 + distance + 50 / update + 1e-3 * (seed % 100) for update in points]
        curve = {"status": "finished", "train": [], "update": [], "second": []}
        for update, loss in zip(points, losses, strict=True):
            for key, value in (("train", loss), ("update", update), ("second", 0.5)):
                curve[key].append(value)
            if go_on is not None and not go_on(update, loss):
                curve["status"] = "stopped"
                break
        seen.append({"settings": settings, "seed": seed, "points": points, "task": task, **curve})
        return curve

    monkeypatch.setattr(tuning, "run", run)
    return seen


def test_only_the_better_half_of_those_that_got_as_far_goes_on(falling, task, memory):
    found = search(task, HALVED, storage=memory, name="s")
    assert HALVED.rungs == [10, 20, 40]
    came: dict[int, list[float]] = {rung: [] for rung in HALVED.rungs}
    for run_ in falling[: HALVED.trials]:
        assert run_["points"] == [10, 20, 40, 80]
        last = 80
        for rung, loss in zip(run_["update"], run_["train"], strict=True):
            if rung < 80:
                came[rung].append(loss)
                if loss > sorted(came[rung])[max(len(came[rung]) // 2, 1) - 1]:
                    last = rung
                    break
        assert run_["update"][-1] == last
    ends = [run_["update"][-1] for run_ in falling[: HALVED.trials]]
    assert found["trials"]["update"] == ends
    assert set(ends) == {10, 20, 40, 80}
    assert found["trials"]["loss"] == pytest.approx([run_["train"][-1] for run_ in falling[:32]], rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_halving_keeps_the_budget(falling, task, memory, seed):
    """Half of the trials go on at each rung, and some more: later proposals are better."""
    plan = replace(HALVED, updates=3000, halvings=4, seed=seed)
    found = search(task, plan, storage=memory, name="s")
    finals = len(found["finals"]["trial"]) * tuning.RUNS_AGAIN * plan.updates
    spent = updates_spent(found)
    assert spent == sum(run_["update"][-1] for run_ in falling)
    assert plan.trials * plan.rungs[0] < spent - finals < plan.trials * plan.updates * 0.6
    assert updates_spent({**found, "trials": {"loss": [1.0] * 5}}) == 5 * 3000 + finals, "without halving"


def test_a_trial_that_was_stopped_counts_with_what_it_had_reached(falling, task, memory):
    """So to Algorithm 1 trials rank first by how far they got: losses fall."""
    found = search(task, replace(HALVED, finalists=0), storage=memory, name="s")
    study = optuna.load_study(study_name="s", storage=memory)
    cube = UnitCube(dict(sorted(study.trials[0].distributions.items())))
    acceptance = BiasedRandomSampler(outlier=math.inf)._acceptance(study, cube)
    assert acceptance.costs.tolist() == [run_["train"][-1] for run_ in falling]
    last, losses = found["trials"]["update"], found["trials"]["loss"]
    nearest = [acceptance(cube.point(trial.params)) for trial in study.trials]
    best = {end: max(p for p, u in zip(nearest, last, strict=True) if u == end) for end in set(last)}
    assert best[10] < best[20] < best[40] < best[80] == 1.0
    assert losses.index(min(losses)) == nearest.index(1.0)


def test_a_search_does_not_look_at_the_test_set(falling, task, memory):
    search(task, HALVED, storage=memory, name="s")
    for run_ in falling:
        assert [len(part) for part in run_["task"].test] == [1, 1]
        assert run_["task"].train is task.train


def test_the_best_are_run_again_with_other_seeds_and_the_best_on_average_is_chosen(
    falling, task, memory, monkeypatch
):
    inner = tuning.run

    def lucky(task, method, settings, *, seed, **options):
        """The best trial was lucky: its other runs are worse than those of the second."""
        curve = inner(task, method, settings, seed=seed, **options)
        if seed >= 1500 and settings == falling[HALVED.trials]["settings"]:  # the first to be run again
            curve["train"][-1] += 10
        return curve

    monkeypatch.setattr(tuning, "run", lucky)
    found = search(task, HALVED, storage=memory, name="s")
    trials, finals = found["trials"], found["finals"]
    farthest = [i for end in (80, 40) for i, update in enumerate(trials["update"]) if update == end]
    best = sorted(farthest, key=lambda i: (-trials["update"][i], trials["loss"][i]))[:3]
    assert finals["trial"] == [best[1], best[2], best[0]]
    again = falling[HALVED.trials :]
    assert sorted(run_["seed"] for run_ in again) == sorted(1500 + 2 * i + k for i in best for k in (0, 1))
    for place, k in enumerate((1, 2, 0)):
        settings = {key: trials[key][best[k]] for key in HALVED.domain}
        runs = [run_ for run_ in again if (run_["seed"] - 1500) // 2 == best[k]]
        assert [run_["settings"] for run_ in runs] == [settings] * 2
        assert all(run_["points"] == [80] for run_ in runs)
        assert sorted(finals["loss"][place]) == pytest.approx(
            sorted(run_["train"][-1] for run_ in runs), 1e-5
        )
    assert chosen(found) == {key: trials[key][best[1]] for key in HALVED.domain}


def test_a_search_goes_on_with_more_trials(falling, task, memory):
    """What is there stays, finalists that are so again are not run once more."""
    search(task, replace(HALVED, trials=20), storage=memory, name="s")
    begun, first = len(falling), [run_["seed"] for run_ in falling[:20]]
    found = search(task, HALVED, storage=memory, name="s")
    assert found["trials"]["seed"] == [*first, *(1000 + i for i in range(20, 32))]
    made = [(run_["seed"], *run_["settings"].values()) for run_ in falling]
    assert len(set(made)) == len(made)
    assert begun + 12 <= len(made) < begun + 12 + 6
    assert search(task, HALVED, storage=memory, name="s")["finals"] == found["finals"]
    assert len(falling) == len(made), "nothing is left to do"


@pytest.mark.parametrize("begun", [0, 8])
def test_a_search_can_begin_with_a_setting_that_is_known(falling, task, memory, begun):
    """It is the first trial, or the next one, once, and among the finalists if it deserves it."""
    known = {"lr": 0.1, "scale": 1.0}  # the bottom of the bowl
    if begun:
        search(task, replace(HALVED, trials=begun, finalists=0), storage=memory, name="s")
    for _ in range(2):
        found = search(task, replace(HALVED, first=known), storage=memory, name="s")
    place = next(i for i, lr in enumerate(found["trials"]["lr"]) if lr == known["lr"])
    assert place == begun
    assert found["trials"]["lr"].count(known["lr"]) == 1
    assert found["first"] == chosen(found) == known
    assert len(found["trials"]["loss"]) == HALVED.trials


def test_a_finalist_that_diverges_comes_last(falling, task, memory, monkeypatch):
    inner = tuning.run

    def diverging(task, method, settings, *, seed, **options):
        curve = inner(task, method, settings, seed=seed, **options)
        diverged = {"status": "diverged", "second": [], "train": [], "update": []}
        return diverged if len(falling) == HALVED.trials + 2 else curve  # the first finalist's second run

    monkeypatch.setattr(tuning, "run", diverging)
    found = search(task, HALVED, storage=memory, name="s")
    losses = found["finals"]["loss"]
    assert [None in some for some in losses] == [False, False, True]
    assert found["trials"]["loss"][found["finals"]["trial"][-1]] == min(
        loss
        for loss, update in zip(found["trials"]["loss"], found["trials"]["update"], strict=True)
        if update == 80
    )


def test_a_search_for_a_target_asks_how_soon(falling, task, memory):
    """A trial ends where it gets there, at the cost of its updates; what does not get there costs more."""
    plan = replace(HALVED, updates=320, halvings=2, target=2.5)
    found = search(task, plan, storage=memory, name="s")
    costs, ends = found["trials"]["loss"], found["trials"]["update"]
    for run_, cost, end in zip(falling, costs, ends, strict=False):
        assert run_["update"][-1] == end
        if run_["train"][-1] <= plan.target:
            assert min(run_["train"][:-1]) > plan.target
            assert run_["update"][-2] < cost <= end
        else:
            assert cost == pytest.approx(plan.updates * run_["train"][-1] / plan.target, rel=1e-5)
            assert end in (*plan.rungs, plan.updates)
    soon = sorted((cost, i) for i, cost in enumerate(costs) if cost <= plan.updates)
    assert 3 < len(soon) < plan.trials
    assert sorted(found["finals"]["trial"]) == sorted(i for _, i in soon[:3])
    assert best_so_far(found)[-1] == soon[0][0]
    assert updates_spent(found) == sum(ends) + sum(round(c) for some in found["finals"]["loss"] for c in some)
    (first, *_), best = found["finals"]["loss"], chosen(found)
    assert best["lr"] == found["trials"]["lr"][found["finals"]["trial"][0]]
    assert max(first) < plan.updates


def test_what_is_already_there_is_in_the_better_half_at_every_later_comparison(falling, task, memory):
    plan = replace(HALVED, updates=320, halvings=2, target=2.5)
    search(task, plan, storage=memory, name="s")
    study = optuna.load_study(study_name="s", storage=memory)
    for trial in study.trials:
        if trial.state == TrialState.COMPLETE and trial.value <= plan.updates:
            assert trial.intermediate_values[plan.rungs[-1]] == trial.value


def test_a_search_without_anything_to_choose_from_has_no_finals(task, memory):
    plan = replace(HALVED, domain={"lr": (1e30, 1e38), "scale": (1.0, 2.0)}, trials=3)
    task = replace(task, network=lambda **options: MLP([6, 5, 6], "relu", **options))
    found = search(task, plan, storage=memory, name="s")
    assert "finals" not in found
    assert found["trials"]["loss"] == [None] * 3
    assert updates_spent(found) == 0
    with pytest.raises(SearchError, match="every trial of standard_sgd diverged"):
        chosen(found)


def test_halved_trials_are_runs_of_the_training_loop(task, memory):
    plan = replace(HALVED, trials=6, updates=8, halvings=2, finalists=1)
    found = search(task, plan, storage=memory, name="s")
    assert 2 in found["trials"]["update"]
    assert 8 in found["trials"]["update"]
    columns = (found["trials"][key] for key in ("lr", "scale", "seed", "update", "loss"))
    for lr, scale, seed, update, loss in zip(*columns, strict=True):
        options = {"updates": update, "points": [update], "evaluate_on": 50, "progress": None}
        by_hand = run(task, "standard_sgd", {"lr": lr, "scale": scale}, seed=seed, **options)
        assert loss == pytest.approx(by_hand["train"][-1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(
            ({"trials": trials}, f"needs trials to be a whole number from 1 on, got {trials}")
            for trials in (0, 2.5)
        ),
        *(({key: -1}, f"needs {key} to be") for key in ("updates", "halvings", "finalists", "seed")),
        *(
            ({"domain": {"lr": ends}}, f"domain of lr must be positive, its lower end first, got {ends[0]}")
            for ends in ((10.0, 1e-3), (0.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (-1.0, 1.0))
        ),
        ({"domain": {}}, "needs a domain"),
        ({"sampler": "tpe"}, "grid, random, biased, got 'tpe'"),
        ({"updates": 7, "halvings": 3}, "7 updates cannot be halved 3 times"),
        *(({"target": target}, f"positive loss, got {target}") for target in (0.0, -10.0, math.nan)),
        *(({"first": {"lr": lr}}, f"lr={lr}, which is not in") for lr in (1e-4, 11.0, -1.0, math.nan)),
        ({"first": {"momentum": 0.9}}, "momentum=0.9, which is not in"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused_before_it_is_begun(
    landscape, task, memory, changes, named
):
    with pytest.raises(SearchError, match=re.escape(named)):
        search(task, replace(PLAN, **changes), storage=memory, name="s")
    assert not memory.get_all_studies()


def test_a_halved_search_that_is_stopped_ends_as_if_it_had_not_been(falling, task, storage, monkeypatch):
    """In the middle of a trial or of the finals: what was cut off is made, and compared, anew."""
    options = dict(storage=storage, name="s", alone=True)
    for number in (1, 9, 7, 15, 8):
        with monkeypatch.context() as patch:
            stopped_in(patch, number)
            with pytest.raises(KeyboardInterrupt):
                search(task, HALVED, **options)
    found = search(task, HALVED, **options)
    assert [len(column) for column in found["trials"].values()] == [32] * 6
    assert len(set(proposals(found))) == 32
    assert [len(losses) for losses in found["finals"]["loss"]] == [2, 2, 2]
    finals = [trials_of(storage, f"s.again{number}") for number in found["finals"]["trial"]]
    assert sum(map(len, finals)) > 6, "the last interruption came during the finals"
    assert search(task, HALVED, **options) == found


def test_a_trial_that_was_cut_off_at_a_rung_is_compared_there_again(falling, task, storage, monkeypatch):
    inner = tuning.run

    def cut_off(task, method, settings, *, go_on, **options):
        def then(update, loss):
            assert go_on(update, loss), "the first trial always goes on"
            if update == 20:
                signal.raise_signal(signal.SIGINT)
            return True

        return inner(task, method, settings, go_on=then, **options)

    plan, options = replace(HALVED, trials=2, finalists=0), dict(storage=storage, name="s", alone=True)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "run", cut_off)
        with pytest.raises(KeyboardInterrupt):
            search(task, plan, **options)
    search(task, plan, **options)
    first, again, _ = trials_of(storage)
    assert (first.state, again.system_attrs["failed_trial"]) == (TrialState.FAIL, first.number)
    assert list(again.intermediate_values) == [10], "it is worse than its first attempt: its seed is larger"
    assert again.state == TrialState.PRUNED


def test_workers_share_a_halved_search_and_its_finals(falling, task, storage, monkeypatch):
    monkeypatch.setattr(tuning, "POLL", 0.05)
    found = {}

    def work(k):
        found[k] = search(task, HALVED, storage=storage, name="s")

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert {**found[0], "provenance": None} == {**found[1], "provenance": None}
    assert len(found[0]["trials"]["loss"]) == 32
    assert [len(losses) for losses in found[0]["finals"]["loss"]] == [2, 2, 2]


EDGE = 0.04
"""Of a range on its log scale."""


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("search_*.json")), ids=lambda path: path.name)
def test_no_setting_that_was_chosen_at_the_horizon_is_at_an_edge_of_its_domain(path):
    """Whether one is better beyond it, the search could not see."""
    for found in Record.read(path)["runs"]:
        for name, value in chosen(found).items() if found.get("halvings") else ():
            low, high = found["domain"][name]
            place = math.log(value / low) / math.log(high / low)
            assert EDGE < place < 1 - EDGE, f"{found['method']}: {name} = {value}"


# Whose study it is


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"updates": 3}, "another updates: 2 instead of 3"),
        ({"method": "bn"}, "another method: standard_sgd instead of bn"),
        ({"seed": 1}, "another seed: 0 instead of 1"),
        ({"sampler": "random"}, "another sampler: biased instead of random"),
        ({"evaluate_on": 60}, "another evaluate_on: 50 instead of 60"),
        ({"domain": {"lr": (0.1, 1.0), "scale": (1.0, 2.0)}}, r"another domain: .*1000\.0.* instead of"),
    ],
)
def test_a_study_of_another_plan_is_refused_and_left(landscape, task, memory, changes, named):
    search(task, PLAN, storage=memory, name="s")
    before = trials_of(memory)
    with pytest.raises(SearchError, match=f"the study 's' has {named}.*another storage, or delete"):
        search(task, replace(PLAN, **changes), storage=memory, name="s")
    assert trials_of(memory) == before
    search(task, replace(PLAN, **changes), storage=memory, name="other name")


def test_of_a_file_one_is_told_which_to_move(landscape, task, tmp_path):
    file = tmp_path / "a search of mine.sqlite3"
    storage = open_storage(sqlite_url(file))
    search(task, PLAN, storage=storage, name="s")
    with pytest.raises(SearchError, match=f"instead of 3; move {file} away, or delete"):
        search(task, replace(PLAN, updates=3), storage=storage, name="s")


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_study_of_somebody_else_is_refused_and_left(landscape, task, memory, direction):
    study = optuna.create_study(storage=memory, study_name="s", direction=direction)
    if direction == "minimize":
        study.add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(SearchError, match="'s' is of something else"):
        search(task, PLAN, storage=memory, name="s")
    assert len(trials_of(memory)) == (direction == "minimize")
    assert not study.user_attrs


def test_runs_again_are_of_the_setting_that_they_were_made_for(falling, task, memory):
    """Not of another one's trial of the same number, in a study that was deleted and made again."""
    plan = replace(PLAN, trials=1, finalists=1)
    search(task, plan, storage=memory, name="s")
    optuna.delete_study(study_name="s", storage=memory)
    begun = replace(plan, first={"lr": 0.2, "scale": 3.0})
    with pytest.raises(SearchError, match=r"'s\.again0' has another setting.* that its name begins"):
        search(task, begun, storage=memory, name="s")


def test_the_commits_of_earlier_trials_are_noted(falling, task, memory, monkeypatch):
    def by(commit, **changes):
        monkeypatch.setattr(tuning, "provenance", lambda device: {"commit": commit})
        return search(task, replace(PLAN, **changes), storage=memory, name="s")["provenance"]

    assert by("first") == {"commit": "first"}
    assert by("second", trials=6) == {"commit": "second", "trials_also_of": ["first"]}
    assert by("third", trials=8) == {"commit": "third", "trials_also_of": ["first", "second"]}


def test_a_grid_cannot_go_on_with_more_points(landscape, task, memory):
    plan = replace(PLAN, sampler="grid")
    search(task, plan, storage=memory, name="s")
    with pytest.raises(SearchError, match="another trials: 4 instead of 9"):
        search(task, replace(plan, trials=9), storage=memory, name="s")


def test_a_study_of_other_data_is_refused(landscape, task, storage):
    search(task, PLAN, storage=storage, name="s")
    data = type("Data", (), {"checksum": "abc"})()
    with pytest.raises(SearchError, match="another data: None instead of abc"):
        search(replace(task, data=data), PLAN, storage=storage, name="s")
    with pytest.raises(SearchError, match="another task: tiny instead of large"):
        search(replace(task, name="large"), PLAN, storage=storage, name="s")


# Going on


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("alone", [True, False])
def test_a_finished_search_is_not_made_again(landscape, task, storage, sampler, alone, monkeypatch):
    options = dict(storage=storage, name="s", alone=alone)
    found = search(task, replace(PLAN, sampler=sampler), **options)
    monkeypatch.setattr(tuning, "run", None)
    assert search(task, replace(PLAN, sampler=sampler), **options) == found


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("sampler", "place"), [("grid", "memory"), ("random", "memory"), ("biased", "storage")]
)
def test_a_search_stopped_by_ctrl_c_again_and_again_ends_with_the_trials_that_were_asked_for(
    landscape, task, place, sampler, alone, monkeypatch, capfd, request
):
    """In the middle of a trial: none is lost, and no proposal comes twice."""
    plan, storage = replace(PLAN, sampler=sampler, trials=16), request.getfixturevalue(place)
    options = dict(storage=storage, name="s", alone=alone)
    for number in (3, 1, 1, 6, 2):
        with monkeypatch.context() as patch:
            stopped_in(patch, number)
            with pytest.raises(KeyboardInterrupt):
                search(task, plan, **options)
    cut_off = [trial for trial in trials_of(storage) if trial.state == TrialState.FAIL]
    assert len(cut_off) == 5
    found = search(task, plan, **options)
    assert [len(column) for column in found["trials"].values()] == [16] * 5
    assert len(set(proposals(found))) == 16
    assert len(set(found["trials"]["seed"])) == 16
    tried = {tuple(float(f"{trial.params[k]:.6g}") for k in plan.domain) for trial in cut_off}
    assert tried <= set(proposals(found)), "what was cut off has been tried again"
    if sampler == "grid":
        assert [len(set(found["trials"][key])) for key in plan.domain] == [4, 4]
    assert "".join(capfd.readouterr()) == "", "no log lines of Optuna's"


@pytest.mark.parametrize("alone", [True, False])
def test_the_known_setting_is_tried_although_its_trial_was_cut_off(falling, task, memory, alone, monkeypatch):
    plan = replace(PLAN, first={"lr": 0.2, "scale": 3.0})
    with monkeypatch.context() as patch:
        stopped_in(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            search(task, plan, storage=memory, name="s", alone=alone)
    found = search(task, plan, storage=memory, name="s", alone=alone)
    assert found["first"] == plan.first
    assert proposals(found)[0] == (0.2, 3.0)


@pytest.mark.parametrize("halvings", [0, 1])
def test_a_worker_that_was_taken_for_dead_goes_on_with_other_trials(
    falling, task, memory, halvings, monkeypatch
):
    """It slept in the middle of its second trial, and another one has given that up, and queued it again."""
    plan = replace(PLAN, updates=8, halvings=halvings)

    def give_up():
        study = optuna.load_study(study_name="s", storage=memory)
        *_, running = study.get_trials()
        study.tell(running.number, state=TrialState.FAIL)
        tuning._retry(study, running, max_retry=1)

    stopped_in(monkeypatch, 2, give_up)
    found = search(task, plan, storage=memory, name="s")
    assert len(set(proposals(found))) == 4
    assert [trial.state.name for trial in trials_of(memory)].count("FAIL") == 1


def test_only_one_who_is_alone_takes_running_trials_for_dead(landscape, task, storage, monkeypatch):
    """Another worker's trial stays its own."""
    search_once = dict(storage=storage, name="s")
    with monkeypatch.context() as patch:
        stopped_in(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            search(task, PLAN, **search_once)
    study = optuna.load_study(study_name="s", storage=storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running = study.ask()
    running.suggest_float("lr", *PLAN.domain["lr"], log=True)
    running.suggest_float("scale", *PLAN.domain["scale"], log=True)

    def finish():
        while sum(trial.state == TrialState.COMPLETE for trial in trials_of(storage)) < 4:
            time.sleep(0.05)
        time.sleep(0.3)
        running.set_user_attr("second", 1.0)
        running.set_user_attr("seed", 77)
        study.tell(running, 5.0)

    monkeypatch.setattr(tuning, "POLL", 0.05)
    other = threading.Thread(target=finish)
    other.start()
    found = search(task, PLAN, **search_once)
    other.join()
    assert found["trials"]["seed"][0] == 77, "it was waited for: the first trials count, not the fastest"
    assert len(found["trials"]["seed"]) == 4
    assert sum(trial.state == TrialState.COMPLETE for trial in trials_of(storage)) == 5


CHILD = """
import sys, time
from test_tuning import PLAN, small_task
from sogrid.experiments import tuning
from dataclasses import replace
inner = tuning.run
def slowly(*args, **options):
    print(flush=True)
    time.sleep(0.1)
    return inner(*args, **options)
tuning.run = slowly
storage = tuning.open_storage(sys.argv[1])
plan = replace(PLAN, sampler=sys.argv[2], trials=9)
tuning.search(small_task(), plan, storage=storage, name="s", alone=True)
"""


@pytest.mark.parametrize("sampler", ["grid", "biased"])
def test_a_killed_search_tries_again_what_it_was_at(sampler, task, tmp_path):
    """SIGKILL in the middle of a trial: no heartbeat need be awaited by one who is alone."""
    url = f"sqlite:///{tmp_path / 's.sqlite3'}"
    with Child(CHILD, url, sampler, path=(Path(__file__).parent,)) as child:
        for _ in range(4):
            assert child.stdout.readline(), "it ended on its own"
        child.kill()
    storage = open_storage(url)
    *_, killed = trials_of(storage)
    assert killed.state == TrialState.RUNNING
    plan = replace(PLAN, sampler=sampler, trials=9)
    found = search(task, plan, storage=storage, name="s", alone=True)
    assert len(set(proposals(found))) == len(found["trials"]["loss"]) == 9
    assert tuple(float(f"{killed.params[key]:.6g}") for key in plan.domain) in proposals(found)
    assert {trial.state for trial in trials_of(storage)} == {TrialState.COMPLETE, TrialState.FAIL}


@pytest.mark.parametrize("sampler", ["random", "biased"])
def test_workers_of_one_study_do_not_make_each_others_proposals(
    landscape, task, storage, sampler, monkeypatch
):
    """Two who begin at the same moment, before there is any trial."""
    barrier, inner, first = threading.Barrier(2), tuning.run, []

    def together(*args, **options):
        if threading.get_ident() not in first:
            first.append(threading.get_ident())
            barrier.wait(20)
        return inner(*args, **options)

    monkeypatch.setattr(tuning, "run", together)
    monkeypatch.setattr(tuning, "POLL", 0.05)
    found = {}

    def work(k):
        found[k] = search(task, replace(PLAN, sampler=sampler, trials=12), storage=storage, name="s")

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert found[0]["trials"] == found[1]["trials"]
    assert len(set(proposals(found[0]))) == 12


# Storages


@pytest.mark.parametrize(
    ("url", "finding"),
    [
        ("banana", "Could not parse"),
        ("sqlite:////nowhere/at/all.sqlite3", "unable to open database file"),
        ("postgresql+psycopg://me:secret@/x?host=/nowhere", "nowhere"),
        ("postgresql+psycopg://me:sec@ret@127.0.0.1:1/x", "127.0.0.1"),
        ("oracle+nothing://me:secret@host/x", "oracle.nothing"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line_without_its_password(url, finding):
    with pytest.raises(SearchError, match=re.escape(finding)) as error:
        open_storage(url)
    assert "\n" not in str(error.value)
    assert "sec" not in str(error.value)
    assert str(error.value).startswith(f"the storage {url.split(':')[0]}")


@pytest.mark.parametrize(
    "folders", [("run?1", "run?2"), ("d%41", "dA"), ("{x}", "{y}"), ("a b", "a#b"), ("é;&@", "e")]
)
def test_every_folder_has_its_own_studies(tmp_path, folders):
    for count, folder in enumerate(folders, start=1):
        path = tmp_path / folder / "s.sqlite3"
        path.parent.mkdir()
        storage = open_storage(sqlite_url(path))
        optuna.create_study(storage=storage, study_name="s")
        storage.engine.dispose()
        assert path.exists()
        assert len(list(tmp_path.rglob("*.sqlite3"))) == count


@pytest.mark.parametrize("keep", [0.5, 0.9, 20])
def test_a_truncated_file_is_refused_and_left(landscape, task, tmp_path, keep):
    path = tmp_path / "s.sqlite3"
    search(task, PLAN, storage=open_storage(f"sqlite:///{path}"), name="s")
    whole = path.read_bytes()
    content = whole[: keep if isinstance(keep, int) else int(keep * len(whole))]
    path.write_bytes(content)
    with pytest.raises(SearchError, match=r"s\.sqlite3 cannot be used: .*malformed|not a database") as error:
        search(task, PLAN, storage=open_storage(f"sqlite:///{path}"), name="s")
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content
    path.write_bytes(whole)
    search(task, PLAN, storage=open_storage(f"sqlite:///{path}"), name="s")


@pytest.mark.parametrize("when", ["beginning", "middle", "end"])
def test_a_full_disk_is_one_line_and_the_search_goes_on_when_there_is_room(
    landscape, task, storage, when, monkeypatch
):
    """SQLite's own refusal, by a limit on the pages of its file."""
    plan, pages = replace(PLAN, trials=6), []

    @sqlalchemy.event.listens_for(storage.engine, "checkout")
    def limit(connection, *_):
        count = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={count if pages else 2**30}")

    def act():
        pages.append(True)
        storage.scoped_session.remove()
        storage.engine.dispose()

    if when == "beginning":
        act()
    else:
        stopped_in(monkeypatch, {"middle": 3, "end": 6}[when], act)
    inner = tuning.run
    monkeypatch.setattr(tuning, "run", lambda *a, **o: {**inner(*a, **o), "second": ["x" * 9000]})
    with pytest.raises(
        SearchError, match=r"the storage of the study 's' failed: .*full.*run the same again"
    ) as e:
        search(task, plan, storage=storage, name="s", alone=True)
    assert "\n" not in str(e.value)
    pages.clear()
    storage.engine.dispose()
    monkeypatch.setattr(tuning, "run", inner)
    found = search(task, plan, storage=storage, name="s", alone=True)
    assert len(set(proposals(found))) == 6


def test_optunas_experimental_warnings_are_not_shown(landscape, task, tmp_path):
    before = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        storage = open_storage(f"sqlite:///{tmp_path / 's.sqlite3'}")
        search(task, PLAN, storage=storage, name="s", alone=True)
    assert optuna.logging.get_verbosity() == before


def test_a_bar_for_the_trials(landscape, task, memory, capsys):
    search(task, PLAN, storage=memory, name="s", progress="here")
    err = capsys.readouterr().err
    assert "here:" in err
    assert "4/4" in err
    assert "best=" in err
