"""Figures and tables from made-up records: what is drawn, and what the captions say."""

import math
from itertools import product

import pytest

from lab.figures import (
    bars,
    best_losses,
    by_learning_rate,
    caption,
    comparison_table,
    cost_growth,
    cost_table,
    good_learning_rates,
    horizon_table,
    landscape,
    learning_curves,
    learning_rate_table,
    loss_at,
    provenance_table,
    search_caption,
    search_scatter,
    search_table,
    settings_table,
    thesis_loss_at,
    values_at,
)
from sogrid.experiments.reference import thesis_values

PROVENANCE = {"date": "2026-11-24", "machine": {"processor": "Z80", "threads": 1, "device": "cpu"}}


@pytest.fixture
def record():
    """Two methods, two seeds, four evaluations."""
    runs = [
        {
            "method": method,
            "settings": {"lr": 0.125, "scale": 32.0},
            "seed": seed,
            "update": [0, 300, 1000, 3000],
            "second": [0.0, 30.0, 100.0, 300.0],
            "train": [100.0, 40.0 + seed, 20.0, 10.0],
            "test": [100.0, 42.0, 22.0, 12.0],
            "status": "finished",
            "provenance": PROVENANCE,
        }
        for method, seed in product(("acp_fixedalpha", "standard_sgd"), (1, 3))
    ]
    settings = {"updates": 3000, "batch": 200, "refresh_every": 100, "hyperparameters": "by lot"}
    settings["data"] = {"variant": "MNIST, full", "checksum": "0123456789"}
    return {"experiment": "fig6_2_mnist_autoencoder", "settings": settings, "runs": runs}


def with_clock(record):
    rows = [
        {"method": "acp_fixedalpha", "update_ms": 40.0, "refresh_ms": 50.0},
        {"method": "standard_sgd", "update_ms": 20.0, "refresh_ms": 0.0},
    ]
    return {**record, "clock": {"rows": rows, "provenance": PROVENANCE}}


def lines(figure, name):
    return [trace for trace in figure.data if trace.mode == "lines" and trace.name == name]


def test_seconds_of_one_axis_are_measured_in_one_way(record):
    """A method that came after the clock: all seconds are the runs' own until the clock is asked again."""
    partial = with_clock(record)
    assert max(learning_curves(partial, x="second", y="train").data[0].x) == 1 + 120
    partial["clock"]["rows"].pop()
    drawn = learning_curves(partial, x="second", y="train")
    assert max(drawn.data[0].x) == 1 + 300
    assert "measured on its own" not in caption(partial)
    longer = {**record, "settings": {**record["settings"], "updates": 9000}, "runs": []}
    longer["runs"] = [{**record["runs"][0], "update": [0, 300, 1000, 9000]}]
    drawn = learning_curves(with_clock(record), x="second", y="train", longer=longer)
    assert max(max(trace.x) for trace in drawn.data) == 1 + 360


def test_a_line_is_a_seed(record):
    figure = learning_curves(record, x="update", y="train")
    one, three = lines(figure, "SGD")
    assert list(one.x) == [1, 301, 1001, 3001]
    assert list(one.y) == [100, 41, 20, 10]
    assert list(three.y) == [100, 43, 20, 10]
    assert (one.showlegend, three.showlegend) == (True, False)
    assert "seed 3" in three.hovertemplate
    assert all(trace.fill is None for trace in figure.data)
    assert "SGD 10, 10." in figure.layout.meta["alt"]
    some = learning_curves(record, x="update", y="train", methods=["acp_fixedalpha"])
    assert not lines(some, "SGD")


def test_seconds_are_updates_times_their_cost(record):
    measured = learning_curves(record, x="second", y="train")
    assert list(lines(measured, "SGD")[0].x) == [1, 31, 101, 301]
    built = learning_curves(with_clock(record), x="second", y="train")
    assert list(lines(built, "SGD")[0].x) == [1, 7, 21, 61]
    assert list(lines(built, "ACP, fixed α")[0].x) == [1, 13, 41, 121]


def test_the_thesis_is_beside_ours_as_far_as_we_went(record):
    figure = learning_curves(record, x="update", y="train", figure_key="fig6_2")
    (marks,) = (trace for trace in figure.data if trace.name == "SGD (thesis 2017)")
    assert list(marks.x) == [1, 301, 601, 1001, 3001]
    assert list(marks.y) == thesis_values("fig6_2")["curves"]["train_mse_by_update"]["y"]["standard_sgd"][:5]
    (dashed,) = (trace for trace in figure.data if trace.name == "ACP, fixed α (thesis 2017)")
    assert (marks.marker.symbol, dashed.marker.symbol) == ("circle-open", "diamond-open")
    assert not any(
        "thesis" in (trace.name or "") for trace in learning_curves(record, x="update", y="train").data
    )


