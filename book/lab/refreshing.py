"""When to refresh: fixed intervals and ``"adaptive"`` on the thesis's autoencoder, by update and by time.

``python -m lab refreshing`` trains ACP and KFAC, bounded and with momentum, under every schedule of
:data:`SCHEDULES` from three seeds, and leaves a record of losses and of what was refreshed when;
``python -m lab refreshing --clock``, on an idle machine, adds what an update and the refresh of each layer
cost, from which the time of every run follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import plotly.graph_objects as go
import torch
from tqdm.auto import tqdm

from lab.plotting import COLORS, color, figure
from sogrid.experiments import data
from sogrid.experiments.benchmarks import BATCH, BENCHMARKS, Task
from sogrid.experiments.records import Record, provenance
from sogrid.experiments.training import Minibatches, evaluate, evaluation_points
from sogrid.optimizers import ACP, KFAC
from sogrid.optimizers.adaptive import ADAPTIVE, DUE
from sogrid.optimizers.batches import packed
from sogrid.shell import LayerOptimizer

__all__ = [
    "LOSSES",
    "METHODS",
    "SCHEDULES",
    "SEEDS",
    "clock",
    "curves",
    "elapsed",
    "fit",
    "refreshing",
    "report",
    "verdict",
]

SCHEDULES = (5, 10, 20, 50, 100, ADAPTIVE)
METHODS = {
    "acp_bounded": "ACP(model, lr=10.0, damping=0.42, momentum=0.8, gradients='factored')",
    "kfac_bounded": "KFAC(model, lr=10.0, damping=0.01, momentum=0.8, gradients='factored', loss=loss)",
}
LOSSES = (40.0, 18.9, 12.0, 10.0)
"""Training losses that runs are timed to; 18.9 is what tuned SGD has after about 2,000 updates."""

SCALE, SEEDS, UPDATES, EVALUATE_ON = 30.0, (1, 2, 3), 500, 2_000


def _made(
    task: Task, method: str, every: int | str | None, seed: int
) -> tuple[torch.nn.Module, LayerOptimizer]:
    model = task.network(scale=SCALE, generator=torch.Generator().manual_seed(seed))
    names = {"ACP": ACP, "KFAC": KFAC, "model": model, "loss": task.loss}
    return model, eval(METHODS[method][:-1] + f", refresh_every={every!r})", names)


def _step(task: Task, model: torch.nn.Module, optimizer: LayerOptimizer, i: torch.Tensor) -> list[str]:
    """One update; the layers that were refreshed for it."""
    x, y = (part[i] for part in task.train)
    before = {name: optimizer.state.get(layer.weight) for name, layer in _layers(model)}
    optimizer.zero_grad()
    task.loss(model(x), y).backward()
    optimizer.step()
    return [name for name, layer in _layers(model) if optimizer.state[layer.weight] is not before[name]]


def _layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


def fit(task: Task, method: str, every: int | str, seed: int, updates: int = UPDATES) -> dict[str, Any]:
    """Train, and return losses at some updates, and how often each layer was refreshed by then.

    ``"looks"`` are the quadratic forms of layers that an adaptive schedule had taken.
    """
    model, optimizer = _made(task, method, every, seed)
    batches = Minibatches(len(task.train[0]), BATCH, torch.Generator().manual_seed(seed))
    points, few = evaluation_points(updates, per_decade=16), [part[:EVALUATE_ON] for part in task.train]
    counts = {name: 0 for name, _ in _layers(model)}
    found: dict[str, list] = {"update": [], "train": [], "refreshes": [], "looks": []}
    with mock.patch.object(optimizer, "_quadratic", wraps=optimizer._quadratic) as form:
        for done in range(updates + 1):
            if done in points:
                found["update"].append(done)
                found["train"].append(evaluate(model, task.loss, *few)[0])
                found["refreshes"].append(list(counts.values()))
                found["looks"].append(form.call_count)
            if done < updates:
                for name in _step(task, model, optimizer, next(batches)):
                    counts[name] += 1
    return found


def clock(task: Task, method: str, rounds: int = 15) -> dict[str, Any]:
    """Milliseconds of an update, fixed and adaptive, of refreshes and of a look; medians, interleaved."""
    batches = Minibatches(len(task.train[0]), BATCH, torch.Generator().manual_seed(0))
    fixed, adaptive = (_made(task, method, every, 0) for every in (2, ADAPTIVE))
    names = [name for name, _ in _layers(fixed[0])]

    def timed(model, optimizer, due: Sequence[str] = ()) -> float:
        for name, layer in _layers(model):
            optimizer.state[layer.weight][DUE] = float(name in due)
        begun = time.perf_counter()
        _step(task, model, optimizer, next(batches))
        return 1e3 * (time.perf_counter() - begun)

    for made in (fixed, adaptive):
        _step(task, *made, next(batches))
    found: dict[str, list[float]] = {key: [] for key in ("update", "adaptive", "look", "all", *names)}
    for _ in range(rounds):
        found["update"].append(timed(*fixed))
        found["all"].append(timed(*fixed))
        for key, look in (("look", 0), ("adaptive", 10**9)):
            adaptive[1].param_groups[0]["schedule"] |= {"budget": 1e9, "look": look}
            found[key].append(timed(*adaptive))
        for name in names:
            timed(*adaptive)  # its fresh value, and whatever was to go first
            found[name].append(timed(*adaptive, [name]))
    middle = {key: median(values) for key, values in found.items()}
    own = [middle[name] - middle["adaptive"] for name in names]
    return {
        "update_ms": middle["update"],
        "adaptive_update_ms": middle["adaptive"],
        "refresh_ms": middle["all"] - middle["update"],
        "layer_refresh_ms": own,
        "look_ms": (middle["look"] - middle["adaptive"]) / len(names),
    }


def refreshing(
    *,
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = SEEDS,
    updates: int = UPDATES,
    clocked: bool = False,
    out: str | Path = "out",
    progress: bool = True,
    load: Callable = data.load_whole,
) -> dict[str, Any]:
    """Do the runs that are missing, or time updates; the content of ``<out>/adaptive_refresh.json``.

    Raises:
        DataError: If MNIST is not there.
        RecordError: If the record is damaged, of other settings, or cannot be written.
    """
    task = BENCHMARKS["mnist_autoencoder"].task(load("mnist"))
    settings = {
        "methods": METHODS,
        "scale": SCALE,
        "updates": updates,
        "evaluate_on": EVALUATE_ON,
        "batch": BATCH,
    }
    record = Record(Path(out) / "adaptive_refresh.json", "adaptive_refresh", settings)
    keys = [{"method": method, "part": "clock"} for method in methods]
    if not clocked:
        keys = [
            {"method": method, "every": str(every), "seed": seed, "data": task.data.variant}
            for method in methods
            for seed in seeds
            for every in SCHEDULES
        ]
    for key in tqdm(keys, disable=not progress):
        if record.find(**key) is None:
            if clocked:
                found = clock(task, key["method"])
            else:
                every = ADAPTIVE if key["every"] == ADAPTIVE else int(key["every"])
                found = fit(task, key["method"], every, key["seed"], updates)
            record.add({**key, **found, "provenance": provenance()}, once=key)
    return record.content


def drift(updates: int = 60, seed: int = 1) -> dict[str, Any]:
    """How one set of statistics ages in a small autoencoder: q of each layer, by its fresh value.

    Returns:
        ``"traces"`` by layer, ``"last"``: their last values, and ``"alt"``.
    """
    task = BENCHMARKS["mnist_small_autoencoder"].task(data.load("mnist", source="embedded"))
    model, optimizer = _made(task, "acp_bounded", None, seed)
    batches = Minibatches(len(task.train[0]), BATCH, torch.Generator().manual_seed(seed))
    x, y = (part[next(batches)] for part in task.train)
    optimizer.refresh(lambda: task.loss(model(x), y))
    forms: dict[torch.nn.Module, list[float]] = {layer: [] for _, layer in _layers(model)}
    for _ in range(updates + 1):
        h = task.train[0][next(batches)]
        with torch.no_grad():
            for module in model:
                if module in forms:
                    state, group = packed(optimizer.state[module.weight]), optimizer.param_groups[0]
                    forms[module].append(
                        optimizer.method.quadratic_form(h, h.mean(0), True, state, group).item()
                    )
                h = module(h)
        _step(task, model, optimizer, next(batches))
    traces = []
    for k, values in enumerate(forms.values()):
        look = {"line": {"color": color("acp", 0.35 + 0.65 * k / (len(forms) - 1))}, "name": f"layer {k + 1}"}
        traces.append(go.Scatter(y=[value / values[0] for value in values], mode="lines", **look))
    last = [values[-1] / values[0] for values in forms.values()]
    words = ", ".join(f"layer {k + 1} {value:.3g}" for k, value in enumerate(last))
    return {"traces": traces, "last": last, "alt": f"q by updates since the refresh; at the end {words}"}


def elapsed(run: dict[str, Any], prices: dict[str, Any]) -> list[float]:
    """Seconds of training at each point of a run, by the prices of its method."""
    if run["every"] == ADAPTIVE:
        own = prices["layer_refresh_ms"]  # but for the first, of all at once
        refreshes = [
            prices["refresh_ms"] * any(n) + sum(p * max(k - 1, 0) for p, k in zip(own, n, strict=True))
            for n in run["refreshes"]
        ]
        refreshes = [r + prices["look_ms"] * n for r, n in zip(refreshes, run["looks"], strict=True)]
        update = prices["adaptive_update_ms"]
    else:
        refreshes = [prices["refresh_ms"] * max(counts) for counts in run["refreshes"]]
        update = prices["update_ms"]
    return [1e-3 * (update * t + r) for t, r in zip(run["update"], refreshes, strict=True)]


def reached(at: Sequence[float], losses: Sequence[float], loss: float) -> float | None:
    """Where a curve first comes down to a loss, on the line between the points beside it."""
    for k in range(1, len(at)):
        if losses[k] <= loss:
            share = (losses[k - 1] - loss) / (losses[k - 1] - losses[k])
            return at[k - 1] + share * (at[k] - at[k - 1])
    return None


def by_schedule(content: dict[str, Any], method: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of a method, of the schedules that it has runs of."""
    runs = [run for run in content["runs"] if run["method"] == method and "every" in run]
    found = {str(every): [run for run in runs if run["every"] == str(every)] for every in SCHEDULES}
    return {every: some for every, some in found.items() if some}


