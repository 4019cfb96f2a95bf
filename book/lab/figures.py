"""The figures and tables that pages and templates share, drawn from records (see :mod:`lab.plotting`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from statistics import fmean, stdev
from typing import Any

import plotly.graph_objects as go

from lab.plotting import color, figure, looks, style
from sogrid.experiments.reference import thesis_facts, thesis_values
from sogrid.experiments.tuning import best_so_far, chosen

__all__ = [
    "bars",
    "best_losses",
    "by_learning_rate",
    "by_point",
    "caption",
    "carried_on",
    "comparison_table",
    "cost_growth",
    "cost_table",
    "good_learning_rates",
    "horizon_table",
    "landscape",
    "learning_curves",
    "learning_rate_table",
    "loss_at",
    "milliseconds",
    "provenance_table",
    "runs_by_method",
    "search_caption",
    "search_scatter",
    "search_table",
    "settings_table",
    "thesis_loss_at",
    "values_at",
]

WORDS = {"lr": "λ", "damping": "ε", "max_change": "κ", "scale": "s"}
AXES = {"update": "update", "second": "second of training"}
QUANTITIES = {"train": ("train_mse", "train_cross_entropy"), "test": ("test_mse",)}
ONE_ERROR = 1e-4
"""An error rate is measured on 10,000 images."""

TICKS = {"type": "log", "dtick": "D2", "minor": {"dtick": "D1"}, "exponentformat": "power"}


# Learning curves


def learning_curves(
    record: dict[str, Any],
    *,
    x: str,
    y: str,
    figure_key: str | None = None,
    ylabel: str = "loss",
    longer: dict[str, Any] | None = None,
    methods: Sequence[str] = (),
) -> go.Figure:
    """Learning curves of every method of a record, both axes logarithmic, from update (second) one.

    A line is one seed, and a cross is where it diverged: nothing is averaged, so that a seed that is lost is
    seen as such. Open markers are the thesis's values up to the end of our axis. Seconds are updates times
    what an update costs, if the record has that (``clock``).

    Args:
        record: Content of a record.
        x: ``"update"`` or ``"second"``.
        y: ``"train"``, ``"test"``, ``"train_error"`` or ``"test_error"``.
        figure_key: The thesis's figure to set beside ours, e.g. ``"fig6_2"``.
        ylabel: Title of the vertical axis.
        longer: A record of some of these runs with more updates: their lines go on where ours end.
        methods: Those to draw, if not all.
    """
    shown = {m: runs for m, runs in runs_by_method(record).items() if m in (methods or (m,))}
    longer = carried_on(record, longer)
    late = runs_by_method(longer or {"runs": []})
    traces, last, ends = [], 1.0, []
    for method, runs in shown.items():
        ours = [(record, run, 0) for run in runs]
        ours += [(longer, run, _updates(record)) for run in late.get(method, ())]
        for i, (source, run, since) in enumerate(ours):
            at = [
                v
                for v, update in zip(_abscissae(source, run, x), run["update"], strict=True)
                if update >= since
            ]
            traces += _seed(method, run, at, run[y][len(run[y]) - len(at) :], first=i == 0)
            last = max(last, *at[-1:], 1.0)
        found = [f"{run[y][-1]:.3g}" if run["status"] == "finished" else "diverged" for run in runs]
        ends.append(f"{looks(method).name} {', '.join(found)}")
    theirs = _thesis_markers(figure_key, x, y, shown, last) if figure_key is not None else []
    traces += theirs
    return figure(
        [*traces, *([_in_the_legend()] if theirs else [])],
        alt=f"Learning curves, a line for each seed: {ylabel} by {AXES[x]}, both axes logarithmic. At the "
        f"end: {'; '.join(ends)}.",
        xaxis={"title": AXES[x], **TICKS},
        yaxis={"title": ylabel, **TICKS, **(_down_to_one_error(traces) if y.endswith("error") else {})},
        height=460,
    )


def carried_on(record: dict[str, Any], longer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a longer record, the runs that go on with one of a record: same method, seed and settings.

    A search that was made again chooses other settings, and what was carried on before is of the old ones.
    Step times are the record's.
    """
    if longer is None:
        return None
    known = [(run["method"], run["seed"], run["settings"]) for run in record["runs"]]
    runs = [run for run in longer["runs"] if (run["method"], run["seed"], run["settings"]) in known]
    return {**longer, "runs": runs, "clock": record.get("clock", {})} if runs else None


