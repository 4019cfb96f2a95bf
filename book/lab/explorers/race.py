"""Race (Thesis Figs. 5.1, 6.1 to 6.3): methods by update or by second, and what KFAC's updates may cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from lab.explorers.core import At, Explorer, First, Short, select, short, slider, toggle
from lab.figures import by_point, milliseconds, runs_by_method
from lab.plotting import COLORS, looks, style
from sogrid.experiments.benchmarks import METHODS
from sogrid.experiments.reference import thesis_values

__all__ = ["break_even", "race", "seconds_per_update"]

CURVES = {
    "train": ("training loss", ("train_mse", "train_cross_entropy")),
    "test": ("test loss", ("test_mse", "test_cross_entropy")),
    "train_error": ("training error rate", ("train_error",)),
    "test_error": ("test error rate", ("test_error",)),
}
AXES = "update", "second"
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
BUDGETS, PODIUM = 40, 3
PRICED = "kfac", "kfac_nat"
FAINT = {"opacity": 0.25, "showlegend": False, "hoverinfo": "skip"}
SOLID = {"hovertemplate": "%{x:.4g}: %{y:.4g}"}


def seconds_per_update(record: dict[str, Any]) -> dict[str, float]:
    """What an update of each method costs: from the record's clock, or else from how long its runs took."""
    took = {
        method: fmean(run["second"][-1] / max(run["update"][-1], 1) for run in runs if run["update"])
        for method, runs in runs_by_method(record).items()
        if any(run.get("update") for run in runs)
    }
    return took | {method: ms / 1000 for method, ms in milliseconds(record).items()}


def break_even(
    update: np.ndarray, loss: np.ndarray, rivals: Sequence[tuple[np.ndarray, np.ndarray]], budget: float
) -> float:
    """The most seconds that a method's update may cost if it is to lead after a budget; NaN if none are.

    It leads at every lower cost too, as far as it was run, if its loss falls.

    Args:
        update: Where the method was evaluated.
        loss: What it was there.
        rivals: Seconds and losses of the others.
        budget: Seconds.
    """
    goal = min(values[within(second, budget) - 1] for second, values in rivals)
    better = update[np.flatnonzero((loss < goal) & (update > 0))]
    return budget / better[0] if len(better) else math.nan


def within(at: np.ndarray, budget: float) -> int:
    """How many evaluations, the first in any case, are within a budget."""
    return max(1, int(np.searchsorted(at, budget * (1 + 1e-9), side="right")))


def race(record: dict[str, Any], figure_key: str | None = None) -> Explorer:
    """Learning curves up to a budget, medians over the seeds that got there. Axes begin at one.

    Args:
        record: Content of a record of learning curves; seconds are updates times what one costs.
        figure_key: The thesis's figure to set beside it, e.g. ``"fig6_2"``.

    Raises:
        ValueError: If the record holds no learning curves.
    """
    curves = _Curves(record)
    methods, priced, last = curves.methods, curves.priced, [budgets[-1] for budgets in curves.budgets]
    theirs = thesis_values(figure_key) if figure_key else {"methods": [], "curves": {}}
    quoted = [m for m in methods if m in theirs["methods"]]
    words = [[_updates(round(u)) for u in curves.budgets[0]], [f"{short(s)} s" for s in curves.budgets[1]]]
    both = [" · ".join(pair) for pair in zip(*words, strict=True)]
    prices = [_price(s, curves.cost, priced) for s in curves.shares]
    names = [CURVES[c][0] for c in curves.measures]
    return Explorer(
        alt=f"Learning curves of {', '.join(looks(m).name for m in methods)}, by update or by second; solid "
        "up to a budget, and faint beyond it.",
        controls=[
            select("axis", "race by", ["updates", "seconds"], "seconds"),
            select("curve", "measured by", names),
            slider("budget", "budget", range(BUDGETS), words=both),
            slider("cost", "KFAC's cost in time", curves.shares, 1, words=prices),
            *([toggle("thesis", "the thesis's values")] if figure_key else []),
        ],
        traces=[
            *(trace for method in methods for trace in _lines(curves, method)),
            *(_markers(m, curves.measures, theirs["curves"], last[0]) for m in quoted),
        ],
        layout=_layout(curves, names, last),
        text=["After ", At(words, "axis", "budget"), *_ranking(curves), *_verdict(curves)],
    )