def prices_of(content: dict[str, Any], method: str) -> dict[str, Any]:
    """What was clocked."""
    (found,) = (run for run in content["runs"] if run["method"] == method and run.get("part") == "clock")
    return found


def report(content: dict[str, Any], method: str) -> list[tuple[str, ...]]:
    """Rows of a table, the first one the head: what was refreshed, seconds to losses; means over seeds."""
    prices = prices_of(content, method)
    rows = [
        (
            "refreshes",
            "of each layer",
            "share of the time",
            *(f"seconds to {loss:g}" for loss in LOSSES),
            "last loss",
        )
    ]
    for every, runs in by_schedule(content, method).items():
        times = [elapsed(run, prices) for run in runs]
        plain = prices["adaptive_update_ms" if every == ADAPTIVE else "update_ms"] * 1e-3
        share = _mean([1 - plain * run["update"][-1] / t[-1] for run, t in zip(runs, times, strict=True)])
        count = _mean([sum(run["refreshes"][-1]) / len(run["refreshes"][-1]) for run in runs])
        hits = [
            [reached(t, run["train"], loss) for run, t in zip(runs, times, strict=True)] for loss in LOSSES
        ]
        words = ["not reached" if None in some else f"{_mean(some):.2f}" for some in hits]
        name = "adaptive" if every == ADAPTIVE else f"every {every}"
        rows.append(
            (name, f"{count:.0f}", f"{share:.1%}", *words, f"{_mean([r['train'][-1] for r in runs]):.2f}")
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def curves(content: dict[str, Any], method: str) -> go.Figure:
    """The training loss by seconds, a line for each seed: fixed schedules in grey, the adaptive one above."""
    prices, traces = prices_of(content, method), []
    dashes = dict(
        zip(map(str, SCHEDULES), ("dot", "dashdot", "dash", "longdash", "longdashdot"), strict=False)
    )
    for every, runs in by_schedule(content, method).items():
        look = {"line": {"color": color(method)}}
        if every != ADAPTIVE:
            look = {"line": {"color": COLORS["grey"], "dash": dashes[every], "width": 1.2}}
        name = "adaptive" if every == ADAPTIVE else f"every {every} updates"
        for k, run in enumerate(runs):
            at, own = elapsed(run, prices), {"name": name, "legendgroup": every, "showlegend": k == 0}
            traces.append(go.Scatter(x=at[1:], y=run["train"][1:], mode="lines", **(look | own)))
    rows = report(content, method)[1:]
    alt = "Training loss by seconds. Seconds to 18.9: " + ", ".join(f"{row[0]} {row[4]}" for row in rows)
    log = {"type": "log", "dtick": "D2"}
    axes = {"xaxis": {"title": "seconds", **log}, "yaxis": {"title": "training loss", **log}}
    return figure(traces, alt=alt, **axes)


def verdict(content: dict[str, Any], method: str) -> dict[float, tuple[str, float, bool]]:
    """By loss: the best fixed schedule, how much longer the adaptive one takes, and whether that is settled.

    Of seconds, means over seeds; a schedule of which a seed does not get there is not counted. It is settled
    if the seeds' differences, each from the same weights and minibatches, are of one sign.
    """
    found, prices = {}, prices_of(content, method)
    for loss in LOSSES:
        times = {}
        for every, runs in by_schedule(content, method).items():
            hits = [reached(elapsed(run, prices), run["train"], loss) for run in runs]
            if None not in hits:
                times[every] = hits
        ours = times.pop(ADAPTIVE)
        first = min(times, key=lambda every: _mean(times[every]))
        signs = {a < b for a, b in zip(ours, times[first], strict=True)}
        found[loss] = first, _mean(ours) / _mean(times[first]) - 1, len(signs) == 1
    return found