def _seed(
    method: str, run: dict[str, Any], at: list[float], values: list[float], first: bool
) -> list[go.Scatter]:
    """A line of one seed, the first of a method in the legend, and a cross where it diverged."""
    look, name = style(method), f"{looks(method).name}, seed {run['seed']}"
    more = {"line": {**look["line"], "width": 1.5}, "showlegend": first}
    text = f"%{{x:.4g}}: %{{y:.4g}}<extra>{name}</extra>"
    traces = [go.Scatter(x=at, y=values, mode="lines", hovertemplate=text, **(look | more))]
    if run["status"] != "finished" and at:
        traces.append(_marker(method, at[-1:], values[-1:], "x", f"{name}, diverged"))
    return traces


def _abscissae(record: dict[str, Any], run: dict[str, Any], x: str) -> list[float]:
    """Where a run was evaluated, from one on."""
    cost = milliseconds(record).get(run["method"])
    if x == "second" and cost is not None:
        return [1 + update * cost / 1000 for update in run["update"]]
    return [1 + v for v in run[x]]


def _down_to_one_error(traces: Sequence[Any]) -> dict[str, Any]:
    """A logarithmic axis of error rates goes no further down than one error in all that is evaluated."""
    values = [v for trace in traces for v in trace.y if v and math.isfinite(v)]
    if not values or min(values) >= ONE_ERROR:
        return {}
    return {"range": [math.log10(ONE_ERROR), math.log10(1.2 * max(values))]}


def runs_by_method(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of a record, by method."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        found.setdefault(run["method"], []).append(run)
    return found


def milliseconds(record: dict[str, Any]) -> dict[str, float]:
    """What an update of each method costs, from the record's clock; empty if it lacks one of them."""
    found = {row["method"]: row["update_ms"] for row in record.get("clock", {}).get("rows", ())}
    return found if {run["method"] for run in record["runs"]} <= found.keys() else {}


def _updates(record: dict[str, Any]) -> int:
    return record["settings"]["updates"]


def by_point(runs: list[dict[str, Any]], key: str) -> list[list[float]]:
    """At each evaluation, one after the other, the values of all seeds that got there."""
    return [[v for v in values if v is not None] for values in zip_longest(*(run[key] for run in runs))]


def _marker(method: str, x: list[float], y: list[float], symbol: str, name: str) -> go.Scatter:
    marker = {
        "symbol": symbol,
        "size": 9,
        "color": color(method),
        "line": {"width": 2, "color": color(method)},
    }
    look = {"mode": "markers", "legendgroup": method, "showlegend": False, "name": name}
    return go.Scatter(x=x, y=y, marker=marker, cliponaxis=False, **look)


def _in_the_legend() -> go.Scatter:
    """What open markers are: an entry without a place."""
    marker = {"symbol": "circle-open", "size": 9, "color": color("grey"), "line": {"width": 2}}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name="thesis 2017")


def _thesis_markers(key: str, x: str, y: str, methods: Iterable[str], last: float) -> list[go.Scatter]:
    values = thesis_values(key)
    names = [f"{quantity}_by_{x}" for quantity in QUANTITIES.get(y, (y,))]
    curve = next((values["curves"][name] for name in names if name in values["curves"]), None)
    traces = []
    for method in [m for m in methods if curve is not None and m in values["methods"]]:
        pairs = [
            (at, value)
            for at, value in zip(curve["x"], curve["y"][method], strict=True)
            if value and at <= 1.05 * last  # a zero has no place on a logarithmic axis
        ]
        if pairs:
            at, found = map(list, zip(*pairs, strict=True))
            symbol = "circle-open" if looks(method).dash == "solid" else "diamond-open"
            traces.append(_marker(method, at, found, symbol, f"{looks(method).name} (thesis 2017)"))
    return traces


