"""Beside published curves: the network, how a run is made, and the records."""

from itertools import pairwise
from statistics import fmean

import pytest
import torch
from studies import require_whole
from torch import nn

from lab import published
from lab.published import (
    LINES,
    PUBLISHED,
    SHOWN,
    TARGET,
    best_line,
    curves,
    epochs_to,
    network,
    of,
    table,
    trained,
)
from sogrid.experiments.records import RESULTS, Record
from sogrid.optimizers import ACP

THEIRS = RESULTS / "published_curves.json"


def test_the_network_is_theirs():
    """784-1000-500-250-30 and back; the code is linear, and so is what the loss is given."""
    model = network(torch.Generator().manual_seed(0))
    layers = [m for m in model if isinstance(m, nn.Linear)]
    assert [layer.out_features for layer in layers] == [1000, 500, 250, 30, 250, 500, 1000, 784]
    kinds = [type(m) for m in model if not isinstance(m, nn.Linear)]
    assert kinds == [nn.ReLU, nn.ReLU, nn.ReLU, nn.Identity, nn.ReLU, nn.ReLU, nn.ReLU, nn.Identity]
    x = torch.rand(5, 784)
    assert (published.LOSS.value(model(x), x) > 0).all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda model: ACP(model, lr=10.0), "max_change"),
        (lambda model: torch.optim.AdamW(model.parameters(), lr=0.1), "lr"),
    ],
)
def test_what_limits_a_step_falls_linearly_to_nothing(make, name):
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = make(model)
    first, seen = optimizer.param_groups[0][name], []
    published._fall(optimizer, 5)
    for _ in range(5):
        seen.append(optimizer.param_groups[0][name])
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    assert seen == pytest.approx([first * (1 - k / 5) for k in range(5)])
    assert 0 < optimizer.param_groups[0][name] < 1e-8 * first


@pytest.mark.parametrize("method", LINES)
def test_a_run_is_an_entry_of_a_record(method):
    found = trained(LINES[method][0], 3, 7, smoke=True)
    assert found["epoch"] == [1, 2, 3]
    assert found["train"][-1] < found["train"][0]
    assert found["status"] == "finished"


def test_a_run_that_diverged_makes_no_line_the_best():
    runs = [
        {"line": line, "epochs": 20, "seed": seed, "status": "finished", "epoch": [10, 20]}
        | {part: [70.0, 60.0 + k] for part in ("train", "test")}
        for k, line in enumerate(line for lines in LINES.values() for line in lines)
        for seed in (1, 2)
    ]
    best = best_line({"runs": runs}, "adam")
    (first, _) = of({"runs": runs}, best)
    first |= {"status": "diverged", "epoch": [10], "train": [1.0], "test": [1.0]}
    assert best_line({"runs": runs}, "adam") != best
    (last,) = LINES["acp_bounded"]
    of({"runs": runs}, last)[0].update(first | {"line": last})
    rows = {row[0]: row for row in table({"runs": runs}, {"runs": []})}
    assert rows["ACP, 20 epochs"][2:] == ("diverged", "diverged", "diverged")
    of({"runs": runs}, last)[0].update({"epoch": [], "train": [], "test": []})  # in its first epoch
    assert table({"runs": runs}, {"runs": []}) == [*rows.values()]
    assert "ACP inf" in curves({"runs": runs}, {"runs": []}).layout.meta["alt"]


def test_a_run_that_is_at_the_target_where_it_is_evaluated_is_there():
    for before, at in pairwise(SHOWN):
        assert epochs_to({"epoch": [before, at], "train": [58.0, 57.0]}) == at


def test_what_was_published_is_what_the_field_says_of_it():
    found = {run["algorithm"]: run for run in Record.read(THEIRS)["runs"]}
    soon = {name: epochs_to(run) for name, run in found.items()}
    assert soon == {"TNT": 44, "Shampoo": 76, "KFAC": 97, "Adam": None, "SGD-m": None}
    at = {
        name: [run[part][run["epoch"].index(20)] for part in ("train", "test")] for name, run in found.items()
    }
    assert at["TNT"] == pytest.approx([63.20, 63.68], abs=0.005)
    assert at["KFAC"] == pytest.approx([66.73, 66.60], abs=0.005)
    assert {name: round(run["best_test"], 2) for name, run in found.items()} == {
        "TNT": 56.49, "Shampoo": 56.90, "KFAC": 58.59, "Adam": 62.35, "SGD-m": 65.58,
    }  # fmt: skip


def test_the_record_is_whole():
    ours, theirs = require_whole(PUBLISHED), Record.read(THEIRS)
    for method in LINES:
        best, *_ = sorted(fmean(r["train"][-1] for r in of(ours, line)) for line in LINES[method])
        assert fmean(r["train"][-1] for r in of(ours, best_line(ours, method))) == best
    for part in ("train", "test"):
        figure = curves(ours, theirs, part)
        assert "TNT, published" in figure.layout.meta["alt"]
    head, *rows = table(ours, theirs)
    assert f"{TARGET:g}" in head[1]
    assert len({len(row) for row in rows}) == 1
