"""Step times: what is measured, and where it is kept."""

from dataclasses import replace

import pytest
import torch
from searched import VALUES

from lab import timing
from lab.timing import clock, step_times
from sogrid.experiments.benchmarks import BENCHMARKS, METHODS, REFRESH_EVERY
from sogrid.experiments.records import Record, RecordError
from sogrid.networks import MLP

NAME = "mnist_autoencoder"
SGD, REFRESHED = "standard_sgd", "acp_fixedalpha"


@pytest.fixture
def small(monkeypatch):
    """Both benchmarks with networks of five units."""

    def autoencoder(**options):
        return MLP([6, 5, 6], **{"activation": "sigmoid", "output": "sigmoid", **options})

    def classifier(**options):
        return MLP([6, 5, 10], **options)

    for name, network in ((NAME, autoencoder), ("cifar10_classifier", classifier)):
        monkeypatch.setitem(timing.BENCHMARKS, name, replace(BENCHMARKS[name], network=network))


@pytest.fixture
def hands(small, monkeypatch):
    """A clock whose hands move by a second for each backward pass, and by ten for each refresh."""
    now, backward, plain = [0.0], torch.Tensor.backward, METHODS[REFRESHED]

    def ticking(self, *args, **options):
        now[0] += 1
        return backward(self, *args, **options)

    def slow(*args):
        optimizer = plain.optimizer(*args)
        inner = optimizer.refresh

        def refresh(closure):
            now[0] += 10
            inner(closure)

        optimizer.refresh = refresh
        return optimizer

    monkeypatch.setattr(torch.Tensor, "backward", ticking)
    monkeypatch.setitem(timing.METHODS, REFRESHED, replace(plain, optimizer=slow))
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def path(tmp_path):
    """A record of learning curves of two methods, two seeds of the first."""
    record = Record(tmp_path / "r.json", "fig", {"profile": "smoke", "benchmark": NAME})
    for method, seed in ((SGD, 0), (REFRESHED, 0), (SGD, 1)):
        record.add({"method": method, "seed": seed, "update": [0, 2], "train": [2.0, 1.0]})
    return record.path


@pytest.mark.parametrize("benchmark", [NAME, "cifar10_classifier"])
def test_every_method_of_a_benchmark_can_be_timed(small, benchmark):
    methods = list(METHODS)
    rows = step_times(benchmark, methods, rounds=2)
    assert [row["method"] for row in rows] == methods
    for row in rows:
        low, high = row["quartiles_ms"]
        assert 0 < low <= high
        assert row["update_ms"] > 0
        keeps_statistics = METHODS[row["method"]].settings == ("lr", "damping")
        assert (row["refresh_ms"] > 0) == keeps_statistics, row["method"]


@pytest.mark.parametrize("method", ["acp", "nnn2", "kfac", "centered_gradient_descent", "jaco_update"])
def test_both_routes_of_a_method_can_be_timed(small, monkeypatch, method):
    """Side by side, each by its own route."""
    gradients, inner = {}, timing._update

    def watched(model, optimizer, *rest):
        inner(model, optimizer, *rest)
        gradients[optimizer.gradients] = model[0].weight.grad is None

    monkeypatch.setattr(timing, "_update", watched)
    rows = step_times("mnist_autoencoder", [method, f"{method} matrix"], rounds=2)
    assert [row["method"] for row in rows] == [method, f"{method} matrix"]
    assert gradients == {"matrix": False, "factored": True}


@pytest.mark.parametrize("method", ["acp", "nnn2_bounded", "kfac"])
def test_a_method_can_be_timed_at_another_rank(small, monkeypatch, method):
    ranks, inner = [], timing._update

    def watched(model, optimizer, *rest):
        inner(model, optimizer, *rest)
        state = optimizer.state[model[0].weight]
        ranks.append(len(state.get("inverse", state.get("a_inverse"))))

    monkeypatch.setattr(timing, "_update", watched)
    step_times("mnist_autoencoder", [f"{method} rank 2"], rounds=2)
    assert set(ranks) == {2}