def test_methods_that_the_thesis_lacks_have_no_marks(record):
    for run in record["runs"][2:]:
        run["method"] = "jaco_update_hessian"
    figure = learning_curves(record, x="update", y="train", figure_key="fig5_1")
    assert not any("Hessian (thesis" in (trace.name or "") for trace in figure.data)


def test_a_longer_run_goes_on_where_ours_end(record):
    run = {**record["runs"][2], "update": [0, 1000, 3000, 9000], "train": [100.0, 21.0, 11.0, 6.0]}
    figure = learning_curves(record, x="update", y="train", longer={**record, "runs": [run]})
    *_, late = lines(figure, "SGD")
    assert (list(late.x), list(late.y)) == ([3001, 9001], [11, 6])
    other = {**run, "settings": {"lr": 0.25, "scale": 32.0}}  # it goes on with none of ours
    assert (
        len(lines(learning_curves(record, x="update", y="train", longer={**record, "runs": [other]}), "SGD"))
        == 2
    )


def test_a_cross_is_where_a_seed_diverged(record):
    last = record["runs"][3]
    last |= {"status": "diverged", **{k: last[k][:2] for k in ("update", "second", "train", "test")}}
    figure = learning_curves(record, x="update", y="train")
    assert [len(trace.x) for trace in lines(figure, "SGD")] == [4, 2]
    (cross,) = (trace for trace in figure.data if trace.marker.symbol == "x")
    assert (cross.x, cross.y) == ((301,), (43,))
    assert "SGD 10, diverged" in figure.layout.meta["alt"]
    record["runs"][3] |= {key: [] for key in ("update", "second", "train", "test")}  # before it was evaluated
    assert len(lines(learning_curves(record, x="update", y="train"), "SGD")) == 2


@pytest.mark.parametrize(("low", "end"), [(2e-5, -4), (2e-3, None)])
def test_an_axis_of_error_rates_ends_at_one_error(record, low, end):
    runs = [run | {"train_error": [1.0, 0.5, 0.1, low]} for run in record["runs"]]
    axis = learning_curves({**record, "runs": runs}, x="update", y="train_error").layout.yaxis
    assert (axis.range and axis.range[0]) == end


def test_error_rates_of_zero_have_no_place_on_a_logarithmic_axis(record):
    for run in record["runs"]:
        run["method"] = {"standard_sgd": "kfac_nat"}.get(run["method"], "kfac")
        run["update"], run["train_error"] = [0, 1000, 20_000, 50_000], [0.9, 0.5, 0.1, 0.01]
    figure = learning_curves(record, x="update", y="train_error", figure_key="fig6_3")
    (marks,) = (trace for trace in figure.data if trace.name == "KFAC, Fisher (thesis 2017)")
    assert min(marks.y) > 0


def test_values_at_a_point(record):
    assert values_at(record, "standard_sgd", 300) == [41, 43]
    assert loss_at(record, "standard_sgd", 300, "test") == 42
    with pytest.raises(ValueError, match="no 'standard_sgd' evaluated at update 7"):
        loss_at(record, "standard_sgd", 7)
    assert thesis_loss_at("fig6_2", 1000)["kfac"] == 6.46
    assert thesis_loss_at("fig5_1", 1000)["jaco_update"] == 82.7
    assert thesis_loss_at("fig6_3", 1000)["kfac_nat"] == 1.21


def test_captions_say_what_and_how(record):
    text = caption(record)
    for part in ("MNIST, full", "3,000 updates of 200", "seeds 1, 3", "by lot"):
        assert part in text
    assert "seconds" not in text
    assert "seconds are updates times the cost of one" in caption(with_clock(record))
    assert "seed 1," in caption({**record, "runs": record["runs"][:1]})
    some = {**record, "settings": {**record["settings"], "evaluate_on": 10_000}}
    assert "of 10,000 training images" in caption(some)
    lost = {**record["runs"][0], "status": "diverged", "update": [], "train": [], "test": []}
    assert "3,000 updates of 200" in caption({**record, "runs": [lost, *record["runs"]]})
    assert "0 updates of 200" in caption({**record, "runs": [lost]})


def test_where_records_come_from(record):
    first, *others = record["runs"]
    machine = {**first["provenance"]["machine"], "processor": "6502", "device": "TPU"}
    other = {**first, "provenance": {"date": "2026-11-25", "machine": machine}}
    rows = provenance_table({"fig6_2": {**record, "runs": [other, *others]}, "claims": {}}).splitlines()
    assert rows[2:] == [
        "| fig6_2 | MNIST, full, sha256 01234567 | 6502, 1 thread, TPU | 2026-11-25 |",
        "|  |  | Z80, 1 thread | 2026-11-24 |",
    ]


