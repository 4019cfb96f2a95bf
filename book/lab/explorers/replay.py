"""Search replay (Thesis §4.2, Algorithm 1): biased random search, trial by trial, beside another sampler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lab.explorers.core import At, Explorer, First, Short, ring, say, select, slider
from lab.explorers.interaction import AXES, DIVERGED, GOOD, Scale, cells, unit
from lab.plotting import SAMPLERS, looks, style
from sogrid.experiments.search import Acceptance, winsorise
from sogrid.experiments.tuning import best_so_far

__all__ = ["acceptance_maps", "search_replay"]

CELLS, ROOM = 24, 120_000
BIASED = "biased"


def acceptance_maps(run: dict[str, Any], count: int = CELLS) -> np.ndarray:
    """Percentage of proposals that are kept before trial 1, 2, …, by place: ``[trial, scale, lr]``.

    Args:
        run: A search by learning rate and init scale.
        count: Cells of the map on each axis.
    """
    trials = run["trials"]
    points = np.stack([unit(trials[axis], run["domain"][axis]) for axis in AXES], 1)
    costs = [math.inf if loss is None else loss for loss in trials["loss"]]
    middle = (np.arange(count) + 0.5) / count
    grid = np.stack(np.meshgrid(middle, middle), -1)  # [scale, lr, (lr, scale)]
    maps = np.ones((len(costs), count, count))
    for n in range(len(costs)):
        keep = Acceptance(points[:n], winsorise(costs[:n]))
        if keep.tree is not None:
            _, nearest = keep.tree.query(grid)
            maps[n] = (keep.c_max - keep.costs[nearest]) / (keep.c_max - keep.c_min)
    return (100 * maps).round().astype(np.uint8)


def search_replay(record: dict[str, Any], searches: int = 3) -> Explorer:
    """Biased random search beside the record's other samplers, one trial more at each step.

    Args:
        record: Content of a record of Fig. 4.1.
        searches: How many of its searches, those of the lowest seeds; fewer where they would be too large.

    Raises:
        ValueError: If the record holds no biased random search beside another.
    """
    data = _Searches(record, searches)
    maps = np.array([acceptance_maps(run)[: data.count] for run in data.biased])
    names = [looks(s).name for s in data.samplers]
    return Explorer(
        alt=f"Two searches of {data.count} trials each, by learning rate and init scale, coloured by loss, "
        "and the best loss of each so far. Behind biased random search: where it keeps proposals.",
        controls=[
            slider("trial", "trial", range(1, data.count + 1), min(16, data.count), plays=True),
            select("beside", "beside it", names),
            select("seed", "seed", [str(seed) for seed in data.seeds]),
        ],
        traces=[
            *_panel(data, data.samplers, ("beside",), ""),
            _acceptance(data, maps),
            *_panel(data, [BIASED], (), "2"),
            *_race(data, names),
            _key(data.scale),
        ],
        layout=_layout(data),
        text=_sentence(data, maps, names),
    )


class _Searches:
    """Those of a record that are replayed, and what of them the picture looks up.

    Attributes:
        samplers: Beside biased random search.
        seeds: Of searches that every sampler has.
        count: Of trials.
        shown: How many trials are seen.
    """

    def __init__(self, record: dict[str, Any], searches: int) -> None:
        self.found = {(run["sampler"], run["seed"]): run for run in record["runs"] if "sampler" in run}
        samplers = [s for s in SAMPLERS if s != BIASED and any(key[0] == s for key in self.found)]
        self.samplers = samplers[::-1]
        seeds = sorted(
            seed for s, seed in self.found if s == BIASED and all((o, seed) in self.found for o in samplers)
        )
        if not samplers or not seeds:
            raise ValueError("this record holds no biased random search beside another")
        self.count = min(len(run["trials"]["loss"]) for run in self.found.values())
        self.seeds = seeds[: max(1, min(searches, ROOM // (self.count * CELLS**2)))]
        self.biased = [self.found[BIASED, seed] for seed in self.seeds]
        self.domain = self.biased[0]["domain"]
        self.scale = Scale([self.found[s, seed] for s in (*self.samplers, BIASED) for seed in self.seeds])
        self.shown = At(np.arange(1, self.count + 1), "trial")

    def column(self, name: str, of: list[str], *by: str) -> At:
        """One entry of every trial, by seed and, of several samplers, by what chooses among them."""
        table = lambda sampler, seed: self._columns(self.found[sampler, seed])[name][: self.count]  # noqa: E731
        values = np.array([[table(sampler, seed) for sampler in of] for seed in self.seeds])
        return At(values if by else values[:, 0], "seed", *by)

    def _columns(self, run: dict[str, Any]) -> dict[str, Any]:
        trials = run["trials"]
        loss = [math.nan if v is None else v for v in trials["loss"]]
        symbol = [DIVERGED if math.isnan(v) else GOOD for v in loss]
        color = self.scale(trials["loss"])
        return {**trials, "loss": loss, "symbol": symbol, "color": color, "best": best_so_far(run)}


def _panel(data: _Searches, of: list[str], by: tuple[str, ...], axis: str) -> list[dict[str, Any]]:
    """Trials so far, the last of them ringed."""
    shown = data.shown
    x, y, loss = (data.column(name, of, *by) for name in (*AXES, "loss"))
    trials = {
        "type": "scatter",
        "x": First(x, shown),
        "y": First(y, shown),
        "customdata": First(loss, shown),
        "mode": "markers",
        "marker": data.scale.marker(
            First(data.column("color", of, *by), shown),
            symbol=First(data.column("symbol", of, *by), shown),
            size=9,
            line={"width": 1, "color": "#ffffff"},
            showscale=False,
        ),
        "hovertemplate": "λ %{x:.3g}, s %{y:.3g}, loss %{customdata:.4g}<extra></extra>",
        "showlegend": False,
    }
    last = ring(At(x, "trial"), At(y, "trial"), size=20)
    return [{**trace, "xaxis": f"x{axis}", "yaxis": "y"} for trace in (trials, last)]


def _acceptance(data: _Searches, maps: np.ndarray) -> dict[str, Any]:
    """Where the next proposal would be kept."""
    return {
        "type": "heatmap",
        "x": cells(data.domain["lr"], CELLS),
        "y": cells(data.domain["scale"], CELLS),
        "z": At(maps, "seed", "trial"),
        "zmin": 0,
        "zmax": 100,
        "colorscale": [[0, "rgba(23, 84, 251, 0)"], [1, "rgba(23, 84, 251, 0.5)"]],
        "showscale": False,
        "hovertemplate": "kept with probability %{z}%<extra></extra>",
        "xaxis": "x2",
        "yaxis": "y",
    }


def _race(data: _Searches, names: list[str]) -> list[dict[str, Any]]:
    """The best loss so far, of the sampler beside and of biased random search."""
    other, biased = data.column("best", data.samplers, "beside"), data.column("best", [BIASED])
    return [
        {
            "type": "scatter",
            "x": First(np.arange(1, data.count + 1), data.shown),
            "y": First(y, data.shown),
            "mode": "lines",
            "name": name,
            "line": {"shape": "hv", "color": style(sampler)["line"]["color"]},
            "hovertemplate": "best of %{x}: %{y:.4g}",
            "xaxis": "x3",
            "yaxis": "y2",
        }
        for y, sampler, name in (
            (other, "random", At(names, "beside")),
            (biased, BIASED, looks(BIASED).name),
        )
    ]


def _key(scale: Scale) -> dict[str, Any]:
    """What colours mean: a strip of all of them."""
    logs = np.linspace(scale.low, scale.high, 65)
    return {
        "type": "heatmap",
        "x": 10**logs,
        "y": [0],
        "z": logs[None],
        "showscale": False,
        "hoverinfo": "skip",
        "xaxis": "x4",
        "yaxis": "y3",
        **scale.colorscale(),
    }


def _layout(data: _Searches) -> dict[str, Any]:
    """The colours' key, two panels, and the race below."""
    log = {"type": "log", "dtick": 2, "tickangle": 0, "minor": {"dtick": 1}, "exponentformat": "power"}
    title = {s: row.name.replace(" ", "<br>", row.name.count(" ") - 1) for s, row in SAMPLERS.items()}
    panels = {"range": np.log10(data.domain["lr"]).tolist(), **log}
    beside = At([f"λ<br>{title[s]}" for s in data.samplers], "beside")
    limits = [data.scale.low - 0.02, data.scale.high + 0.02]
    best = {"type": "log", "dtick": "D2", "domain": [0, 0.18], "range": limits, "anchor": "x3"}
    key = {"type": "log", "dtick": "D2", "range": [data.scale.low, data.scale.high], "fixedrange": True}
    scales = np.log10(data.domain["scale"]).tolist()
    return {
        "xaxis": {"title": {"text": beside}, "domain": [0, 0.47], **panels},
        "xaxis2": {
            "title": {"text": f"λ<br>{title[BIASED]}"},
            "domain": [0.53, 1],
            "anchor": "y",
            **panels,
        },
        "yaxis": {"title": {"text": "init scale s"}, "domain": [0.42, 0.86], "range": scales, **log},
        "xaxis3": {"title": {"text": "trial"}, "range": [0.5, data.count + 0.5], "anchor": "y2"},
        "yaxis2": {"title": {"text": "best loss"}, **best},
        "xaxis4": {"title": {"text": "loss of a trial (crosses diverged)"}, "anchor": "y3", **key},
        "yaxis3": {"visible": False, "domain": [0.97, 1], "anchor": "x4"},
        "legend": {"y": 0.2},
        "height": 740,
    }


def _sentence(data: _Searches, maps: np.ndarray, names: list[str]) -> list[Any]:
    here = lambda name: Short(At(data.column(name, [BIASED]), "trial"))  # noqa: E731
    kept = [_kept(run, these) for run, these in zip(data.biased, maps, strict=True)]
    return say(
        f"Trial {{trial}} of {data.count}: biased random search proposed λ {{lr}}, s {{scale}}, where it "
        "keeps {kept}% of proposals; loss {loss}. Best so far {best}, {beside} {other}.",
        trial=Short(data.shown),
        lr=here("lr"),
        scale=here("scale"),
        kept=At(np.array(kept), "seed", "trial"),
        loss=here("loss"),
        best=here("best"),
        beside=At(names, "beside"),
        other=Short(At(data.column("best", data.samplers, "beside"), "trial")),
    )


def _kept(run: dict[str, Any], maps: np.ndarray) -> np.ndarray:
    """A search's maps where its trials are, ``[trial]``."""
    places = [unit(run["trials"][axis][: len(maps)], run["domain"][axis]) for axis in AXES]
    across, up = (np.floor(place * CELLS).clip(0, CELLS - 1).astype(int) for place in places)
    return maps[np.arange(len(maps)), up, across]
