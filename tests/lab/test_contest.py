"""The contest of 2026: who takes part, at what domain, and what its rules say of a record."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from scipy.stats import ttest_ind

from lab import cli
from lab import contest as contest_module
from lab.contest import (
    BOUNDED,
    METHODS,
    PACKAGE,
    PACKAGED,
    RATES,
    SCALES,
    Scale,
    _plan,
    _theirs,
    prices,
    times,
    verdict,
)
from sogrid.experiments.benchmarks import Task
from sogrid.experiments.records import RESULTS, Record, RecordError
from sogrid.experiments.training import run
from sogrid.experiments.tuning import chosen
from sogrid.losses import Quadratic
from sogrid.networks import MLP


@pytest.fixture(scope="module")
def task():
    x = torch.rand(300, 12, generator=torch.Generator().manual_seed(0))
    build = lambda **options: MLP([12, 6, 12], "sigmoid", "sigmoid", **options)  # noqa: E731
    return Task("tiny", None, (x, x), (x[:20], x[:20]), build, Quadratic())


DECADES = {"lr": 3, "damping": 3, "max_change": 2, "friction": 1.5, "scale": 1.5}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_trials_and_ranges_as_wide(method):
    plan = _plan(method)
    assert (plan.trials, plan.updates, plan.target) == (40, 2000, 18.9)
    assert set(plan.domain) == {*METHODS[method].settings, "scale"}
    for name, (low, high) in plan.domain.items():
        assert math.log10(high / low) == pytest.approx(DECADES[name], abs=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_given_what_was_searched(task, method):
    if method in PACKAGED:
        pytest.importorskip(PACKAGE, reason="needs the packages of `make bench`")
    settings = {name: math.sqrt(low * high) for name, (low, high) in _plan(method).domain.items()}
    settings["scale"] = 4.0
    options = {"updates": 4, "points": [0, 4], "evaluate_on": 100, "progress": None}
    found = run(task, method, settings, seed=1, methods=METHODS, **options)
    assert found["status"] == "finished"
    assert found["train"][1] != found["train"][0]
    model, optimizer = METHODS[method].build(task, settings, torch.Generator().manual_seed(0))
    group = optimizer.param_groups[0]
    momentum = group["momentum"] if "momentum" in group else group.get("betas", (0.0,))[0]
    assert momentum == pytest.approx(1 - settings.get("friction", 1.0))
    if method in RATES:
        assert group["lr"] == pytest.approx(settings["lr"])
    if set(BOUNDED) <= set(settings):
        assert group["lr"] == 10
        assert [group[name] for name in ("damping", "max_change")] == [
            settings[name] for name in ("damping", "max_change")
        ]


def test_what_is_missing_is_said_before_hours_are_spent(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    monkeypatch.setattr(contest_module, "_task", None)
    for method in PACKAGED:
        with pytest.raises(ModuleNotFoundError, match=PACKAGE):
            contest_module.contest(methods=[method], out=tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"methods": ("adagrad",)}, {"methods": "acp"}, {"seeds": (401, 5)}], ids=str
)
def test_who_is_not_known_is_refused(wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(contest_module, "_task", None)
    with pytest.raises(ValueError, match=f"every {next(iter(wrong))[:-1]} must be one of"):
        contest_module.contest(**wrong, out=tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--methods", "adagrad"],
        ["--seeds", "1"],
        ["--methods", "soap"],
        ["--methods", "sgd", "shampoo"],
        ["--methods", "acp", "--clock"],
    ],
    ids=lambda words: words[-1],
)
def test_the_command_line_refuses(wrong, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(SystemExit):
        cli.main(["contest", *wrong])
    assert wrong[-1] in capsys.readouterr().err


def test_two_betas_are_for_those_who_have_them():
    model = torch.nn.Linear(2, 2)
    adam = _theirs(torch.optim.AdamW, 0.99)(model, None, {"lr": 0.1, "friction": 0.25})
    assert adam.param_groups[0]["betas"] == (0.75, 0.99)


TARGET, UPDATES = SCALES["laptop"].target, SCALES["laptop"].updates


def record(ends, cost=None):
    """Curves that halve the loss from 40 to 20 at update 10 and are at the target at the updates given."""
    runs = []
    for method, updates in ends.items():
        for seed, end in enumerate(updates):
            at = {0: 80.0, 10: 40.0, UPDATES if end is None else end: 40.0 if end is None else TARGET}
            curve = {"update": list(at), "train": list(at.values())}
            runs.append({"part": "run", "method": method, "seed": seed, **curve})
    rows = [{"method": method, "update_ms": ms} for method, ms in (cost or {}).items()]
    settings = {"target": TARGET, "updates": [500, UPDATES]}
    return {"settings": settings, "runs": runs, "clock": {"rows": rows}}


def test_who_is_sooner_is_a_one_sided_test_of_all_seeds():
    ends = {"acp": [100, 110, 120, 105], "muon": [150, 160, 140, 155], "sgd": [1500, None, 1700, 1600]}
    content = record(ends, {"acp": 40.0, "muon": 20.0, "muon float32": 19.0, "sgd": 10.0})
    assert times(content, "acp", TARGET) == pytest.approx(ends["acp"])
    assert times(content, "sgd", TARGET)[1] is None
    ours, theirs = (torch.tensor(ends[m], dtype=torch.float64).log() for m in ("acp", "muon"))
    expected = ttest_ind(ours, theirs, equal_var=False, alternative="less").pvalue
    assert verdict(content, "acp", "muon") == pytest.approx(expected)
    assert verdict(content, "acp", "muon") < 0.01 < verdict(content, "muon", "acp")
    assert verdict(content, "sgd", "acp") == 1.0
    assert verdict(content, "acp", "sgd") < 1e-3
    assert prices(content)["muon"] == pytest.approx(0.019)
    assert verdict(content, "acp", "muon", seconds=True) > 0.99


def test_all_go_as_far_and_those_who_are_late_go_on():
    soon, late = (contest_module._Until(TARGET, 500) for _ in range(2))
    assert all(soon(update, loss) for update, loss in ((10, 30.0), (90, 18.0), (400, 20.0)))
    assert not soon(500, 20.0)
    assert all(late(update, 30.0) for update in (400, 500, 1900))
    assert not late(1950, 18.9)


def test_what_was_made_is_not_made_again(task, tmp_path, monkeypatch):
    monkeypatch.setattr(contest_module, "_task", lambda *smoke: task)
    monkeypatch.setitem(SCALES, "laptop", Scale(1e-9, 16, trials=2, evaluate_on=50, seeds=(1, 2), longest=20))
    options = {"methods": ["sgd", "acp"], "out": tmp_path / "new", "progress": False}
    first = contest_module.contest(seeds=[1, 2], **options)
    assert [(r["part"], r["method"]) for r in first["runs"]] == [
        *(("search", m) for m in options["methods"]),
        *(("run", m) for _ in range(2) for m in options["methods"]),
        *(("longer", m) for m in options["methods"]),
    ]
    for method in options["methods"]:  # the longer run is the first seed's, and goes on
        of_seed_1, longer = (contest_module.runs(first, method, part)[0] for part in ("run", "longer"))
        assert (of_seed_1["update"][-1], longer["update"][-1], longer["seed"]) == (16, 20, 1)
        common = dict(zip(longer["update"], longer["train"], strict=True)).items()
        common &= dict(zip(of_seed_1["update"], of_seed_1["train"], strict=True)).items()
        assert len(common) > 2
    monkeypatch.setattr(contest_module, "run", None)
    monkeypatch.setattr(contest_module, "search", None)
    assert contest_module.contest(seeds=[1, 2], **options) == first
    rows = contest_module.clock(out=options["out"], rounds=2, progress=False)
    assert [row["method"] for row in rows] == ["sgd", "acp"]
    with pytest.raises(RecordError, match="nothing to time"):
        contest_module.clock(out=tmp_path / "empty", progress=False)
    scale = SCALES["laptop"]
    for other, rates in (
        (replace(scale, finalists=1), RATES["sgd"]),
        (replace(scale, halvings=2), RATES["sgd"]),
        (scale, (1e-6, 1e-3)),
    ):
        monkeypatch.setitem(SCALES, "laptop", other)
        monkeypatch.setitem(RATES, "sgd", rates)
        with pytest.raises(RecordError, match="a search of sgd by other rules"):
            contest_module.contest(seeds=[1], **options)


def test_a_longer_run_by_other_rules_is_refused(task, tmp_path, monkeypatch):
    monkeypatch.setattr(contest_module, "_task", lambda *smoke: task)
    scale = Scale(1e-9, 16, 2, trials=1, halvings=1, evaluate_on=50, seeds=(1,), later=(100.0,), longest=20)
    monkeypatch.setitem(SCALES, "laptop", scale)
    options = {"methods": ["sgd"], "out": tmp_path, "progress": False}
    contest_module.contest(seeds=[1], **options)
    for other in (replace(scale, later=(100.0, 1e-9)), replace(scale, later=(1e-9,), longest=30)):
        monkeypatch.setitem(SCALES, "laptop", other)
        with pytest.raises(RecordError, match="a longer run of sgd by other rules: move it away"):
            contest_module.contest(seeds=[1], **options)


@pytest.fixture
def whole():
    """Ten seeds of four methods; SGD is late, and AdamW misses the target from one seed."""
    ends = {"acp": range(90, 100), "muon": range(130, 140), "sgd": range(1500, 1510)}
    ends["adamw"] = [None, *range(501, 510)]
    return record(ends, {"acp": 40.0, "muon": 80.0, "sgd": 10.0, "adamw": 20.0, "kfac": 1.0})


def test_those_who_have_run_from_every_seed_take_part_the_soonest_first(whole):
    assert contest_module.taking_part(whole) == ["acp", "muon", "sgd", "adamw"]
    whole["clock"]["rows"].pop()
    prices(whole)
    whole["clock"]["rows"].pop()
    with pytest.raises(RecordError, match="no prices of adamw: run python -m lab contest --clock"):
        contest_module.dots(whole, seconds=True)
    whole["runs"].pop(0)
    assert contest_module.taking_part(whole) == ["muon", "sgd", "adamw"]


def test_of_workers_that_share_the_seeds_nobody_takes_part_before_all_are_there(whole):
    whole["runs"] = [run for run in whole["runs"] if (run["method"] == "acp") == (run["seed"] < 5)]
    assert contest_module.taking_part(whole) == []


def test_who_is_there_at_once_is_the_soonest():
    content = record({"acp": [5, 5], "sgd": [100, 200]})
    for run_ in contest_module.runs(content, "acp"):
        run_["train"][0] = 1.0
    assert contest_module.taking_part(content) == ["acp", "sgd"]
    assert verdict(content, "acp", "sgd") < 0.5


def test_what_is_not_there_yet_has_words_or_no_cell(whole):
    del whole["clock"]
    for look in (contest_module.report, contest_module.later):
        with pytest.raises(RecordError, match="no prices of sgd, acp, muon, adamw"):
            look(whole)
    one = record({"acp": [90], "muon": [130]}, {"acp": 40.0, "muon": 80.0})
    assert contest_module.report(one)[1:] == [
        ("ACP", "90", "", "", "diverged", "1", "1"),
        ("Muon", "130", "", "", "diverged", "", ""),
    ]
    one["runs"].append({"part": "longer", "method": "acp", "update": [], "train": []})
    assert contest_module.later(one)[1] == ("ACP", "–", "–", "–", "diverged")


def test_the_table_has_means_prices_and_tests(whole):
    rows = {row[0]: row[1:] for row in contest_module.report(whole)}
    assert rows["ACP"][:3] == ("94 ± 3", "4.00", f"{1504.5 * 10 / (94.5 * 40):.1f} times")
    assert rows["ACP"][4:] == ("< 10⁻⁹", "< 10⁻⁹")
    assert rows["AdamW"][0] == "1 of 10 lost"
    assert rows["AdamW"][2] == ""
    assert rows["AdamW"][4:] == ("1", "1")
    assert rows["Muon"][4:] == ("", "")


def test_later_losses_are_of_the_one_run_that_goes_on(whole):
    assert len(contest_module.later(whole)) == 1  # the head: nobody has gone on
    losses = {
        "acp": [80.0, 40.0, 5.0, 6.0],
        "sgd": [80.0, 40.0, 20.0, 10.0],
        "muon": [80.0, 40.0, 20.0, 20.0],
    }
    for method, train in losses.items():
        whole["runs"].append(
            {"part": "longer", "method": method, "update": [0, 100, 1000, 4000], "train": train}
        )
    to_10 = 100 * 10 ** (2 / 3)  # two of the three halvings from 40 to 5
    assert {row[0]: row[1:] for row in contest_module.later(whole)[1:]} == {
        "ACP": (f"{to_10:.0f} ({4000 / (4 * to_10):.1f} ×)", "1,000", "–", "5"),
        "Muon": ("–", "–", "–", "20"),
        "SGD": ("4,000", "–", "–", "10"),
    }
    assert contest_module.report(whole)[1][1] == "94 ± 3"  # which is no seed of the others


@pytest.mark.parametrize("seconds", [False, True])
def test_every_seed_is_a_dot_and_a_mean_needs_all(whole, seconds):
    found = contest_module.dots(whole, seconds=seconds)
    dots = {t.name: t.x for t in found.data if len(t.x) > 1}
    assert {name: len(x) for name, x in dots.items()} == {"ACP": 10, "Muon": 10, "SGD": 10, "AdamW": 9}
    assert min(dots["ACP"]) == pytest.approx(90 * (0.04 if seconds else 1))
    assert {t.name for t in found.data if len(t.x) == 1} == {"ACP, mean", "Muon, mean", "SGD, mean"}
    assert "AdamW not from every seed" in found.layout.meta["alt"]


def test_every_seed_is_a_curve(whole):
    found = contest_module.curves(whole)
    assert len(found.data) == 40
    assert [t.name for t in found.data if t.showlegend] == ["ACP", "Muon", "SGD", "AdamW"]


@pytest.fixture(scope="module")
def committed():
    return Record.read(RESULTS / "contest.json")


def test_the_record_is_whole_and_no_setting_is_at_an_edge(committed):
    methods = contest_module.taking_part(committed)
    assert {"acp", "kfac", "muon", "sgd"} <= set(methods)
    assert {r["method"] for r in committed["runs"] if r["part"] == "run"} == set(methods)
    assert set(methods) <= set(prices(committed))
    for method in methods:
        found = next(r for r in committed["runs"] if r["part"] == "search" and r["method"] == method)
        assert len(found["trials"]["loss"]) == 40
        assert found["domain"] == {name: list(ends) for name, ends in _plan(method).domain.items()}
        for name, value in chosen(found).items():
            low, high = found["domain"][name]
            assert 1.05 * low < value < high / 1.05