def test_tables(record):
    table = comparison_table(record, 300, "fig6_2").splitlines()
    assert table[2] == "| ACP, fixed α | 41, 43 | 87.8 | λ 0.125, s 32 |"
    assert (
        cost_table(with_clock(record), "fig6_2").splitlines()[2]
        == "| ACP, fixed α | 40.0 | 0.50 | 2.00 | 2.03 |"
    )


def test_a_table_of_what_is_there_only_in_part(record):
    clocked = with_clock(record)
    del clocked["clock"]["rows"][1]  # SGD's
    assert cost_table(clocked, "fig6_2").splitlines()[2:] == ["| ACP, fixed α | 40.0 | 0.50 |  | 2.03 |"]
    for run in record["runs"][:2]:
        run |= {"status": "diverged", "update": [0], "train": [100.0]}
    assert "| ACP, fixed α | diverged | 87.8 |" in comparison_table(record, 300, "fig6_2")


def test_bars_are_told_and_drawn_from_the_top():
    figure = bars({"one": {"ACP": 1.25, "KFAC": 2}, "two": {"KFAC": 3}}, xlabel="times", alt="Costs.")
    assert figure.data[1].x == (None, 3)
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.meta["alt"] == "Costs. one: ACP 1.25, KFAC 2.00; two: KFAC 3.00."


def test_growth_has_an_axis_for_each_that_was_followed():
    rows = [
        {"axis": axis, "at": at, "ratio": {"acp": 1.5, "kfac": 2.0}}
        for axis, at in product(("width", "depth"), (8, 16))
    ]
    figure = cost_growth(rows)
    assert [trace.xaxis for trace in figure.data] == ["x", "x", "x2", "x2"]
    assert [trace.showlegend for trace in figure.data] == [True, True, False, False]
    assert "depth 16: 1.50 and 2.00" in figure.layout.meta["alt"]


@pytest.fixture
def searches():
    """Two searches by each sampler, four trials each, one of which diverged."""
    runs = [
        {
            "method": "standard_sgd",
            "sampler": sampler,
            "seed": seed,
            "domain": {"lr": [0.01, 1.0], "scale": [1.0, 100.0]},
            "trials": {
                "lr": [0.01, 0.1, 0.2, 1.0],
                "scale": [1.0, 10.0, 20.0, 100.0],
                "loss": [50.0, 30.0 + seed, 40.0, None],
            },
            "provenance": PROVENANCE,
        }
        for sampler, seed in product(("grid", "random", "biased"), (0, 1))
    ]
    settings = {"benchmark": "mnist_autoencoder", "updates": 300}
    settings["data"] = {"variant": "MNIST, full", "checksum": "0123456789"}
    return {"experiment": "fig4_1_three_searches", "settings": settings, "runs": runs}


def test_a_landscape_has_every_trial(searches):
    figure = landscape(searches)
    runs, diverged, _, best = figure.data
    assert len(runs.x) == 18
    assert len(diverged.x) == 6
    assert (best.x, best.y) == ((0.1,), (10.0,))
    assert list(runs.marker.color[:3]) == pytest.approx([math.log10(v) for v in (50, 30, 40)])
    assert "The best has learning rate 0.1, init scale 10 and loss 30." in figure.layout.meta["alt"]


def test_three_searches_share_one_scale_and_one_bar(searches):
    figure = search_scatter(searches, seed=1)
    runs = figure.data[::2]
    assert [trace.xaxis for trace in runs] == ["x", "x2", "x3"]
    assert [bool(trace.marker.showscale) for trace in runs] == [True, False, False]
    assert {(trace.marker.cmin, trace.marker.cmax) for trace in runs} == {(math.log10(31), math.log10(50))}
    ends = [figure.layout[axis].domain for axis in ("xaxis", "xaxis2", "xaxis3")]
    assert ends[0][1] < ends[1][0] < ends[1][1] < ends[2][0]


def test_the_table_of_searches(searches):
    assert best_losses(searches)["biased"] == [30, 31]
    rows = search_table(searches).splitlines()
    assert rows[4] == "| biased random search | 2 | 30.50 ± 0.71 | 26.61 ± 0.13 |"
    assert settings_table(searches).splitlines()[2] == "| SGD | 4 | 1 | 30 | λ 0.1, s 10 |"
    assert "24 runs of 300 updates" in search_caption(searches)
    halved = {**searches, "settings": {**searches["settings"], "halvings": 2}}
    assert "24 runs of up to 300 updates" in search_caption(halved)


