"""Search replay (Thesis §4.2, Algorithm 1): biased random search, trial by trial, beside another sampler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lab.explorers.core import At, Explorer, First, Short, say, select, slider
from lab.explorers.interaction import AXES, DIVERGED, GOOD, Scale, cells, unit
from lab.plotting import COLORS, SAMPLERS, looks, style
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
    found = {(run["sampler"], run["seed"]): run for run in record["runs"] if "sampler" in run}
    samplers = [s for s in SAMPLERS if s != BIASED and any(key[0] == s for key in found)][::-1]
    seeds = sorted(s for sampler, s in found if sampler == BIASED and all((o, s) in found for o in samplers))
    if not samplers or not seeds:
        raise ValueError("this record holds no biased random search beside another")
    count = min(len(run["trials"]["loss"]) for run in found.values())
    seeds = seeds[: max(1, min(searches, ROOM // (count * CELLS**2)))]
    scale = Scale([found[s, seed] for s in (*samplers, BIASED) for seed in seeds])
    domain = found[BIASED, seeds[0]]["domain"]
    shown = At(np.arange(1, count + 1), "trial")

    def columns(run: dict[str, Any]) -> dict[str, Any]:
        trials = run["trials"]
        loss = [math.nan if v is None else v for v in trials["loss"]]
        symbol = [DIVERGED if math.isnan(v) else GOOD for v in loss]
        color = scale(trials["loss"])
        return {**trials, "loss": loss, "symbol": symbol, "color": color, "best": best_so_far(run)}

    def column(name: str, of: list[str], *by: str) -> At:
        values = np.array([[columns(found[s, seed])[name][:count] for s in of] for seed in seeds])
        return At(values if by else values[:, 0], "seed", *by)

    def panel(of: list[str], by: tuple[str, ...], axis: str) -> list[dict[str, Any]]:
        x, y, loss = (column(name, of, *by) for name in (*AXES, "loss"))
        trials = {
            "type": "scatter",
            "x": First(x, shown),
            "y": First(y, shown),
            "customdata": First(loss, shown),
            "mode": "markers",
            "marker": scale.marker(
                First(column("color", of, *by), shown),
                symbol=First(column("symbol", of, *by), shown),
                size=9,
                line={"width": 1, "color": "#ffffff"},
                showscale=False,
            ),
            "hovertemplate": "λ %{x:.3g}, s %{y:.3g}, loss %{customdata:.4g}<extra></extra>",
            "showlegend": False,
        }
        ring = {
            "type": "scatter",
            "x": [At(x, "trial")],
            "y": [At(y, "trial")],
            "mode": "markers",
            "marker": {"symbol": "circle-open", "size": 20, "color": COLORS["pink"], "line": {"width": 3}},
            "showlegend": False,
            "hoverinfo": "skip",
        }
        return [{**trace, "xaxis": f"x{axis}", "yaxis": "y"} for trace in (trials, ring)]

    maps = np.array([acceptance_maps(found[BIASED, seed])[:count] for seed in seeds])
    acceptance = {
        "type": "heatmap",
        "x": cells(domain["lr"], CELLS),
        "y": cells(domain["scale"], CELLS),
        "z": At(maps, "seed", "trial"),
        "zmin": 0,
        "zmax": 100,
        "colorscale": [[0, "rgba(23, 84, 251, 0)"], [1, "rgba(23, 84, 251, 0.5)"]],
        "showscale": False,
        "hovertemplate": "kept with probability %{z}%<extra></extra>",
        "xaxis": "x2",
        "yaxis": "y",
    }
    other, biased = column("best", samplers, "beside"), column("best", [BIASED])
    trial_numbers = np.arange(1, count + 1)
    race = [
        {
            "type": "scatter",
            "x": First(trial_numbers, shown),
            "y": First(y, shown),
            "mode": "lines",
            "name": name,
            "line": {"shape": "hv", "color": style(s)["line"]["color"]},
            "hovertemplate": "best of %{x}: %{y:.4g}",
            "xaxis": "x3",
            "yaxis": "y2",
        }
        for y, s, name in ((other, "random", "beside"), (biased, BIASED, looks(BIASED).name))
    ]
    race[0]["name"] = At([looks(s).name for s in samplers], "beside")
    kept = [_kept(found[BIASED, seed], these) for seed, these in zip(seeds, maps, strict=True)]
    ends = np.log10(domain["lr"]).tolist()
    log = {"type": "log", "dtick": 2, "tickangle": 0, "minor": {"dtick": 1}, "exponentformat": "power"}
    here = lambda name: Short(At(column(name, [BIASED]), "trial"))  # noqa: E731
    title = {s: row.name.replace(" ", "<br>", row.name.count(" ") - 1) for s, row in SAMPLERS.items()}
    panels = {"range": ends, **log}
    return Explorer(
        alt=f"Two searches of {count} trials each, by learning rate and init scale, coloured by loss, and "
        "the best loss of each so far. Behind biased random search: where it keeps proposals.",
        controls=[
            slider("trial", "trial", range(1, count + 1), min(16, count)),
            select("beside", "beside it", [looks(s).name for s in samplers]),
            select("seed", "seed", [str(seed) for seed in seeds]),
        ],
        traces=[*panel(samplers, ("beside",), ""), acceptance, *panel([BIASED], (), "2"), *race],
        layout={
            "xaxis": {
                "title": {"text": At([f"λ<br>{title[s]}" for s in samplers], "beside")},
                "domain": [0, 0.47],
                **panels,
            },
            "xaxis2": {
                "title": {"text": f"λ<br>{title[BIASED]}"},
                "domain": [0.53, 1],
                "anchor": "y",
                **panels,
            },
            "yaxis": {
                "title": {"text": "init scale s"},
                "domain": [0.44, 1],
                "range": np.log10(domain["scale"]).tolist(),
                **log,
            },
            "xaxis3": {"title": {"text": "trial"}, "range": [0.5, count + 0.5], "anchor": "y2"},
            "yaxis2": {
                "title": {"text": "best loss"},
                "type": "log",
                "dtick": "D2",
                "domain": [0, 0.24],
                "range": [scale.low - 0.02, scale.high + 0.02],
                "anchor": "x3",
            },
            "height": 640,
        },
        text=say(
            f"Trial {{trial}} of {count}: biased random search proposed λ {{lr}}, s {{scale}}, where it "
            "keeps {kept}% of proposals; loss {loss}. Best so far {best}, {beside} {other}.",
            trial=Short(shown),
            lr=here("lr"),
            scale=here("scale"),
            kept=At(np.array(kept), "seed", "trial"),
            loss=here("loss"),
            best=Short(At(biased, "trial")),
            beside=At([looks(s).name for s in samplers], "beside"),
            other=Short(At(other, "trial")),
        ),
    )


def _kept(run: dict[str, Any], maps: np.ndarray) -> np.ndarray:
    """A search's maps where its trials are, ``[trial]``."""
    places = [unit(run["trials"][axis][: len(maps)], run["domain"][axis]) for axis in AXES]
    across, up = (np.floor(place * CELLS).clip(0, CELLS - 1).astype(int) for place in places)
    return maps[np.arange(len(maps)), up, across]