def test_a_share_of_the_refresh_is_in_the_update(hands):
    """One backward pass for each update; a refresh, of ten seconds, every hundred updates."""
    sgd, acp = step_times(NAME, [SGD, REFRESHED], rounds=4)
    assert sgd == {"method": SGD, "update_ms": 1000.0, "quartiles_ms": [1000.0, 1000.0], "refresh_ms": 0.0}
    assert acp["quartiles_ms"] == [1000.0, 1000.0], "of the step alone"
    assert acp["refresh_ms"] == 10_000.0
    assert acp["update_ms"] == pytest.approx(1000 + 10_000 / REFRESH_EVERY)


def test_the_first_rounds_do_not_count_and_a_slow_one_hardly(small, monkeypatch):
    now, updates = [0.0], [0]
    original = timing._update

    def update(*args):
        updates[0] += 1
        slow = updates[0] <= timing.WARM_UP or updates[0] == timing.WARM_UP + 2
        now[0] += 100 if slow else 1
        original(*args)

    monkeypatch.setattr(timing, "_update", update)
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    (row,) = step_times(NAME, [SGD], rounds=9)
    assert updates[0] == timing.WARM_UP + 9
    assert row["update_ms"] == 1000
    assert row["quartiles_ms"] == [1000, 1000]


def test_methods_take_turns(small, monkeypatch):
    """So that a busy machine slows all alike."""
    turns = []
    original = timing._update
    monkeypatch.setattr(timing, "_update", lambda *a: (turns.append(type(a[1]).__name__), original(*a)))
    step_times(NAME, [SGD, REFRESHED], rounds=3)
    assert turns == ["SGD", "ACP"] * (timing.WARM_UP + 3)


def test_the_clock_is_put_into_the_record_and_keeps_its_runs(hands, path):
    before = Record.read(path)
    rows = clock(path, rounds=3)
    content = Record.read(path)
    assert {key: content[key] for key in before} == before
    assert content["clock"]["rounds"] == 3
    assert content["clock"]["provenance"]["machine"]["threads"] == torch.get_num_threads()
    assert [row["method"] for row in content["clock"]["rows"]] == [SGD, REFRESHED]
    assert rows == [
        ("  standard_sgd", "1000.00", "1000.00 to 1000.00", "1.00", "0.0"),
        ("  acp_fixedalpha", "1100.00", "1000.00 to 1000.00", "1.10", "10000.0"),
    ]
    again = Record(path, before["experiment"], before["settings"])
    again.add({"method": "kfac", "seed": 0, "update": [0], "train": [1.0]})
    assert Record.read(path)["clock"] == content["clock"]


def test_runs_that_are_added_while_it_measures_are_kept(hands, path, monkeypatch):
    inner = timing.step_times

    def meanwhile(*args, **options):
        content = Record.read(path)
        Record(path, "fig", content["settings"]).add({"method": SGD, "seed": 2, "update": [0]})
        return inner(*args, **options)

    monkeypatch.setattr(timing, "step_times", meanwhile)
    clock(path, rounds=2)
    content = Record.read(path)
    assert [run["seed"] for run in content["runs"]] == [0, 0, 1, 2]
    assert "clock" in content


def test_without_sgd_there_is_no_ratio(small, tmp_path):
    record = Record(tmp_path / "r.json", "fig", {"benchmark": NAME})
    record.add({"method": "bn", "seed": 0, "update": [0], "train": [1.0]})
    ((_, _, _, ratio, _),) = clock(record.path, rounds=2)
    assert ratio == ""


def test_a_record_of_searches_has_no_time_axis(small, tmp_path):
    record = Record(tmp_path / "r.json", "search", {"benchmark": NAME})
    trials = {key: [value] for key, value in {**VALUES, "loss": 1.0}.items()}
    record.add({"method": SGD, "sampler": "biased", "seed": 0, "updates": 3, "trials": trials})
    before = record.path.read_bytes()
    with pytest.raises(RecordError, match=r"r\.json holds no learning curves"):
        clock(record.path)
    assert record.path.read_bytes() == before


def test_a_record_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"there is no record .*none\.json"):
        clock(tmp_path / "none.json")
    assert not list(tmp_path.iterdir())


def test_a_bar_only_if_asked(small, path, capsys):
    clock(path, rounds=2)
    assert capsys.readouterr().err == ""
    clock(path, rounds=2, progress=True)
    assert "rounds" in capsys.readouterr().err