def test_the_table_of_a_longer_search():
    """What came first may be any of its trials; one that was stopped says so, one chosen again too."""

    def run(method, first, best, loss, update):
        trials = {"lr": [0.1, 0.2, 0.3], "scale": [4.0, 5.0, 6.0], "loss": loss, "update": update}
        known = {key: trials[key][first] for key in ("lr", "scale")}
        finals = {"trial": [best, 0], "loss": [[9.0, None], [10.0, 11.0]]}
        return {
            **{"method": method, "updates": 3000, "domain": {"lr": [0.1, 1.0], "scale": [1.0, 9.0]}},
            **{"first": known, "trials": trials, "finals": finals},
        }

    runs = [
        run("kfac", 1, 2, [8.0, 50.25, 9.0], [3000, 375, 3000]),
        run("acp", 2, 2, [8.0, 9.5, 7.25], [3000] * 3),
        run("jaco_update", 1, 0, [8.0, None, 9.0], [3000, 200, 3000]),
        {**run("nnn2", 1, 0, [8.0, 7.0, 9.0], [3000] * 3), "first": None},
    ]
    table = horizon_table({"settings": {"updates": 3000}, "runs": runs}, "fig6_1", "fig6_2").splitlines()
    theirs = thesis_loss_at("fig6_2", 3000)
    assert table[2:] == [
        f"| KFAC | 50.2, stopped at 375 | 8 | 9, diverged | {theirs['kfac']:.3g} |",
        f"| ACP, heuristic α | 7.25 | 7.25 | 9, diverged (it is the same) | {theirs['acp']:.3g} |",
        "| updated backpropagation | diverged | 8 | 9, diverged |  |",
        f"| NNN |  | 7 | 9, diverged | {theirs['nnn2']:.3g} |",
    ]


# Learning rates

RATES = [0.01, 0.1, 1.0, 10.0, 100.0]
LAST = {
    "kfac": [[30.0, 30.0], [11.0, 12.0], [10.0, 10.0], [40.0, None], [11.0, 11.0]],
    "kfac_bounded": [[None, 9.0], [9.0, 9.0], [9.0, 8.0], [8.0, 8.0], [8.0, 9.0]],
}


@pytest.fixture
def sweep(record):
    runs = []
    for (method, rows), seed in product(LAST.items(), (0, 1)):
        for lr, losses in zip(RATES, rows, strict=True):
            last = losses[seed]
            run = {**record["runs"][0], "method": method, "seed": seed, "settings": {"lr": lr, "scale": 3.0}}
            run |= {"train": [50.0, last], "update": [0, 300], "status": "finished"}
            runs.append(
                run | ({"train": [50.0], "update": [0], "status": "diverged"} if last is None else {})
            )
    settings = {**record["settings"], "updates": 300}
    return {"experiment": "learning_rates", "settings": settings, "runs": runs[::-1]}


def test_good_learning_rates_are_those_next_to_the_best_without_a_gap(sweep):
    found = good_learning_rates(sweep, "kfac")
    assert found == {"lr": 1.0, "loss": 10.0, "low": 0.1, "high": 1.0, "decades": pytest.approx(1)}
    bounded = good_learning_rates(sweep, "kfac_bounded")
    assert (bounded["lr"], bounded["low"], bounded["high"]) == (10.0, 0.1, 100.0)
    assert good_learning_rates(sweep, "kfac", margin=0.1)["low"] == 1.0
    table = learning_rate_table(sweep).splitlines()
    assert table[-1] == "| KFAC | 2 | 10 | 1 | 0.1 to 1 | 1.0 |"


def test_a_method_that_diverges_at_every_rate_has_no_good_one(sweep):
    for run in sweep["runs"]:
        if (run["method"], run["seed"]) == ("kfac", 1):
            run |= {"train": [50.0], "update": [0], "status": "diverged"}
    found = good_learning_rates(sweep, "kfac")
    assert found.pop("loss") == math.inf
    assert all(map(math.isnan, found.values()))
    assert learning_rate_table(sweep).splitlines()[-1] == "| KFAC | 2 | diverged at every λ | | | |"
    assert "KFAC none" in by_learning_rate(sweep).layout.meta["alt"]


def test_losses_by_learning_rate_have_no_point_where_a_seed_diverged(sweep):
    drawn = by_learning_rate(sweep)
    line, dots = (trace for trace in drawn.data if trace.name == "KFAC")
    assert list(line.x) == [0.01, 0.1, 1.0, 100.0]
    assert list(line.y) == [30.0, 11.5, 10.0, 11.0]
    assert set(line.x) < set(dots.x)
    assert dots.mode == "markers"
    assert "KFAC 10 at 1" in drawn.layout.meta["alt"]
