"""When to refresh: how the record is made, timed and judged."""

import pytest

from lab import cli
from lab.refreshing import METHODS, SCHEDULES, SEEDS, clock, curves, elapsed, fit, reached, report, verdict
from sogrid.experiments import data
from sogrid.experiments.benchmarks import BENCHMARKS
from sogrid.experiments.records import RESULTS, Record
from sogrid.networks import MLP
from sogrid.optimizers.adaptive import ADAPTIVE


@pytest.fixture(scope="module")
def task():
    found = BENCHMARKS["mnist_autoencoder"].task(data.load("mnist", source="embedded"))
    object.__setattr__(found, "network", lambda **o: MLP([784, 12, 9, 784], "sigmoid", "sigmoid", **o))
    return found


@pytest.fixture(scope="module")
def record():
    return Record.read(RESULTS / "adaptive_refresh.json")


@pytest.mark.parametrize("method", METHODS)
def test_refreshes_are_counted(task, method):
    fixed = fit(task, method, 5, 1, updates=12)
    assert fixed["update"][-1] == 12
    assert fixed["refreshes"][-1] == [3, 3, 3]
    assert fixed["refreshes"][0] == [0, 0, 0]
    assert fixed["looks"][-1] == 0
    adaptive = fit(task, method, ADAPTIVE, 1, updates=12)
    assert adaptive["looks"][0] == 0
    assert adaptive["looks"][-1] >= 3 + 3 * 2  # fresh, and after one update and after two or one more
    assert min(adaptive["refreshes"][-1]) >= 1
    assert adaptive["train"][0] == fixed["train"][0]


def test_prices_are_of_an_update_and_of_each_layer(task):
    prices = clock(task, "acp_bounded", rounds=2)
    assert prices["update_ms"] > 0
    assert prices["adaptive_update_ms"] > 0
    assert len(prices["layer_refresh_ms"]) == 3
    assert "look_ms" in prices


def test_time_is_of_updates_and_of_what_was_refreshed():
    prices = {
        "update_ms": 100.0,
        "adaptive_update_ms": 110.0,
        "refresh_ms": 50.0,
        "layer_refresh_ms": [10.0, 20.0],
        "look_ms": 3.0,
    }
    run = {"every": "5", "update": [0, 10], "refreshes": [[0, 0], [2, 2]]}
    assert elapsed(run, prices) == pytest.approx([0.0, 1.1])
    run = {"every": ADAPTIVE, "update": [0, 10], "refreshes": [[0, 0], [3, 2]], "looks": [0, 10]}
    assert elapsed(run, prices) == pytest.approx([0.0, 1.1 + 0.05 + 0.02 + 0.02 + 0.03])


def test_where_a_curve_comes_down_to_a_loss():
    assert reached([0, 1, 2], [8.0, 4.0, 2.0], 6.0) == 0.5
    assert reached([0, 1, 2], [8.0, 4.0, 2.0], 2.0) == 2
    assert reached([0, 1, 2], [8.0, 4.0, 2.0], 1.0) is None


def made_up(adaptive):
    """A record of two seeds that reach 40 to 10 in as many updates, at a second each."""
    prices = {"update_ms": 1000.0, "adaptive_update_ms": 1000.0, "refresh_ms": 0.0, "layer_refresh_ms": [0.0]}
    prices["look_ms"] = 0.0
    runs = [{"method": "acp_bounded", "part": "clock", **prices}]
    for every, lengths in {"5": (100, 120), "20": (130, 130), ADAPTIVE: adaptive}.items():
        for seed, length in enumerate(lengths):
            curve = {"update": [0, length], "train": [50.0, 0.0], "refreshes": [[1], [1]], "looks": [0, 9]}
            runs.append({"method": "acp_bounded", "every": every, "seed": seed, **curve})
    return {"runs": runs}


@pytest.mark.parametrize(
    ("adaptive", "longer", "settled"),
    [((90, 108), -0.1, True), ((110, 132), 0.1, True), ((90, 130), 0.0, False)],
)
def test_who_is_first_and_whether_that_is_settled(adaptive, longer, settled):
    for found in verdict(made_up(adaptive), "acp_bounded").values():
        assert found == ("5", pytest.approx(longer), settled)


def test_the_record_is_whole_of_three_seeds_and_of_one_machine(record):
    for method in {run["method"] for run in record["runs"]}:
        runs = {
            (run["every"], run["seed"])
            for run in record["runs"]
            if run["method"] == method and "every" in run
        }
        assert runs == {(str(every), seed) for every in SCHEDULES for seed in SEEDS}
        assert len(report(record, method)) == 1 + len(SCHEDULES)
        curves(record, method)
    assert len({str(run["provenance"]["machine"]) for run in record["runs"]}) == 1
    assert record["settings"]["methods"] == METHODS


def test_adaptive_refreshes_took_no_more_than_their_share(record):
    """Of the time that was measured, where the optimizer has only an estimate."""
    for method in {run["method"] for run in record["runs"]}:
        share = {row[0]: row[2] for row in report(record, method)[1:]}["adaptive"]
        assert float(share.rstrip("%")) <= 12


@pytest.mark.parametrize("wrong", [["--methods", "sgd"], ["--updates", "0"]])
def test_the_command_line_refuses(wrong, capsys):
    with pytest.raises(SystemExit):
        cli.main(["refreshing", *wrong])
    assert "error" in capsys.readouterr().err
