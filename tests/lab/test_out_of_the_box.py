"""The README's line on six tasks: the record in the book, what it is judged by, and how it is made."""

import math

import pytest
import torch
from torch import nn

from lab import cli
from lab.out_of_the_box import (
    ADAM,
    LINES,
    SEEDS,
    TASKS,
    Task,
    curves,
    ends,
    fit,
    out_of_the_box,
    prose,
    report,
    verdict,
)
from sogrid.experiments.records import RESULTS, Record, RecordError

README = RESULTS.parents[1] / "README.md"


@pytest.fixture(scope="module")
def record():
    return Record.read(RESULTS / "out_of_the_box.json")


def test_the_record_is_whole_and_of_these_lines(record):
    runs = {(run["task"], run["method"], run["seed"]) for run in record["runs"]}
    assert runs == {(task, method, seed) for task in TASKS for method in LINES for seed in SEEDS}
    assert len(runs) == len(record["runs"])
    assert record["settings"]["lines"] == LINES
    machines = {str(run["provenance"]["machine"]) for run in record["runs"]}
    assert len(machines) == 1
    assert "'threads': 1" in machines.pop()


def test_the_readme_shows_the_lines_that_ran():
    text = README.read_text(encoding="utf-8")
    assert f"optimizer = {LINES['acp_bounded']}  # was: {LINES[ADAM]}\n" in text
    assert f"optimizer = {LINES['kfac_bounded']}\n" in text


@pytest.mark.parametrize("method", ["acp_bounded", "kfac_bounded"])
def test_each_run_of_the_readme_s_lines_ends_at_or_below_adam(record, method):
    """What README and changelog say."""
    assert [verdict(record, task, method) for task in TASKS] == ["holds"] * len(TASKS)


def test_no_run_diverged(record):
    assert all(math.inf not in ends(record, task, method) for task in TASKS for method in LINES)


def made_up(ours, adam):
    """A record of one task."""
    return {
        "runs": [
            {"task": "digits", "method": method, "seed": seed, "train": [9.0, loss or 9.0], "update": [0, 1]}
            | {"status": "finished" if loss else "diverged", "data": {"checksum": "a"}}
            for method, losses in (("acp_bounded", ours), (ADAM, adam))
            for seed, loss in reversed(list(enumerate(losses)))
        ]
    }


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ((1.0, 2.0, 3.0), "holds"),
        ((0.5, 2.5, 1.0), "holds with a caveat"),  # the mean is below, a seed is not
        ((1.0, 2.0, 3.1), "does not hold"),
        ((0.1, 0.1, None), "does not hold"),
    ],
)
def test_the_verdict_is_by_seed(ours, expected):
    record = made_up(ours, (1.0, 2.0, 3.0))
    assert verdict(record, "digits", "acp_bounded") == expected
    (head, row, adam) = report(record)
    assert row[-1] == expected
    assert adam[-1] == ""
    assert row[2] == ", ".join("diverged" if v is None else f"{v:.3g}" for v in ours)


def test_runs_on_other_data_are_not_compared():
    """As an interrupted run on other prose leaves them."""
    record = made_up((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))
    other = {"data": {"checksum": "b"}, "train": [9.0, 8.0]}
    record["runs"] += [run | other for run in record["runs"][:3]]
    assert verdict(record, "digits", "acp_bounded") == "holds"
    assert ends(record, "digits", "acp_bounded") == [1.0, 2.0, 3.0]


def test_a_look_at_the_loss_leaves_a_network_as_it_was():
    """Batch norm has statistics, dropout draws: a loss is of the network in use, and training goes on."""
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    task = Task("digits", TASKS["digits"].examples, lambda: nn.Sequential(Watched(784, 10)))
    fit(task, LINES[ADAM], seed=5, updates=2)
    assert seen == [(False, False), (True, True)] * 2 + [(False, False)]


def small() -> Task:
    return Task("digits", TASKS["digits"].examples, lambda: nn.Sequential(nn.Linear(784, 10)))


def test_a_fit_is_the_ordinary_loop_and_says_why_it_ended():
    """The line is evaluated as it stands; the same seed gives the same run."""
    first, again = (fit(small(), LINES["acp_bounded"], seed=5, updates=3) for _ in range(2))
    assert first == again
    assert first["update"] == [0, 1, 2, 3]
    assert first["status"] == "finished"
    lost = fit(small(), "torch.optim.SGD(model.parameters(), lr=float('inf'))", seed=5, updates=3)
    assert (lost["status"], lost["update"]) == ("diverged", [0])
    assert lost["reason"] == "update 1: the loss is not finite"
    refused = fit(small(), "ACP(model, lr=1e38, max_change=None)", seed=5, updates=3)
    assert refused["status"] == "diverged"


def test_a_record_is_gone_on_with_and_not_mixed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lab.out_of_the_box.EVALUATE_ON", 20)
    options = {"tasks": ("transformer",), "updates": 1, "out": tmp_path, "progress": False}
    content = out_of_the_box(**options, seeds=(1,))
    assert [run["method"] for run in content["runs"]] == list(LINES)
    more = out_of_the_box(**options, seeds=(1, 2))
    assert more["runs"][: len(LINES)] == content["runs"]
    assert len(more["runs"]) == 2 * len(LINES)
    assert "prose, transformer" in curves(more).layout.meta["alt"]
    with pytest.raises(RecordError, match="another settings"):
        out_of_the_box(**(options | {"updates": 2}))
    with pytest.raises(ValueError, match="task must be one of"):
        out_of_the_box(**(options | {"tasks": ("digit",)}))
    command = ["out-of-the-box", "--out", str(tmp_path), "--quiet", "--updates"]
    assert cli.main([*command, "1", "--tasks", "transformer"]) == 0
    assert "at or below Adam" in capsys.readouterr().out
    for wrong, words in ((["0"], "must be 1 or more"), (["1", "--tasks", "digit"], "there are digits,")):
        with pytest.raises(SystemExit):
            cli.main([*command, *wrong])
        assert words in capsys.readouterr().err


def test_the_prose_is_characters_and_those_that_follow():
    _, x, y = prose()
    assert x.flatten()[1:].equal(y.flatten()[:-1])
    assert 0 == x.min() < x.max() < 96
