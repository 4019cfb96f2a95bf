"""Convolutions and a recurrent cell, every optimizer searched alike.

A small convolutional network, and a recurrent one that reads a digit row by row, whose cell is an
``nn.Linear`` used eight times. ``python -m lab study architectures`` searches SGD, Adam, ACP and KFAC by as
many lines each, as text, in the ordinary loop of :func:`lab.out_of_the_box.fit`, and runs the best from ten
other seeds (:mod:`lab.trials`). Lines and rule come from a pilot with another seed.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from lab.out_of_the_box import Examples, Task, fit
from lab.plotting import figure, style
from lab.trials import FEW_SEEDS, SEARCH_SEEDS, SEEDS, Study, number, paired, tuned
from sogrid.experiments.grid import pooled_digits

__all__ = ["ARCHITECTURES", "LINES", "TASKS", "Cell", "curves", "ends", "verdict"]

UPDATES, FEW = 60, SEEDS[:10]


@cache
def digits() -> Examples:
    """(variant, pixels ``[n, 64]``, classes) of the digits at 8 × 8 pixels."""
    task = pooled_digits()
    return task.data.variant, task.train[0], task.data.train[1]


def convolutions() -> nn.Module:
    """Two convolutions with a pooling each, and a linear layer."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )


class Cell(nn.Module):
    """A recurrent network that is written out: state ← tanh of a linear layer of row and state, then scores.

    Args:
        width: Of the state.
    """

    def __init__(self, width: int = 24) -> None:
        """See the class."""
        super().__init__()
        self.width, self.cell, self.scores = width, nn.Linear(8 + width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 64]``, row by row, to scores ``[n, 10]``."""
        state = x.new_zeros(len(x), self.width)
        for row in x.unflatten(-1, (8, 8)).unbind(-2):
            state = self.cell(torch.cat([row, state], -1)).tanh()
        return self.scores(state)


TASKS = {
    "convolutions": Task("digits, convolutions", digits, convolutions),
    "recurrent": Task("digits row by row, recurrent", digits, Cell),
}

_BOUNDED = list(product((0.03, 0.06, 0.12), (0.03, 0.3)))
LINES = {
    "standard_sgd": [
        f"torch.optim.SGD(model.parameters(), lr={lr:g}, momentum={m:g})"
        for lr, m in product((0.05, 0.1, 0.3), (0, 0.9))
    ],
    "adam": [
        f"torch.optim.Adam(model.parameters(), lr={lr:g}, betas=({beta:g}, 0.999))"
        for lr, beta in product((0.012, 0.024, 0.048), (0.5, 0.9))
    ],
    "acp_bounded": [f"ACP(model, lr=10.0, max_change={k:g}, damping={d:g})" for k, d in _BOUNDED],
    "kfac_bounded": [
        f"KFAC(model, lr=10.0, max_change={k:g}, damping={d:g}, loss=loss)" for k, d in _BOUNDED
    ],
}
"""Six of each, by the look of their curves."""


def trained(
    task: str, method: str, updates: int = UPDATES, tried: int | None = None, **seeds: Any
) -> dict[str, Any]:
    """What became of a method on a task, of so many of its lines; an entry of the record."""

    def run(settings: list[dict[str, str]], own: list[int]) -> list[dict[str, Any]]:
        runs = [fit(TASKS[task], s["line"], seed, updates) for s, seed in zip(settings, own, strict=True)]
        for one in runs:
            one["loss"] = one["train"][-1] if one["status"] == "finished" else None
            one["train"] = [float(f"{v:.4g}") for v in one["train"]]
        return runs

    return tuned(run, [{"line": line} for line in LINES[method][:tried]], **{"seeds": FEW, **seeds}).entry()


ARCHITECTURES = Study(
    "architectures",
    {"lines": LINES, "updates": UPDATES, "seeds": FEW, "search_seeds": SEARCH_SEEDS},
    [{"task": task, "method": method} for task in TASKS for method in LINES],
    trained,
    few={"updates": 2, "tried": 2, **FEW_SEEDS},
)
"""A part for every task and method."""


def ends(content: dict[str, Any], task: str) -> dict[str, list[float]]:
    """Last training losses by method, one for each seed."""
    return {
        run["method"]: [number(one["loss"]) for one in run["runs"]]
        for run in content["runs"]
        if run["task"] == task
    }


def verdict(content: dict[str, Any], task: str, method: str) -> str:
    """Who is ahead, a method or Adam, by a one-sided paired test; in words."""
    losses = ends(content, task)
    sign, ratio, p = paired(losses[method], losses["adam"], sided=1)
    told = {1: "ahead of Adam", -1: "behind Adam", 0: "no difference from Adam shown"}[sign]
    return f"{told} (Adam's loss is {ratio:.2f} times as large, p = {p:.1g})"


def curves(content: dict[str, Any]) -> go.Figure:
    """The training loss by update, a panel for each task, a line for each seed."""
    traces, layout, words = [], {}, []
    for i, (name, task) in enumerate(TASKS.items()):
        number_, low, high = "" if i == 0 else str(i + 1), [], []
        for run in (run for run in content["runs"] if run["task"] == name):
            look, last = style(run["method"]), []
            for k, one in enumerate(run["runs"]):
                axes = {"xaxis": f"x{number_}", "yaxis": f"y{number_}", "showlegend": i == k == 0}
                line = {**look, "line": {**look["line"], "width": 1}}
                traces.append(go.Scatter(x=one["update"], y=one["train"], mode="lines", **line, **axes))
                last.append("diverged" if one["loss"] is None else f"{one['loss']:.3g}")
                low.append(min(one["train"]))
                high.append(one["train"][0])
            words.append(f"{task.title}, {look['name']}: {', '.join(last)}")
        left = 0.58 * i
        title = {"title": "<br>".join(["update", *wrap(task.title, 18)]), "type": "linear"}
        layout[f"xaxis{number_}"] = {**title, "domain": [left, left + 0.42], "anchor": f"y{number_}"}
        layout[f"yaxis{number_}"] = {
            **{"type": "log", "dtick": "D2", "anchor": f"x{number_}"},
            **{"range": [math.log10(0.8 * min(low)), math.log10(1.3 * max(high))]},
        }
    alt = "Training loss by update; the last losses, by seed. " + "; ".join(words)
    return figure(traces, alt=alt, height=440, **layout)
