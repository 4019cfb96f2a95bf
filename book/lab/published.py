"""Beside curves that others published: the autoencoder of *Tensor normal training* (Ren and Goldfarb 2021).

That paper's repository has a notebook with what its five optimizers reached on MNIST after each epoch, every
one tuned by its authors: 784-1000-500-250-30 and back, ReLU with a linear code, cross-entropy summed over
pixels, minibatches of 1,000, no penalty. ``python -m lab study published-autoencoder`` trains the same network
by lines that are written down here, and not searched:

1. Ours come as they are, with the momentum 0.8. That and the fall of the bound were fixed after one pilot of
   ACP, from a seed that is not used here.
2. AdamW has three rates, each from all seeds; the one with the lowest mean is shown, which favours it.
3. What limits a step (the bound of ours, the rate of AdamW) falls linearly, from what the line says to
   nothing at the last epoch. Their rates are constant. That favours us.
4. Initial weights are He's; we do not know theirs. Losses are of all 60,000 and 10,000 images.
"""

from __future__ import annotations

import csv
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab.trials import SEEDS, Study
from sogrid.experiments import data
from sogrid.experiments.benchmarks import Task
from sogrid.experiments.records import RESULTS, Record, provenance
from sogrid.experiments.training import train
from sogrid.losses import BinaryCrossEntropyAtLogits
from sogrid.networks import MLP
from sogrid.optimizers import ACP, KFAC

__all__ = ["LINES", "PUBLISHED", "network", "published", "trained"]

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
FEW = SEEDS[:3]


def network(generator: torch.Generator | None = None) -> MLP:
    """The autoencoder up to its logits; the code layer is linear."""
    model = MLP(SIZES, "relu", init="he", generator=generator)
    model.act4 = nn.Identity()
    return model


def trained(line: str, epochs: int, seed: int, smoke: bool = False) -> dict[str, Any]:
    """One run: the losses after each epoch that is shown; an entry of the record."""
    found = data.load("mnist", **({"source": "embedded", "subset": 200} if smoke else {}))
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
"""A part for every run: three seeds of 20 epochs, and one of ACP and KFAC of 60."""


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
