"""Beside curves that others published: the autoencoder of *Tensor normal training* (Ren and Goldfarb 2021).

That paper's repository has a notebook with what its five optimizers reached on MNIST after each epoch, every
one tuned by its authors: 784-1000-500-250-30 and back, ReLU with a linear code, cross-entropy summed over
pixels, minibatches of 1,000, no penalty. ``python -m lab study published-autoencoder`` trains the same
network by lines that are written down here, and not searched:

1. Ours come as they are, with the momentum 0.8. That and the fall of the bound were fixed after one pilot of
   ACP, from a seed that is not used here.
2. AdamW has three rates, each from all seeds; the one with the lowest mean is shown, which favours it.
3. What limits a step (the bound of ours, the rate of AdamW) falls linearly, from what the line says to
   nothing at the last epoch. Their rates are constant. That favours us.
4. Initial weights are He's; we do not know theirs. Losses are of all 60,000 and 10,000 images.
"""

from __future__ import annotations

import csv
import math
from itertools import count, product
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
import torch
from torch import nn

from lab.plotting import COLORS, figure, style
from lab.trials import SEEDS, Study
from sogrid.experiments import data
from sogrid.experiments.benchmarks import Task
from sogrid.experiments.records import RESULTS, Record, provenance
from sogrid.experiments.training import train, updates_to
from sogrid.losses import BinaryCrossEntropyAtLogits
from sogrid.networks import MLP
from sogrid.optimizers import ACP, KFAC

__all__ = [
    "LINES",
    "PUBLISHED",
    "TARGET",
    "best_line",
    "curves",
    "epochs_to",
    "network",
    "of",
    "published",
    "table",
    "trained",
]

LOSS = BinaryCrossEntropyAtLogits("mean")
BATCH, EPOCHS, LONG = 1_000, 20, 60
SHOWN = (1, 2, 3, 5, 7, 10, 13, 16, 20, 25, 30, 35, 40, 44, 50, 60, 70, 85, 100)
"""Epochs whose ends are looked at, ours and theirs."""
SIZES = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
LINES = {
    "acp_bounded": ["ACP(model, lr=10.0, momentum=0.8, gradients='factored')"],
    "kfac_bounded": ["KFAC(model, lr=10.0, momentum=0.8, gradients='factored', loss=loss)"],
    "adam": [f"torch.optim.AdamW(model.parameters(), lr={lr:g})" for lr in (3e-4, 1e-3, 3e-3)],
}
NAMES = {"acp_bounded": "ACP", "kfac_bounded": "KFAC", "adam": "AdamW"}
FEW = SEEDS[:3]
TARGET = 57.0
"""The training loss that the paper's own method has after 44 epochs."""
THEIRS = {"TNT": "dash", "Shampoo": "dot", "KFAC": "dashdot", "Adam": "longdash", "SGD-m": "longdashdot"}
"""The published algorithms, best first, and the dashes of their curves."""


def network(generator: torch.Generator | None = None) -> MLP:
    """The autoencoder up to its logits; the code layer is linear."""
    model = MLP(SIZES, "relu", init="he", generator=generator)
    model.act4 = nn.Identity()
    return model


