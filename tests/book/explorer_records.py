"""Small records of the final format, and one explorer of each kind made from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lab.explorers import (
    Explorer,
    damping_and_alpha,
    hyperparameter_interaction,
    kfac_damping,
    live_landscape,
    race,
    regression_line,
    search_replay,
    second_order_by_eye,
    whitening_by_hand,
)
from lab.explorers.landscape import record_landscape

DOMAIN = {"lr": [0.001, 10.0], "scale": [1.0, 1000.0]}
COSTS = {"acp": 13.3, "kfac": 24.4, "kfac_nat": 25.0, "standard_sgd": 5.3}


def search(method="standard_sgd", sampler="random", seed=0, count=12, updates=400, domain=DOMAIN) -> dict:
    """A search whose loss has a valley, and which diverges where the learning rate is large."""
    rng = np.random.default_rng([seed, len(sampler), len(method)])
    columns = {k: (10 ** rng.uniform(*np.log10(ends), count)).round(6).tolist() for k, ends in domain.items()}
    losses = []
    for lr, scale in zip(columns["lr"], columns["scale"], strict=True):
        height = 10 + 20 * (math.log10(scale) - math.log10(lr) - 2.5) ** 2 + 4000 / updates
        losses.append(None if lr > 3 else round(height, 4))
    trials = {**columns, "loss": losses, "second": [1.0] * count, "seed": list(range(count))}
    return {
        "method": method,
        "domain": domain,
        "updates": updates,
        "evaluate_on": 400,
        "sampler": sampler,
        "seed": seed,
        "trials": trials,
    }


def halved(run: dict) -> dict:
    """The same search, whose trials of odd number were stopped halfway."""
    ends = [
        None if loss is None else run["updates"] // (1 + i % 2)
        for i, loss in enumerate(run["trials"]["loss"])
    ]
    return {**run, "trials": {**run["trials"], "update": ends}}


def search_record(*runs: dict) -> dict:
    """The content of a record of searches."""
    return {"format": 1, "experiment": "searches", "settings": {}, "runs": list(runs)}


def curves_record(clock: bool = True, points: int = 20, seeds: int = 2) -> dict:
    """The content of a record of learning curves; KFAC is best by update and dear."""
    update = np.unique(np.r_[0, np.geomspace(1, 2000, points - 1).round()]).astype(int).tolist()
    runs = []
    for i, (method, cost) in enumerate(COSTS.items()):
        rate = (2.0, 6.0, 5.0, 1.0)[i]
        for seed in range(seeds):
            train = [200 / (1 + rate * u / 20) ** 0.8 * (1 + 0.01 * seed) for u in update]
            run = {"method": method, "seed": seed, "settings": {"lr": 0.1}, "update": update, "train": train}
            run |= {"second": [cost * u / 1000 for u in update], "test": [1.2 * v for v in train]}
            runs.append({**run, "train_error": [], "test_error": [], "status": "finished", "reason": ""})
    record = {"format": 1, "experiment": "curves", "settings": {"updates": 2000}, "runs": runs}
    rows = [{"method": m, "update_ms": ms, "refresh_ms": 0.0} for m, ms in COSTS.items()]
    return {**record, "clock": {"rounds": 30, "rows": rows}} if clock else record


def _interaction() -> Explorer:
    damped = {**DOMAIN, "damping": [0.001, 1.0]}
    budgets = [
        search_record(
            search(updates=updates, count=count),
            halved(search("acp", updates=updates, count=count, domain=damped)),
        )
        for updates, count in ((400, 12), (4000, 9))
    ]
    return hyperparameter_interaction(*budgets)


def _replay() -> Explorer:
    samplers = ("grid", "random", "biased")
    return search_replay(search_record(*(search(sampler=s, seed=n) for n in range(2) for s in samplers)))


LANDSCAPE = {
    "methods": ["standard_sgd", "acp", "kfac"],
    "damping": [0.001, 1.0],
    "batch": [20, 50],
    "updates": [2, 4],
    "lr": [0.1, 1.0, 10.0],
    "scale": [2.0, 16.0],
    "evaluate_on": 50,
    "seed": 0,
}


def _landscape() -> Explorer:
    """Trained here, so that the live view shows the same."""
    with TemporaryDirectory() as folder:
        return live_landscape(record_landscape(Path(folder, "landscape.json"), LANDSCAPE))


EXPLORERS: dict[str, Callable[[], Explorer]] = {
    "second_order": second_order_by_eye,
    "damping": damping_and_alpha,
    "regression": regression_line,
    "kfac": lambda: kfac_damping(np.logspace(1, -2, 6), np.logspace(0, -3, 4)),
    "whitening": whitening_by_hand,
    "interaction": _interaction,
    "race": lambda: race(curves_record(), "fig6_2"),
    "replay": _replay,
    "landscape": _landscape,
}


@cache
def explorer(name: str) -> Explorer:
    """One of them, made once."""
    return EXPLORERS[name]()


def some_states(found: Explorer, number: int) -> list[dict[str, int]]:
    """Random states, always the same."""
    rng = np.random.default_rng(0)
    return [{c.name: int(rng.integers(len(c.words))) for c in found.controls.values()} for _ in range(number)]


def plain(node):
    """What JSON makes of a picture: lists for arrays, ``None`` for what is not finite."""
    if isinstance(node, np.ndarray | np.generic):
        return plain(node.tolist())
    if isinstance(node, float):
        return node if math.isfinite(node) else None
    if isinstance(node, list | tuple):
        return [plain(v) for v in node]
    return {k: plain(v) for k, v in node.items()} if isinstance(node, dict) else node