class _Curves:
    """A record's learning curves, and when they are where.

    Attributes:
        methods: Those that have curves.
        measures: Keys of ``CURVES`` that all of them have.
        middles: Method → a curve for each measure, a median over seeds.
        update: Method → where it was evaluated.
        cost: Method → seconds of an update.
        priced: Methods whose cost the reader changes.
        shares: To which share of what it is.
        at: Method → ``[axis, share, evaluation]``, in updates and in seconds.
        budgets: By axis, those that the reader has.
        reached: Method → ``[axis, share, budget]``, how many evaluations are within.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        runs = {m: [run for run in of if run.get("train")] for m, of in runs_by_method(record).items()}
        runs = {m: of for m, of in runs.items() if of and m in METHODS}
        if not runs:
            raise ValueError("this record holds no learning curves")
        self.methods, self.cost = list(runs), seconds_per_update(record)
        self.measures = [c for c in CURVES if all(run.get(c) for of in runs.values() for run in of)]
        self.middles = {
            m: [[median(v) for v in by_point(of, c)] for c in self.measures] for m, of in runs.items()
        }
        self.update = {m: np.array([v[0] for v in by_point(of, "update")]) for m, of in runs.items()}
        self.priced = [m for m in PRICED if m in runs]
        self.shares = SHARES if self.priced else (1.0,)
        self.at = {m: self._times(m) for m in self.methods}
        self.budgets = self._budgets()
        self.reached = {
            m: np.array([[[within(x, b) for b in self.budgets[i]] for x in self.at[m][i]] for i in (0, 1)])
            for m in self.methods
        }

    def _times(self, method: str) -> np.ndarray:
        factor = np.array(self.shares if method in self.priced else [1.0] * len(self.shares))[:, None]
        update = self.update[method]
        return np.array([update * np.ones_like(factor), update * self.cost[method] * factor])

    def _budgets(self) -> list[np.ndarray]:
        """From the first evaluation to the end, at the usual cost."""
        usual = [[self.at[m][axis, self.shares.index(1.0)] for m in self.methods] for axis in (0, 1)]
        first = [min(v for times in of for v in times if v > 0) for of in usual]
        last = [max(times[-1] for times in of) for of in usual]
        return [np.geomspace(low, high, BUDGETS) for low, high in zip(first, last, strict=True)]


def _lines(curves: _Curves, method: str) -> list[dict[str, Any]]:
    """A method's curve: all of it, faint, and what is within the budget."""
    x, y = At(curves.at[method] + 1, "axis", "cost"), At(np.array(curves.middles[method]), "curve")
    count, look = At(curves.reached[method], "axis", "cost", "budget"), style(method)
    base = {"type": "scatter", "legendgroup": method, "name": look["name"], "line": look["line"]}
    return [
        {**base, "x": x, "y": y, "mode": "lines", **FAINT},
        {**base, "x": First(x, count), "y": First(y, count), "mode": "lines", **SOLID},
    ]


def _layout(curves: _Curves, names: list[str], last: list[float]) -> dict[str, Any]:
    """Axes, and a line at the budget."""
    look = {"color": COLORS["pink"], "width": 1.5, "dash": "dot"}
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": look}
    edge = At(np.array(curves.budgets) + 1, "axis", "budget")
    power = {"type": "log", "exponentformat": "power"}
    heights = [_range(columns) for columns in zip(*curves.middles.values(), strict=True)]
    return {
        "xaxis": {
            "title": {"text": At(["update + 1", "second of training + 1"], "axis")},
            "range": At([[-0.02, math.log10(end + 1) + 0.05] for end in last], "axis"),
            "dtick": 1,
            **power,
        },
        "yaxis": {
            "title": {"text": At(names, "curve")},
            "range": At(heights, "curve"),
            "dtick": "D2",
            **power,
        },
        "shapes": [{**line, "x0": edge, "x1": edge}],
        "height": 500,
    }


def _updates(number: int) -> str:
    return f"{number:,} update{'s' if number != 1 else ''}"


def _price(share: float, cost: dict[str, float], priced: list[str]) -> str:
    """A cost of KFAC's update in words: of what it was, and of SGD's."""
    words = f"{100 * share:.0f}%"
    if not priced or "standard_sgd" not in cost:
        return words
    return f"{words}, {short(share * cost[priced[0]] / cost['standard_sgd'])} × SGD"