def loss_at(record: dict[str, Any], method: str, update: int, curve: str = "train") -> float:
    """A method's value at one of its evaluation points, the mean over seeds.

    Raises:
        ValueError: If there is no such method or point in the record.
    """
    return fmean(values_at(record, method, update, curve))


def values_at(record: dict[str, Any], method: str, update: int, curve: str = "train") -> list[float]:
    """The same of every seed that got there.

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
    return values


def thesis_loss_at(figure_key: str, update: int) -> dict[str, float]:
    """The thesis's training losses at one update, by method (the axes of Figs. 6.1, 6.2 say update + 1)."""
    curves = thesis_values(figure_key)["curves"]
    names = (f"{quantity}_by_update" for quantity in QUANTITIES["train"])
    curve = next(curves[name] for name in names if name in curves)
    column = curve["x"].index(update + 1 if update + 1 in curve["x"] else update)
    return {method: values[column] for method, values in curve["y"].items()}


def caption(record: dict[str, Any]) -> str:
    """One sentence on what a record holds: data, scale, seeds, settings, time axis.

    Machines and dates are on the page "How this companion is made", see :func:`provenance_table`.
    """
    settings, runs = record["settings"], record["runs"]
    seeds = sorted({run["seed"] for run in runs})
    updates = max((run["update"][-1] for run in runs if run["update"]), default=0)
    text = (
        f"{settings['data']['variant']}, {updates:,} updates of {settings['batch']} examples, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, "
        f"hyperparameters chosen {settings['hyperparameters']}"
    )
    if "evaluate_on" in settings:
        text += f"; training loss and error are of {settings['evaluate_on']:,} training images"
    if milliseconds(record):
        text += "; seconds are updates times the cost of one, measured on its own"
    return text


def provenance_table(records: dict[str, dict[str, Any]]) -> str:
    """Markdown table of where records come from: data, machines, dates.

    Args:
        records: Name of each, and its content.
    """
    lines = ["| record | data | made on | until |", "|---|---|---|---|"]
    for name, record in records.items():
        each = [record.get("settings", {}), *record.get("runs", ())]
        data = "; ".join(dict.fromkeys(_data_words(part["data"]) for part in each if part.get("data")))
        parts = [*record.get("runs", ()), record.get("clock", {})]
        for where, date in _origins(part["provenance"] for part in parts if "provenance" in part).items():
            lines.append(f"| {name} | {data} | {where} | {date} |")
            name = data = ""
    return "\n".join(lines)


def _data_words(data: str | dict[str, str]) -> str:
    """The name of a data set, and the beginning of its hash where it is known."""
    return data if isinstance(data, str) else f"{data['variant']}, sha256 {data['checksum'][:8]}"


