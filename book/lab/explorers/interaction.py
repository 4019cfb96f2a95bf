"""Hyperparameter interaction (Thesis Figs. 2.2 and 4.1): the trials of searches, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from lab.explorers.core import At, Explorer, First, Short, ring, say, select, short, slider
from lab.plotting import looks
from sogrid.experiments.search import winsorise

__all__ = ["Scale", "cells", "hyperparameter_interaction", "unit"]

AXES = "lr", "scale"
CELLS, WIDTH = 32, 0.07
GOOD, STOPPED, DIVERGED = 0, 100, 4  # plotly's symbols


class Scale:
    """Colours of losses: their common logarithms; diverged runs and outliers are as the worst of the others.

    Args:
        runs: Searches, as records keep them.

    Raises:
        ValueError: If every trial diverged.
    """

    def __init__(self, runs: Sequence[dict[str, Any]]) -> None:
        """See the class."""
        losses = [math.inf if v is None else v for run in runs for v in run["trials"]["loss"]]
        ordinary = winsorise(losses)
        if not ordinary.any():
            raise ValueError("every trial of these searches diverged: there is nothing to show")
        self.low, self.high = np.log10([ordinary.min(), ordinary.max()]).tolist()

    def __call__(self, losses: Sequence[float | None]) -> np.ndarray:
        """Their colours, ``[n]``."""
        logs = np.log10([math.inf if v is None else v for v in losses])
        return np.clip(logs, self.low, self.high)

    def marker(self, color: Any, **look: Any) -> dict[str, Any]:
        """Plotly's marker for trials of these colours."""
        limits = {"cmin": self.low, "cmax": self.high}
        bar = {"colorbar": {"title": {"text": "log₁₀ loss"}, "thickness": 12}}
        return {"color": color, **limits, **bar, **self.colorscale(), **look}

    def colorscale(self) -> dict[str, Any]:
        """Bright is good."""
        return {"colorscale": "Cividis", "reversescale": True}


def unit(values: Sequence[float], domain: Sequence[float]) -> np.ndarray:
    """Places in a domain, from 0 to 1 on a logarithmic scale."""
    low, high = np.log(domain)
    return (np.log(values) - low) / (high - low)


def cells(domain: Sequence[float], count: int = CELLS) -> np.ndarray:
    """Middles of ``count`` cells that fill a domain, in equal parts of a logarithmic scale."""
    low, high = np.log10(domain)
    return 10 ** (low + (high - low) * (np.arange(count) + 0.5) / count)


def hyperparameter_interaction(*records: dict[str, Any], searches: int = 3) -> Explorer:
    """Landscape and trials of searches by learning rate and init scale; the current best is ringed.

    A trial that was stopped on its way is an open circle, and can be best only of those that got no farther.
    What there is only one of has no control: search (method, sampler, seed), updates of a trial, and
    where a third hyperparameter may lie.

    Args:
        records: Contents of records of searches of one benchmark: those of Figs. 2.2 and 4.1, or of
            :func:`~sogrid.experiments.reproduce.tune`; several of them for different numbers of updates.
        searches: So many of a method and sampler, those of the lowest seeds.

    Raises:
        ValueError: If there is no search by learning rate and init scale.
    """
    runs = [run for record in records for run in record["runs"] if {*AXES} <= {*run.get("domain", {})}]
    if not runs:
        raise ValueError("these records hold no search by learning rate and init scale")
    data = _Searches(runs, searches)
    shown = At(np.arange(1, data.count + 1), "shown")
    best, third = data.column("best", "window", "shown"), data.third
    log = {"type": "log", "dtick": 1, "exponentformat": "power"}
    windows = list(map(_words, data.windows))
    return Explorer(
        alt=f"Runs by learning rate and init scale, coloured by loss (crosses diverged), the first so many "
        f"of {data.count}, over the landscape that all runs together show. The best is ringed.",
        controls=[
            select("search", "search", [_name(name, data.names) for name in data.names]),
            slider("budget", "updates of a run", data.budgets, words=[f"{b:,}" for b in data.budgets]),
            slider("window", f"only with {third}", range(len(windows)), 0, words=windows),
            slider("shown", "experiments shown", range(1, data.count + 1)),
        ],
        traces=[
            _background(data),
            _foreground(data, shown),
            ring(At(data.column("lr"), best), At(data.column("scale"), best)),
        ],
        layout={
            "xaxis": {
                "title": {"text": "learning rate λ"},
                "range": np.log10(data.domain["lr"]).tolist(),
                **log,
            },
            "yaxis": {
                "title": {"text": "init scale s"},
                "range": np.log10(data.domain["scale"]).tolist(),
                **log,
            },
            "height": 480,
        },
        text=_sentence(data, shown, best),
    )


