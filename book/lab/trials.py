"""Studies of this book: methods searched on one grid, run from other seeds, and compared seed by seed.

Every method of a study gets the same number of settings, tried from two seeds; the best of each runs from
twenty others, the same for all. Two methods are then pairs, and of the logarithm of their ratio a t-test has
to say p < 0.01, a one-sided one where a study says so. ``python -m lab study NAME`` makes the record.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import plotly.graph_objects as go
from scipy.stats import ttest_1samp
from tqdm.auto import tqdm

from lab.plotting import COLORS, figure
from sogrid.experiments.records import RESULTS, Record, alone, provenance

__all__ = [
    "FEW_SEEDS",
    "LEVEL",
    "SEARCH_SEEDS",
    "SEEDS",
    "Study",
    "Trials",
    "dots",
    "is_smoke",
    "number",
    "paired",
    "tuned",
]

SEARCH_SEEDS, SEEDS = (21, 22), tuple(range(301, 321))
FEW_SEEDS = {"seeds": SEEDS[:2], "search_seeds": SEARCH_SEEDS[:1]}
"""Of a study at smoke scale."""
LEVEL = 0.01

Settings = dict[str, Any]
Runs = Callable[[list[Settings], list[int]], list[dict[str, Any]]]


def is_smoke(profile: str) -> bool:
    """Whether a profile of what this book does beyond the thesis is the small one.

    Raises:
        ValueError: If there is no such profile.
    """
    if profile not in ("smoke", "laptop"):
        raise ValueError(f"profile must be smoke or laptop, got {profile!r}")
    return profile == "smoke"


class Trials(NamedTuple):
    """What became of one method.

    Attributes:
        settings: The best of the grid.
        searched: Mean loss over the search's seeds, for each setting; infinite if one diverged.
        runs: From the seeds that count; ``"loss"`` is what is compared, ``None`` if it diverged.
    """

    settings: Settings
    searched: list[float]
    runs: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        """Of the runs that count, infinite where one diverged."""
        return [number(run["loss"]) for run in self.runs]

    def entry(self) -> dict[str, Any]:
        """As it goes into a record."""
        searched = [v if math.isfinite(v) else None for v in self.searched]
        return {**self._asdict(), "searched": searched, "provenance": provenance()}


def number(loss: float | None) -> float:
    """A loss of a record, infinite if the run diverged."""
    return math.inf if loss is None or not math.isfinite(loss) else loss


def tuned(
    run: Runs,
    grid: Sequence[Settings],
    seeds: Sequence[int] = SEEDS,
    search_seeds: Sequence[int] = SEARCH_SEEDS,
) -> Trials:
    """Search a grid, and run the best of it.

    Args:
        run: Trains each of some settings from its seed, as one batch if it can.
        grid: What is searched.
        seeds: Of the runs that count.
        search_seeds: Of the search.

    Raises:
        ValueError: If there is no setting from which all runs of the search finished.
    """
    grid = list(grid)
    found = run(grid * len(search_seeds), [seed for seed in search_seeds for _ in grid])
    losses = [number(one["loss"]) for one in found]
    means = [fmean(losses[k :: len(grid)]) for k in range(len(grid))]
    if not math.isfinite(min(means)):
        raise ValueError("every setting of the grid diverged from a seed: search another grid")
    best = grid[means.index(min(means))]
    return Trials(best, means, run([best] * len(seeds), list(seeds)))


def paired(first: Sequence[float], second: Sequence[float], sided: int = 2) -> tuple[int, float, float]:
    """(1 if the first method is ahead, −1 if the second, else 0; mean ratio second/first; p).

    Seeds at which one diverged are no pairs, and a method that diverged from more seeds than the other
    cannot be said to be ahead.

    Args:
        first: Losses by seed, infinite if diverged.
        second: Likewise, from the same seeds.
        sided: 2, or 1 for the test of the one side on which the mean is: of two methods that are alike, one
            or the other is then found ahead with twice the chance of the level.
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if math.isfinite(a + b)]
    if len(pairs) < 2:
        return 0, math.nan, math.nan
    logs = [math.log(b / a) for a, b in pairs]
    mean, p = fmean(logs), float(ttest_1samp(logs, 0.0).pvalue) * sided / 2
    sign = 1 if mean > 0 else -1
    lost = [sum(map(math.isinf, some)) for some in (first, second)][::sign]
    return (sign if p < LEVEL and lost[0] <= lost[1] else 0), math.exp(mean), p