def _origins(provenances: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Machine → the last date on it."""
    last: dict[str, str] = {}
    for provenance in provenances:
        machine = provenance["machine"]
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
        device = "" if machine["device"] == "cpu" else f", {machine['device']}"
        where = f"{machine['processor']}, {threads}{device}"
        last[where] = max(last.get(where, ""), provenance["date"])
    return last


def comparison_table(record: dict[str, Any], update: int, figure_key: str) -> str:
    """Markdown table of the training loss at one update: ours of every seed, the thesis's, settings."""
    thesis = thesis_loss_at(figure_key, update)
    lines = [f"| method | at update {update:,} | thesis 2017 | settings |", "|---|---|---|---|"]
    for method, runs in runs_by_method(record).items():
        lost = all(run["status"] != "finished" and update not in run["update"] for run in runs)
        values = [] if lost else values_at(record, method, update)
        ours = ", ".join(f"{value:.3g}" for value in values) or "diverged"
        theirs = f"{thesis[method]:.3g}" if thesis.get(method) is not None else ""
        lines.append(f"| {looks(method).name} | {ours} | {theirs} | {_settings(runs[0]['settings'])} |")
    return "\n".join(lines)


def _settings(settings: dict[str, float]) -> str:
    return ", ".join(f"{WORDS[key]} {value:.3g}" for key, value in settings.items())


def cost_table(record: dict[str, Any], figure_key: str) -> str:
    """Markdown table of what an update costs, and its ratio to SGD: the record's clock, the thesis's."""
    headline = thesis_values(figure_key)["headline"]
    lines = [
        "| method | ms per update | of it refresh | ratio to SGD | thesis 2017 |",
        "|---|---|---|---|---|",
    ]
    every = record["settings"]["refresh_every"]
    rows = record["clock"]["rows"]
    sgd = next((row["update_ms"] for row in rows if row["method"] == "standard_sgd"), None)
    for row in rows:
        theirs = headline.get(row["method"], {}).get("ratio_to_sgd")
        ours = "" if sgd is None else f"{row['update_ms'] / sgd:.2f}"
        lines.append(
            f"| {looks(row['method']).name} | {row['update_ms']:.1f} | {row['refresh_ms'] / every:.2f} "
            f"| {ours} | {'' if theirs is None else f'{theirs:.3g}'} |"
        )
    return "\n".join(lines)


def bars(series: dict[str, dict[str, float]], *, xlabel: str, alt: str) -> go.Figure:
    """Horizontal bars, the first at the top, a colour for each series, and a dotted line at one.

    Args:
        series: What the bars are of → name → value; a series may lack some names.
        xlabel: Title of the axis of values.
        alt: What the figure shows, before its numbers.
    """
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    traces = [
        go.Bar(
            x=[values.get(name) for name in names],
            y=names,
            orientation="h",
            name=title,
            marker={"color": color(shade)},
            hovertemplate="%{y}: %{x:.2f}<extra>" + title + "</extra>",
        )
        for (title, values), shade in zip(series.items(), ("blue", "orange", "green"), strict=False)
    ]
    told = "; ".join(
        f"{title}: {', '.join(f'{name} {value:.2f}' for name, value in values.items())}"
        for title, values in series.items()
    )
    return figure(
        traces,
        alt=f"{alt} {told}.",
        barmode="group",
        bargap=0.25,
        xaxis={"title": xlabel, "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "ticks": "", "showgrid": False},
        shapes=[
            {
                "type": "line",
                "x0": 1,
                "x1": 1,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"dash": "dot", "color": color("grey")},
            }
        ],
        showlegend=len(series) > 1,
        height=80 + (14 + 13 * len(series)) * len(names),
    )


def cost_growth(rows: list[dict[str, Any]]) -> go.Figure:
    """What an update costs, as a multiple of SGD's, along each axis of a bench's part ``"growth"``."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    traces, layout = [], {}
    for i, axis in enumerate(axes):
        number, left = "" if i == 0 else str(i + 1), i * 0.26
        along = [row for row in rows if row["axis"] == axis]
        at = [row["at"] for row in along]
        for method in rows[0]["ratio"]:
            look = {"xaxis": f"x{number}", "yaxis": "y", "mode": "lines+markers", "showlegend": i == 0}
            traces.append(
                go.Scatter(x=at, y=[row["ratio"][method] for row in along], **look, **style(method))
            )
        shape = {"type": "log", "domain": [left, left + 0.22], "anchor": "y"}
        layout[f"xaxis{number}"] = {"title": axis, "tickvals": at[::2], "tickangle": 0, **shape}
    told = (
        f"{row['axis']} {row['at']}: {' and '.join(f'{v:.2f}' for v in row['ratio'].values())}"
        for row in rows
    )
    names = " and ".join(looks(method).name for method in rows[0]["ratio"])
    return figure(
        traces,
        alt=f"Time of an update over SGD's, for {names}, along {len(axes)} axes. {'; '.join(told)}.",
        yaxis={"title": "ratio to SGD", "rangemode": "tozero"},
        height=360,
        **layout,
    )


# Learning rates


def by_learning_rate(record: dict[str, Any]) -> go.Figure:
    """The last training loss by learning rate, both axes logarithmic, of every method of a sweep's record.

    Lines join means over seeds, and a dot is a seed; a learning rate at which one diverged has no mean.
    """
    traces, ends = [], []
    for method, runs in runs_by_method(record).items():
        found = _last_losses(runs)
        at = [lr for lr in found if None not in found[lr]]
        columns = [found[lr] for lr in at]
        mean = [fmean(column) for column in columns]
        look = style(method)
        traces.append(go.Scatter(x=at, y=mean, mode="lines", **look))
        dots = [(lr, loss) for lr in found for loss in found[lr] if loss is not None]
        x, y = zip(*dots, strict=True) if dots else ((), ())
        own = {"mode": "markers", "showlegend": False, "name": look["name"], "legendgroup": method}
        traces.append(go.Scatter(x=x, y=y, marker={"color": color(method), "size": 5}, **own))
        best = good_learning_rates(record, method)
        end = "none" if best["loss"] == math.inf else f"{best['loss']:.3g} at {best['lr']:.2g}"
        ends.append(f"{look['name']} {end}")
    return figure(
        traces,
        alt=f"Training loss after {_updates(record)} updates by learning rate. The best: {', '.join(ends)}.",
        xaxis={"title": "learning rate λ", **TICKS, "dtick": 1},
        yaxis={"title": f"train loss after {_updates(record)} updates", **TICKS},
        height=460,
    )


def good_learning_rates(record: dict[str, Any], method: str, margin: float = 0.2) -> dict[str, float]:
    """Around a sweep's best learning rate, those whose mean last loss is at most 1 + ``margin`` times its.

    Returns:
        ``lr`` and ``loss`` of the best, ``low`` and ``high``, the first and the last good one next to it
        without a gap, and ``decades``, log₁₀(high/low). Of a method that diverged at every rate all are NaN,
        but for the loss, which is infinite.
    """
    found = _last_losses(runs_by_method(record)[method])
    rates = sorted(found)
    losses = [math.inf if None in found[lr] else fmean(found[lr]) for lr in rates]
    best = low = high = min(range(len(rates)), key=losses.__getitem__)
    if losses[best] == math.inf:
        return dict.fromkeys(("lr", "low", "high", "decades"), math.nan) | {"loss": math.inf}
    limit = (1 + margin) * losses[best]
    while low > 0 and losses[low - 1] <= limit:
        low -= 1
    while high < len(rates) - 1 and losses[high + 1] <= limit:
        high += 1
    ends = {"low": rates[low], "high": rates[high], "decades": math.log10(rates[high] / rates[low])}
    return {"lr": rates[best], "loss": losses[best], **ends}


def _last_losses(runs: list[dict[str, Any]]) -> dict[float, list[float | None]]:
    """Learning rate → the last training loss of every seed, ``None`` where it diverged."""
    found: dict[float, list[float | None]] = {}
    for run in sorted(runs, key=lambda run: run["settings"]["lr"]):
        last = run["train"][-1] if run["status"] == "finished" else None
        found.setdefault(run["settings"]["lr"], []).append(last)
    return found


def learning_rate_table(record: dict[str, Any]) -> str:
    """Markdown table of a sweep: best loss of each method, and the decades of λ within 20% of it."""
    lines = [
        "| method | seeds | best loss | at λ | within 20% of it | decades |",
        "|---|---|---|---|---|---|",
    ]
    for method, runs in runs_by_method(record).items():
        good, seeds = good_learning_rates(record, method), len({run["seed"] for run in runs})
        if good["loss"] == math.inf:
            lines.append(f"| {looks(method).name} | {seeds} | diverged at every λ | | | |")
            continue
        lr, low, high = (_short(good[key]) for key in ("lr", "low", "high"))
        lines.append(
            f"| {looks(method).name} | {seeds} | {good['loss']:.3g} "
            f"| {lr} | {low} to {high} | {good['decades']:.1f} |"
        )
    return "\n".join(lines)


def _short(value: float) -> str:
    """Three digits that count, without an exponent where none is needed."""
    return f"{float(f'{value:.3g}'):g}"


# Searches


def landscape(record: dict[str, Any]) -> go.Figure:
    """Fig. 2.2: every trial of a record's searches in the plane of learning rate and init scale.

    The colour is the common logarithm of the loss; trials that diverged are crosses. The ring is our
    best; the dotted line is the thesis's: where its best 20 runs lie.
    """
    trials = _trials(record["runs"])
    facts = thesis_facts("fig2_2")
    low, high = record["runs"][0]["domain"]["lr"]
    ends = [max(low, facts["lr"][0]), min(high, facts["lr"][1])]
    ridge = [10 ** facts["ridge"]["intercept"] * lr ** facts["ridge"]["slope"] for lr in ends]
    line = {"color": color("grey"), "dash": "dot"}
    best = min(trials, key=lambda trial: math.inf if trial[2] is None else trial[2])
    ring = {"symbol": "circle-open", "size": 18, "color": color("orange"), "line": {"width": 2}}
    return figure(
        [
            *_scatter(trials),
            go.Scatter(x=ends, y=ridge, mode="lines", line=line, name="the thesis's best runs"),
            go.Scatter(x=[best[0]], y=[best[1]], mode="markers", marker=ring, name="our best"),
        ],
        alt=f"{len(trials)} runs of SGD by learning rate and init scale, coloured by loss. The best has "
        f"learning rate {best[0]:.3g}, init scale {best[1]:.3g} and loss {best[2]:.3g}.",
        xaxis={"title": "learning rate", "type": "log", "dtick": 1},
        yaxis={"title": "init scale s", "type": "log", "dtick": 1},
        height=480,
    )


def search_scatter(record: dict[str, Any], seed: int = 0) -> go.Figure:
    """Fig. 4.1: the trials of one search by each sampler, on one landscape and one colour scale."""
    runs = {run["sampler"]: run for run in record["runs"] if run["seed"] == seed}
    everything = [trial[2] for run in runs.values() for trial in _trials([run]) if trial[2] is not None]
    limits = [math.log10(f(everything)) for f in (min, max)]
    traces, layout, gap = [], {}, 0.04
    width = (1 - gap * (len(runs) - 1)) / len(runs)
    for i, (sampler, run) in enumerate(runs.items()):
        number, left = "" if i == 0 else str(i + 1), i * (width + gap)
        for trace in _scatter(_trials([run]), limits, bar=i == 0):
            traces.append(trace.update(xaxis=f"x{number}", yaxis="y", showlegend=False))
        low, high = (math.log10(v) for v in run["domain"]["lr"])
        margin = 0.04 * (high - low)
        axis = {
            "title": f"learning rate<br>{looks(sampler).name}",
            "type": "log",
            "dtick": 2,
            "tick0": low + 1,
        }
        span = {"domain": [left, left + width], "range": [low - margin, high + margin]}
        layout[f"xaxis{number}"] = {**axis, **span, "anchor": "y", "tickangle": 0}
    best = ", ".join(f"{looks(s).name} {min(best_so_far(run)):.3g}" for s, run in runs.items())
    return figure(
        traces,
        alt=f"Trials of one search by each of {len(runs)} samplers, by learning rate and init scale, "
        f"coloured by loss. The best losses: {best}.",
        yaxis={"title": "init scale s", "type": "log", "dtick": 1},
        height=420,
        **layout,
    )


def _trials(runs: list[dict[str, Any]]) -> list[tuple[float, float, float | None]]:
    """(learning rate, init scale, loss or ``None``) of every trial."""
    return [
        trial
        for run in runs
        for trial in zip(*(run["trials"][key] for key in ("lr", "scale", "loss")), strict=True)
    ]


def _scatter(
    trials: list[tuple[float, float, float | None]], limits: list[float] | None = None, bar: bool = True
) -> list[go.Scatter]:
    """Finished runs, the better the brighter, and diverged ones."""
    good = [trial for trial in trials if trial[2] is not None]
    bad = [trial for trial in trials if trial[2] is None]
    logs = [math.log10(trial[2]) for trial in good]
    low, high = limits or (min(logs), max(logs))
    scale = {"cmin": low, "cmax": high, "colorscale": "Cividis", "reversescale": True, "showscale": bar}
    if bar:
        scale["colorbar"] = {"title": {"text": "log₁₀ loss"}}
    marker = {"color": logs, "size": 9, "line": {"width": 0.5, "color": color("grey")}, **scale}
    hover = "λ %{x:.3g}, s %{y:.3g}: loss %{text}<extra></extra>"
    traces = [
        go.Scatter(
            x=[trial[0] for trial in good],
            y=[trial[1] for trial in good],
            text=[f"{trial[2]:.3g}" for trial in good],
            hovertemplate=hover,
            mode="markers",
            marker=marker,
            name="run",
            showlegend=False,
        )
    ]
    if bad:
        cross = {"symbol": "x-thin", "size": 7, "line": {"width": 1.5, "color": color("grey")}}
        x, y = ([trial[i] for trial in bad] for i in (0, 1))
        traces.append(go.Scatter(x=x, y=y, mode="markers", marker=cross, name="diverged"))
    return traces


def search_caption(record: dict[str, Any]) -> str:
    """One sentence on what a record of searches holds."""
    settings = record["settings"]
    count = sum(len(run["trials"]["loss"]) for run in record["runs"])
    length = f"{'up to ' if settings.get('halvings') else ''}{settings['updates']:,}"
    return (
        f"{settings['data']['variant']}, {settings['benchmark'].replace('_', ' ')}, "
        f"{count:,} runs of {length} updates"
    )


def search_table(record: dict[str, Any]) -> str:
    """Table 4.I: mean and standard deviation over searches of the best loss, by sampler; the thesis's."""
    theirs = thesis_facts("table4_1")
    lines = ["| sampler | searches | best loss | thesis 2017 |", "|---|---|---|---|"]
    for sampler, values in best_losses(record).items():
        mean, deviation = theirs[sampler]
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(
            f"| {looks(sampler).name} | {len(values)} | {fmean(values):.2f}{spread} "
            f"| {mean:.2f} ± {deviation:.2f} |"
        )
    return "\n".join(lines)


def best_losses(record: dict[str, Any]) -> dict[str, list[float]]:
    """The best loss of each search, by sampler."""
    found: dict[str, list[float]] = {}
    for run in record["runs"]:
        found.setdefault(run["sampler"], []).append(best_so_far(run)[-1])
    return found


def horizon_table(record: dict[str, Any], *figure_keys: str) -> str:
    """Markdown table of losses at the last update of a search.

    Of an earlier search's choice; of the best trial; of this search's choice with other seeds; the thesis's.

    Args:
        record: Of searches that began with those choices and ran their finalists again.
        figure_keys: Figures of the thesis that have these methods by update, if there are any.
    """
    update = record["settings"]["updates"]
    thesis: dict[str, float] = {}
    for key in figure_keys:
        thesis |= thesis_loss_at(key, update)
    columns = ["method", "the earlier choice", "the best trial", "this choice, by these two runs"]
    columns += ["thesis 2017"] * bool(thesis)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for run in record["runs"]:
        trials, first, number, before = run["trials"], run.get("first") or {}, None, ""
        if len(first) == len(run["domain"]):
            places = range(len(trials["loss"]))
            number = next(i for i in places if all(trials[key][i] == first[key] for key in first))
            loss, end = trials["loss"][number], trials["update"][number]
            before = "diverged" if loss is None else f"{loss:.3g}" + f", stopped at {end:,}" * (end < update)
        now = ", ".join("diverged" if loss is None else f"{loss:.3g}" for loss in run["finals"]["loss"][0])
        now += " (it is the same)" * (run["finals"]["trial"][0] == number)
        cells = [looks(run["method"]).name, before, f"{best_so_far(run)[-1]:.3g}", now]
        if thesis:
            cells.append(f"{thesis[run['method']]:.3g}" if run["method"] in thesis else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_table(record: dict[str, Any]) -> str:
    """Markdown table of the searches behind learning curves: what each method's search chose."""
    lines = ["| method | trials | diverged | lowest loss of a trial | chosen |", "|---|---|---|---|---|"]
    for run in record["runs"]:
        losses = run["trials"]["loss"]
        diverged = sum(loss is None for loss in losses)
        lines.append(
            f"| {looks(run['method']).name} | {len(losses)} | {diverged} | {best_so_far(run)[-1]:.3g} "
            f"| {_settings(chosen(run))} |"
        )
    return "\n".join(lines)