class _Searches:
    """Searches as tables: what the picture looks up.

    Attributes:
        halving: Whether trials were stopped on their way.
        names: Method, sampler and seed of each.
        budgets: Updates of a trial.
        third: A hyperparameter beside those of the axes, or ``None``.
        windows: Where it may lie.
        count: Of the trials of the longest search.
    """

    def __init__(self, runs: Sequence[dict[str, Any]], searches: int) -> None:
        self.runs, self.scale, self.domain = runs, Scale(runs), runs[0]["domain"]
        self.budgets = sorted({run["updates"] for run in runs})
        self.halving = any("update" in run["trials"] for run in runs)
        seeds = sorted({run["seed"] for run in runs})[:searches]
        found = {(run["method"], run["sampler"], run["seed"], run["updates"]): run for run in runs}
        self.names = list(dict.fromkeys(key[:3] for key in found if key[2] in seeds))
        third = self.third = next((key for run in runs for key in run["domain"] if key not in AXES), None)
        self.windows = _windows(next((run["domain"][third] for run in runs if third in run["domain"]), None))
        self.count = max(len(run["trials"]["loss"]) for run in runs)
        make = partial(_table, count=self.count, third=third, windows=self.windows, scale=self.scale)
        self.tables = [[make(found.get((*name, budget))) for budget in self.budgets] for name in self.names]

    def column(self, name: str, *by: str) -> At:
        """A column of the search and budget that are chosen."""
        values = np.array([[table[name] for table in row] for row in self.tables])
        return At(values, "search", "budget", *by)


def _background(data: _Searches) -> dict[str, Any]:
    """The landscape of all trials of a method."""
    methods = list(dict.fromkeys(name[0] for name in data.names))
    landscapes = [[_landscape(data.runs, m, b, data.scale) for b in data.budgets] for m in methods]
    of = At(np.array([methods.index(name[0]) for name in data.names]), "search")
    return {
        "type": "heatmap",
        "x": cells(data.domain["lr"]),
        "y": cells(data.domain["scale"]),
        "z": At(np.array(landscapes), of, "budget"),
        "zmin": 0,
        "zmax": 255,
        "showscale": False,
        "opacity": 0.45,
        "hoverinfo": "skip",
        **data.scale.colorscale(),
    }


def _foreground(data: _Searches, shown: At) -> dict[str, Any]:
    """The first trials, as many as are shown."""
    first = lambda name, *by: First(data.column(name, *by), shown)  # noqa: E731
    third = f", {data.third} %{{customdata[1]:.3g}}" if data.third else ""
    after = " after %{customdata[2]:,} updates" if data.halving else ""
    return {
        "type": "scatter",
        "x": first("lr"),
        "y": first("scale"),
        "customdata": first("custom"),
        "mode": "markers",
        "marker": data.scale.marker(
            first("color"),
            symbol=first("symbol"),
            opacity=first("opacity", "window"),
            size=10,
            line={"width": 1, "color": "#ffffff"},
        ),
        "hovertemplate": f"λ %{{x:.3g}}, s %{{y:.3g}}{third}: loss %{{customdata[0]:.4g}}{after}"
        "<extra></extra>",
        "showlegend": False,
    }


def _sentence(data: _Searches, shown: At, best: At) -> list[Any]:
    at_best = lambda name: Short(At(data.column(name), best))  # noqa: E731
    has_third = data.column("has_third") if data.third else 0
    return say(
        "Best of the first {shown}: loss {loss} with λ {lr}, s {scale}{comma}{third}. {diverged} diverged"
        f"{', {stopped} stopped on the way' if data.halving else ''}.",
        **({"stopped": Short(data.column("stopped", "shown"))} if data.halving else {}),
        shown=Short(shown),
        loss=at_best("loss"),
        lr=at_best("lr"),
        scale=at_best("scale"),
        comma=At(["", f", {data.third} "], has_third),
        third=At(["", at_best("third")], has_third),
        diverged=Short(data.column("diverged", "shown")),
    )


