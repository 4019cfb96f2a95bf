"""The few figures that pages share, drawn from records (plotly; see :mod:`sogrid.plotting`)."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any

import plotly.graph_objects as go

from sogrid.experiments.reference import thesis_values
from sogrid.plotting import METHODS, color, figure, style

__all__ = ["caption", "comparison_table", "cost_table", "learning_curves", "loss_at", "thesis_loss_at"]

WORDS = {"lr": "λ", "damping": "ε", "output_curvature": "α", "scale": "s"}
AXES = {"update": "update", "second": "second of training"}
CURVES = {
    ("fig6_2", "train", "update"): "train_mse_by_update",
    ("fig6_2", "train", "second"): "train_mse_by_second",
    ("fig6_2", "test", "second"): "test_mse_by_second",
}


def learning_curves(
    record: dict[str, Any], *, x: str, y: str, figure_key: str | None = None, ylabel: str = "loss"
) -> go.Figure:
    """Learning curves of every method of a record, both axes logarithmic, from update (second) one.

    Lines are ours, the mean over seeds with a band of one standard deviation where there are several;
    open markers are the thesis's values up to the end of our axis.

    Args:
        record: Content of a record.
        x: ``"update"`` or ``"second"``.
        y: ``"train"`` or ``"test"``.
        figure_key: The thesis's figure to set beside ours, e.g. ``"fig6_2"``.
        ylabel: Title of the vertical axis.
    """
    traces, last = [], 1.0
    for method, runs in _by_method(record).items():
        at = [v + 1 for v in runs[0][x]]
        values = [list(column) for column in zip(*(run[y] for run in runs), strict=False)]
        mean = [fmean(column) for column in values]
        at = at[: len(mean)]
        if len(runs) > 1:
            spread = [stdev(column) for column in values]
            upper = [m + s for m, s in zip(mean, spread, strict=True)]
            lower = [max(m - s, 1e-12) for m, s in zip(mean, spread, strict=True)]
            band = {
                "fill": "toself",
                "fillcolor": color(method, 0.2),
                "line": {"width": 0},
                "hoverinfo": "skip",
            }
            traces.append(
                go.Scatter(
                    x=at + at[::-1], y=upper + lower[::-1], legendgroup=method, showlegend=False, **band
                )
            )
        traces.append(go.Scatter(x=at, y=mean, mode="lines", **style(method)))
        last = max(last, at[-1])
    if figure_key is not None:
        traces += _thesis_markers(figure_key, x, y, _by_method(record), last)
    ours = ", ".join(f"{METHODS[m][0]} {runs[0][y][-1]:.3g}" for m, runs in _by_method(record).items())
    return figure(
        traces,
        alt=f"Learning curves: {ylabel} by {AXES[x]}, both axes logarithmic. At the end: {ours}.",
        xaxis={"title": AXES[x], "type": "log", "dtick": "D2"},
        yaxis={"title": ylabel, "type": "log", "dtick": "D2"},
        height=460,
    )


def _by_method(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        found.setdefault(run["method"], []).append(run)
    return found


def _thesis_markers(key: str, x: str, y: str, methods: Iterable[str], last: float) -> list[go.Scatter]:
    curve = thesis_values(key)["curves"][CURVES[key, y, x]]
    traces = []
    for method in methods:
        pairs = [
            (at, value)
            for at, value in zip(curve["x"], curve["y"][method], strict=True)
            if value is not None and at <= 1.05 * last
        ]
        if not pairs:
            continue
        at, values = zip(*pairs, strict=True)
        symbol = "circle-open" if METHODS[method][2] == "solid" else "diamond-open"
        marker = {"symbol": symbol, "size": 9, "color": color(method), "line": {"width": 2}}
        traces.append(
            go.Scatter(
                x=at,
                y=values,
                mode="markers",
                marker=marker,
                name=f"{METHODS[method][0]} (thesis 2017)",
                legendgroup=method,
                showlegend=False,
            )
        )
    return traces


def loss_at(record: dict[str, Any], method: str, update: int, curve: str = "train") -> float:
    """A method's value at one of its evaluation points, the mean over seeds.

    Raises:
        ValueError: If there is no such method or point in the record.
    """
    values = [
        run[curve][run["update"].index(update)]
        for run in record["runs"]
        if run["method"] == method and update in run["update"]
    ]
    if not values:
        raise ValueError(f"the record has no {method!r} evaluated at update {update}")
    return fmean(values)


def caption(record: dict[str, Any]) -> str:
    """One sentence on what a record holds: data, scale, seeds, machine, date."""
    settings, runs = record["settings"], record["runs"]
    seeds = sorted({run["seed"] for run in runs})
    origin = runs[-1]["provenance"]
    machine = origin["machine"]
    return (
        f"{settings['data']['variant']} (sha256 {settings['data']['checksum'][:8]}), "
        f"{settings['updates']:,} updates of {settings['batch']} examples, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}, hyperparameters chosen {settings['hyperparameters']}; "
        f"{machine['processor']}, {machine['threads']} threads, {machine['device']}, {origin['date']}"
    )


def thesis_loss_at(figure_key: str, update: int) -> dict[str, float]:
    """The thesis's training losses at one update (its axis says update + 1), by method."""
    curve = thesis_values(figure_key)["curves"]["train_mse_by_update"]
    column = curve["x"].index(update + 1)
    return {method: values[column] for method, values in curve["y"].items()}


def cost_table(record: dict[str, Any], network: str, figure_key: str) -> str:
    """Markdown table of what an update costs on a network, as a ratio to SGD: our latest, the thesis's."""
    run = [run for run in record["runs"] if run["network"] == network][-1]
    headline = thesis_values(figure_key)["headline"]
    lines = ["| method | ms per update | ratio to SGD | thesis 2017 |", "|---|---|---|---|"]
    for row in run["rows"]:
        method = row["optimizer"]
        theirs = f"{headline[method]['ratio_to_sgd']:.2f}" if method in headline else ""
        lines.append(f"| {METHODS[method][0]} | {row['update_ms']:.1f} | {row['ratio']:.2f} | {theirs} |")
    return "\n".join(lines)


def comparison_table(record: dict[str, Any], update: int, figure_key: str) -> str:
    """Markdown table of the training loss at one update: ours, the thesis's (at update + 1), settings."""
    thesis = thesis_loss_at(figure_key, update)
    lines = [f"| method | at update {update:,} | thesis 2017 | settings |", "|---|---|---|---|"]
    for method, runs in _by_method(record).items():
        settings = ", ".join(f"{WORDS[key]} {value:g}" for key, value in runs[0]["settings"].items())
        ours = loss_at(record, method, update)
        lines.append(f"| {METHODS[method][0]} | {ours:.3g} | {thesis[method]:.3g} | {settings} |")
    return "\n".join(lines)