def trained(line: str, epochs: int, seed: int, smoke: bool = False) -> dict[str, Any]:
    """One run: the losses after each epoch that is shown; an entry of the record."""
    few = {"source": "embedded", "subset": 50}
    found = data.load("mnist", **few) if smoke else data.load_whole("mnist")
    task = Task("published_autoencoder", found, (found.train[0],) * 2, (found.test[0],) * 2, network, LOSS)
    batch = 50 if smoke else BATCH
    each = len(found.train[0]) // batch
    model = network(torch.Generator().manual_seed(seed))
    optimizer = eval(line, {"torch": torch, "ACP": ACP, "KFAC": KFAC, "model": model, "loss": LOSS})
    _fall(optimizer, epochs * each)
    points = [epoch * each for epoch in SHOWN if epoch <= epochs]
    options = {"updates": epochs * each, "points": points, "seed": seed, "batch": batch}
    curve = train(model, optimizer, task, evaluate_on=len(found.train[0]), **options)
    return {
        "epoch": [update // each for update in curve.update],
        "train": [round(value, 4) for value in curve.train],
        "test": [round(value, 4) for value in curve.test],
        "second": [round(value, 1) for value in curve.second],
        "status": curve.status,
        "data": found.variant,
        "provenance": provenance(),
    }


def _fall(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Let what limits a step go down linearly, to nothing after the last update."""
    groups, done = optimizer.param_groups, count(1)
    name = "max_change" if "max_change" in groups[0] else "lr"
    first = [group[name] for group in groups]

    def after_step(*_: Any) -> None:
        share = 1 - next(done) / updates
        for group, value in zip(groups, first, strict=True):
            group[name] = value * max(share, 1e-9)  # a bound is positive

    optimizer.register_step_post_hook(after_step)


PUBLISHED = Study(
    "published_autoencoder",
    {"lines": LINES, "epochs": [EPOCHS, LONG], "batch": BATCH, "seeds": FEW},
    [
        {"line": line, "epochs": epochs, "seed": seed}
        for epochs, method in product((EPOCHS, LONG), LINES)
        for line in LINES[method]
        for seed in (FEW if epochs == EPOCHS else FEW[:1] if method != "adam" else ())
    ],
    trained,
    few={"smoke": True},
)
"""A part for every run, three seeds of 20 epochs each and one of ACP and KFAC of 60."""


def published(file: str | Path, out: str | Path = RESULTS) -> dict[str, Any]:
    """Keep of the published points those that are shown, as the record ``published_curves.json``.

    Args:
        file: A CSV file of facts read off public notebooks: source, dataset, algorithm, lr, damping, epoch,
            seconds, train, test.
        out: Folder of the record.
    """
    with Path(file).open() as lines:
        rows = [r for r in csv.DictReader(lines) if (r["source"], r["dataset"]) == ("TNT demo", "MNIST")]
    settings = {"source": "Ren and Goldfarb 2021, the MNIST notebook of its repository", "batch": BATCH}
    record = Record(Path(out) / "published_curves.json", "published_curves", settings)
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        own = [row for row in rows if row["algorithm"] == name and float(row["epoch"]) in SHOWN]
        key = {"algorithm": name, "lr": own[0]["lr"], "damping": own[0]["damping"]}
        run = {"epoch": [int(float(row["epoch"])) for row in own]}
        run |= {kind: [float(row[kind]) for row in own] for kind in ("train", "test")}
        run["best_test"] = min(float(row["test"]) for row in rows if row["algorithm"] == name)
        record.add({**key, **run}, once=key)
    return record.content


def best_line(content: dict[str, Any], method: str) -> str:
    """That of a method's lines whose mean loss over the seeds is lowest after the short runs."""
    return min(LINES[method], key=lambda line: fmean(map(_end, of(content, line))))


def _end(run: dict[str, Any], part: str = "train") -> float:
    """The last loss; infinite if the run diverged."""
    return run[part][-1] if run["status"] == "finished" else math.inf


def of(content: dict[str, Any], line: str, epochs: int = EPOCHS) -> list[dict[str, Any]]:
    """The runs of a line, one for each seed."""
    return [run for run in content["runs"] if (run["line"], run["epochs"]) == (line, epochs)]


def epochs_to(run: dict[str, Any], loss: float = TARGET) -> int | None:
    """The epoch by whose end a run is at a training loss, between two that are shown by interpolation.

    Example:
        >>> epochs_to({"epoch": [10, 13], "train": [58.0, 56.0]})
        12
    """
    found = updates_to(run["epoch"], run["train"], loss)
    return None if found is None else math.ceil(found)


def curves(content: dict[str, Any], theirs: dict[str, Any], part: str = "train") -> go.Figure:
    """The loss by epoch: ours a line for each run, theirs grey.

    Args:
        content: Our record.
        theirs: The published one.
        part: ``"train"`` or ``"test"``.
    """
    traces, told = [], []
    for run in sorted(theirs["runs"], key=lambda run: [*THEIRS].index(run["algorithm"])):
        name = f"{run['algorithm']}, published"
        line = {"color": COLORS["grey"], "dash": THEIRS[run["algorithm"]], "width": 1.5}
        traces.append(go.Scatter(x=run["epoch"], y=run[part], mode="lines", name=name, line=line))
        told.append(f"{name} {run[part][run['epoch'].index(EPOCHS)]:.1f}")
    for method in LINES:
        line = best_line(content, method)
        look = style(method) | {"name": NAMES[method], "legendgroup": method, "mode": "lines"}
        runs = of(content, line) + of(content, line, LONG)
        for k, run in enumerate(runs):
            own = {"showlegend": k == 0, "line": {**look["line"], "dash": "solid", "width": 1.5}}
            traces.append(go.Scatter(x=run["epoch"], y=run[part], **{**look, **own}))
        ends = (f"{_end(run, part):.1f}" for run in of(content, line))
        told.append(f"{look['name']} {', '.join(ends)}")
    kind = {"train": "training", "test": "test"}[part]
    return figure(
        traces,
        alt=f"The {kind} loss by epoch. After {EPOCHS} epochs: {'; '.join(told)}.",
        xaxis={"title": "epochs", "type": "log", "dtick": "D2"},
        yaxis={"title": f"{kind} loss", "type": "log", "dtick": "D1", "range": [1.7, 2.35]},
        height=440,
    )


def table(content: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table, the first one the head: theirs as published, ours by the means of the seeds."""
    head = ("", f"epochs to {TARGET:g}", f"train at {EPOCHS}", f"test at {EPOCHS}", "lowest test")
    rows = [head]
    for run in sorted(theirs["runs"], key=lambda run: [*THEIRS].index(run["algorithm"])):
        at = run["epoch"].index(EPOCHS)
        there = epochs_to(run)
        losses = [f"{run[part][at]:.1f}" for part in ("train", "test")]
        soon = f"over {run['epoch'][-1]}" if there is None else str(there)
        rows.append((f"{run['algorithm']}, published", soon, *losses, f"{run['best_test']:.2f}"))
    for method in LINES:
        line = best_line(content, method)
        for epochs in (EPOCHS, LONG):
            runs = of(content, line, epochs)
            if runs:
                soon = [epochs_to(run) for run in runs]
                losses = [
                    "diverged"
                    if any(EPOCHS not in run["epoch"] for run in runs)
                    else f"{fmean(run[part][run['epoch'].index(EPOCHS)] for run in runs):.1f}"
                    for part in ("train", "test")
                ]
                lost = any(run["status"] != "finished" for run in runs)
                least = "diverged" if lost else f"{fmean(min(run['test']) for run in runs):.2f}"
                there = "not" if None in soon else ", ".join(map(str, sorted({*soon})))
                rows.append((f"{NAMES[method]}, {epochs} epochs", there, *losses, least))
    return rows