def _table(
    run: dict[str, Any] | None, *, count: int, third: str | None, windows: Sequence[Any], scale: Scale
) -> dict[str, Any]:
    """A search's trials as columns of ``count + 1`` entries; those beyond its own are NaN."""
    trials = run["trials"] if run else {"lr": [], "scale": [], "loss": []}
    length = len(trials["loss"])
    pad = lambda values: np.append(np.asarray(values, dtype=float), [np.nan] * (count + 1 - length))  # noqa: E731
    losses = pad([math.nan if v is None else v for v in trials["loss"]])
    there = np.arange(count + 1) < length
    whole = run["updates"] if run else 0
    ends = pad([whole if end is None else end for end in trials.get("update", [whole] * length)])
    stopped = there & ~np.isnan(losses) & (ends < whole)
    other = pad(trials.get(third, [math.nan] * length))
    inside = [
        np.ones(count + 1, bool) if w is None or third not in trials else (w[0] <= other) & (other <= w[1])
        for w in windows
    ]
    return {
        "lr": pad(trials["lr"]),
        "scale": pad(trials["scale"]),
        "loss": losses,
        "third": other,
        "has_third": int(third in trials),
        "custom": np.stack([losses, other, ends], 1),
        "color": pad(scale(trials["loss"])),
        "symbol": np.where(np.isnan(losses), DIVERGED, np.where(stopped, STOPPED, GOOD)),
        "opacity": [np.where(mask, 1.0, 0.12) for mask in inside],
        "best": [_best(np.where(mask, losses, np.nan)[:count], ends) for mask in inside],
        "diverged": np.cumsum(np.isnan(losses) & there),
        "stopped": np.cumsum(stopped),
    }


def _best(losses: np.ndarray, ends: np.ndarray) -> list[int]:
    """Where the smallest of those that got farthest of the first 1, 2, … is; the length of all if none is."""
    found, places = len(losses), []
    for i, loss in enumerate(losses):
        if not np.isnan(loss) and (found == len(losses) or (-ends[i], loss) < (-ends[found], losses[found])):
            found = i
        places.append(found)
    return places


def _landscape(runs: Sequence[dict[str, Any]], method: str, budget: int, scale: Scale) -> np.ndarray:
    """Colours from 0 to 255 on a grid, ``[scale, lr]``: means of all trials with Gaussian weights."""
    chosen = [run for run in runs if (run["method"], run["updates"]) == (method, budget)]
    if not chosen:
        return np.zeros((CELLS, CELLS), np.uint8)
    colours = np.concatenate([scale(run["trials"]["loss"]) for run in chosen])
    middle = (np.arange(CELLS) + 0.5) / CELLS
    across, up = (
        (middle[:, None] - np.concatenate([unit(run["trials"][axis], run["domain"][axis]) for run in chosen]))
        ** 2
        for axis in AXES
    )
    distance = up[:, None] + across[None]
    weights = np.exp((distance.min(-1, keepdims=True) - distance) / (2 * WIDTH**2))
    mean = (weights @ colours) / weights.sum(-1)
    return (255 * (mean - scale.low) / max(scale.high - scale.low, 1e-9)).round().astype(np.uint8)


def _windows(domain: Sequence[float] | None) -> list[tuple[float, float] | None]:
    """Everything, and each decade of a domain."""
    if domain is None:
        return [None]
    low, high = round(math.log10(domain[0])), round(math.log10(domain[1]))
    return [None, *((10.0**e, 10.0 ** (e + 1)) for e in range(low, high))]


def _words(window: tuple[float, float] | None) -> str:
    return "any" if window is None else f"{short(window[0])} to {short(window[1])}"


def _name(name: tuple[str, str, int], names: Sequence[tuple[str, str, int]]) -> str:
    """Method, sampler and seed of a search, as far as there are several."""
    words = looks(name[0]).name, looks(name[1]).name, f"seed {name[2]}"
    kept = [w for i, w in enumerate(words) if len({other[i] for other in names}) > 1]
    return ", ".join(kept or words[:1])