def _range(columns: list[list[float]]) -> list[float]:
    """Ends of a logarithmic axis."""
    values = [v for column in columns for v in column if v > 0]
    low, high = np.log10([min(values), max(values)])
    return [float(low - 0.05 * (high - low)), float(high + 0.05 * (high - low))]


def _markers(method: str, curves: list[str], theirs: dict[str, Any], last: float) -> dict[str, Any]:
    """The thesis's values of a method, where it has them."""
    x, y = [[[[], []] for _ in curves] for _ in range(2)]
    for i, c in enumerate(curves):
        for j, axis in enumerate(AXES):
            names = (f"{quantity}_by_{axis}" for quantity in CURVES[c][1])
            curve = next((theirs[name] for name in names if name in theirs), None)
            if curve:  # a zero has no place on a logarithmic axis
                pairs = [p for p in zip(curve["x"], curve["y"][method], strict=True) if p[1]]
                x[i][j], y[i][j] = [p[0] for p in pairs], [p[1] for p in pairs]
    name, _, dash = looks(method)
    marker = {"symbol": "circle-open" if dash == "solid" else "diamond-open", "size": 9, "line": {"width": 2}}
    return {
        "type": "scatter",
        "x": At(x, "curve", "axis"),
        "y": At(y, "curve", "axis"),
        "mode": "markers",
        "cliponaxis": False,
        "marker": {**marker, "color": style(method)["line"]["color"]},
        "legendgroup": method,
        "showlegend": False,
        "name": f"{name} (thesis 2017)",
        "visible": At([False, True], "thesis"),
    }


def _ranking(curves: _Curves) -> list[Any]:
    """The first few methods at a budget, and where they are."""
    methods, means = curves.methods, curves.middles
    length = max(len(means[m][0]) for m in methods)
    pad = lambda v: [*v, *[math.nan] * (length - len(v))]  # noqa: E731
    values = np.array([[pad(v) for v in means[m]] for m in methods])  # [method, curve, n]
    there = np.array([curves.reached[m] for m in methods]) - 1  # [method, axis, cost, budget]
    now = np.stack([values[i][:, there[i]] for i in range(len(methods))])
    order = now.argsort(0, kind="stable")  # [place, curve, axis, cost, budget]
    names, pieces = [looks(m).name for m in methods], []
    for place in order[:PODIUM]:
        who = At(place, "curve", "axis", "cost", "budget")
        value = At(values, who, "curve", At(there, who, "axis", "cost", "budget"))
        pieces += [", then " if pieces else ": ", At(names, who), " ", Short(value)]
    return [*pieces, "."]


def _verdict(curves: _Curves) -> list[Any]:
    """How cheap KFAC must be to lead in time, as far as it was run."""
    rivals = [m for m in curves.methods if m not in curves.priced]
    if not curves.priced or not rivals:
        return []
    sentences = [
        [_answer(curves, rivals, i, budget) for budget in curves.budgets[1]]
        for i in range(len(curves.measures))
    ]
    return [At(["", At(sentences, "curve", "budget")], "axis")]


def _answer(curves: _Curves, rivals: list[str], measure: int, budget: float) -> str:
    """The sentence for one measure and budget: of the variant of KFAC that may cost the most."""
    others = [(curves.at[m][1, 0], curves.middles[m][measure]) for m in rivals]
    goal = min(values[within(second, budget) - 1] for second, values in others)
    found = []  # the highest cost at which a variant leads, and whether it does at every lower one
    for method in curves.priced:
        update, loss = curves.update[method], np.array(curves.middles[method][measure])
        limit = break_even(update, loss, others, budget)
        if not math.isnan(limit):
            later = update * limit > budget * (1 - 1e-9)
            found.append((limit / curves.cost[method], bool((loss[later] < goal).all())))
    if not found:
        last = max(int(curves.update[m][-1]) for m in curves.priced)
        return f" However cheap, KFAC does not lead here within the {_updates(last)} that it was run for."
    share, always = max(found)
    where = "below" if always else "at some costs up to"
    return f" KFAC leads here {where} {short(100 * share)}% of what its update costs."