def dots(
    pairs: dict[str, tuple[Sequence[float], Sequence[float]]], told: dict[str, str], *, x: str
) -> go.Figure:
    """Second loss over first, a dot for each seed at which neither diverged, and a bar at each mean.

    Args:
        pairs: By row: losses by seed of the first method, and of the second.
        told: By row: the verdict, for the alt text.
        x: Title of the axis.
    """
    traces, words, ends = [], [], [1.0]
    look = {"mode": "markers", "marker": {"color": COLORS["orange"], "opacity": 0.5, "size": 8}}
    bar = {"color": COLORS["blue"], "symbol": "line-ns-open", "size": 22, "line": {"width": 3}}
    for name, (first, second) in pairs.items():
        values = [b / a for a, b in zip(first, second, strict=True) if math.isfinite(a + b)]
        _, mean, _ = paired(first, second)
        own = {"showlegend": not traces, "mode": "markers"}
        traces += [
            go.Scatter(x=values, y=[name] * len(values), name="a seed", **{**look, **own}),
            go.Scatter(x=[mean], y=[name], name="mean", marker=bar, **own),
        ]
        words.append(f"{name}: {mean:.2f}, {told[name]}")
        ends += values
    step = 0.1 if max(ends) / min(ends) < 2.2 else 0.5
    ticks = [step * k for k in range(1, 200) if min(ends) <= step * k <= max(ends)]
    line = {"dash": "dot", "width": 1, "color": COLORS["grey"]}
    return figure(
        traces,
        alt=f"{x}, a dot for each seed. Means: {'; '.join(words)}.",
        xaxis={"title": x, "type": "log", "tickvals": ticks, "tickformat": ".3~g", "tickangle": 0},
        yaxis={"autorange": "reversed", "ticksuffix": " "},
        shapes=[{"type": "line", "line": line, "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper"}],
        height=90 + 50 * len(pairs),
    )


@dataclass(frozen=True)
class Study:
    """An experiment of parts, each an entry of one record.

    Attributes:
        name: Of the record, too.
        settings: What defines it.
        keys: What tells its parts apart.
        run: Makes the entry of a part from its key's values, and options.
        few: The options at smoke scale.
    """

    name: str
    settings: dict[str, Any]
    keys: Sequence[dict[str, Any]]
    run: Callable[..., dict[str, Any]]
    few: dict[str, Any] = field(default_factory=dict)

    def record(
        self, out: str | Path = "out", progress: bool = True, profile: str = "laptop"
    ) -> dict[str, Any]:
        """Do the parts that are missing; the content of ``<out>/<name>.json``.

        Args:
            out: Folder of the record.
            progress: Show a bar.
            profile: ``"laptop"``, or ``"smoke"`` for a moment and ``<out>/<name>.smoke.json``.

        Raises:
            RecordError: If the record is damaged, of other settings, or cannot be written.
            ValueError: For another profile.
        """
        smoke = is_smoke(profile)
        few = self.few if smoke else {}
        record = Record(
            Path(out) / f"{self.name}{'.smoke' * smoke}.json", self.name, {**self.settings, **few}
        )
        for key in tqdm(self.keys, disable=not progress):
            place = record.path.with_suffix("." + "-".join(re.findall(r"\w+", str([*key.values()]))))
            with alone(place):  # another process may be at it: its result is ours
                record = Record(record.path, self.name, record.content["settings"])
                if record.find(**key) is None:
                    record.add({**key, **self.run(**key, **few)}, once=key)
        return record.content

    def read(self) -> dict[str, Any]:
        """The record that the book shows.

        Raises:
            RecordError: If it is missing, damaged, or of other settings than these.
        """
        path = RESULTS / f"{self.name}.json"
        Record.read(path)  # must be there
        return Record(path, self.name, self.settings).content
