"""Live landscape (Thesis §2.3): the loss over learning rate and init scale, trained anew at each change.

An 8 × 8 grid of small autoencoders trains as one batch (:mod:`sogrid.experiments.grid`), so that in
JupyterLab a change of the optimizer, the damping or the minibatch is answered by training all 64 again. The
built book, where nothing can train, looks the same losses up in a record that this module makes::

    python -m lab.explorers.landscape
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from lab.explorers.core import At, Control, Explorer, Out, Short, ring, say, select, short, slider
from lab.explorers.widgets import View
from sogrid.experiments.benchmarks import METHODS, Task
from sogrid.experiments.grid import pooled_digits, train_grid
from sogrid.experiments.records import RESULTS, Record, provenance

__all__ = ["RECORD", "SETTINGS", "LiveExplorer", "live_landscape", "record_landscape", "train_landscape"]

RECORD = RESULTS / "live_landscape.json"

SETTINGS = {
    "methods": ["standard_sgd", "centered_gradient_descent", "acp", "nnn2", "kfac"],
    "damping": [0.001, 0.01, 0.1, 1.0],
    "batch": [50, 100, 200],
    "updates": [25, 50, 100, 200],
    "lr": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0],
    "scale": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0],
    "evaluate_on": 500,
    "seed": 0,
}
"""What the reader can choose, and the grid; every configuration sees the same data in the same order."""


@cache
def _task() -> Task:
    """The autoencoder on 8 × 8 digits; what is held out plays no part here."""
    task = pooled_digits()
    return replace(task, test=tuple(part[:1] for part in task.test))


def train_landscape(settings: dict[str, Any], method: str, damping: float | None, batch: int) -> np.ndarray:
    """Training losses to four digits, ``[updates, scale, lr]``; NaN where it diverged.

    Args:
        settings: As :data:`SETTINGS`.
        method: One of its methods.
        damping: ε, or ``None`` for a method without one.
        batch: Examples per update.
    """
    own = {} if damping is None else {"damping": damping}
    grid = [{"lr": lr, "scale": scale, **own} for scale in settings["scale"] for lr in settings["lr"]]
    plan = {"updates": settings["updates"][-1], "points": settings["updates"], "batch": batch}
    curves = train_grid(
        _task(), method, grid, seeds=settings["seed"], evaluate_on=settings["evaluate_on"], **plan
    )
    missing = [np.nan] * len(settings["updates"])
    losses = np.array([(curve.train + missing)[: len(missing)] for curve in curves])
    shape = len(missing), len(settings["scale"]), len(settings["lr"])
    return np.array([float(f"{loss:.4g}") for loss in losses.T.flat]).reshape(shape)


def record_landscape(
    path: str | Path = RECORD, settings: dict[str, Any] = SETTINGS, progress: bool = False
) -> dict[str, Any]:
    """Train every landscape that the controls can ask for; what the file holds already is not trained again.

    Args:
        path: Of the record.
        settings: As :data:`SETTINGS`.
        progress: Show a bar.

    Returns:
        The record's content.

    Raises:
        RecordError: If the file cannot be written, or holds something else.
    """
    record = Record(path, "live_landscape", {**settings, "data": _task().data.variant})
    wanted = [
        {"method": method, "damping": damping, "batch": batch}
        for method, batch in product(settings["methods"], settings["batch"])
        for damping in dict.fromkeys(_own(method, damping) for damping in settings["damping"])
    ]
    for key in tqdm(wanted, disable=not progress):
        if record.find(**key) is None:
            losses = train_landscape(settings, **key)
            cells = [None if np.isnan(loss) else loss for loss in losses.flat]
            record.add({**key, "train": cells, "provenance": provenance()})
    return record.content


class LiveExplorer(Explorer):
    """An explorer whose view in JupyterLab computes what its view in the book looks up.

    Args:
        live: The same picture, with a formula.
        **picture: See :class:`~lab.explorers.core.Explorer`.
    """

    def __init__(self, live: Explorer, **picture: Any) -> None:
        """See the class."""
        super().__init__(**picture)
        self.live = live

    def widget(self) -> View:
        """The live view; sliders wait until they are let go."""
        view = View(self.live)
        for control in view.controls.values():
            if control.has_trait("continuous_update"):
                control.continuous_update = False
        return view


def live_landscape(record: dict[str, Any] | None = None) -> LiveExplorer:
    """Loss by learning rate and init scale, for a method, damping, minibatch and number of updates.

    Args:
        record: Content of a record of ``record_landscape()``; default the book's.
    """
    record = Record.read(RECORD) if record is None else record
    settings = record["settings"]
    methods, dampings, batches, updates = (settings[k] for k in ("methods", "damping", "batch", "updates"))
    found = {(run["method"], run["damping"], run["batch"]): run["train"] for run in record["runs"]}
    shape = len(updates), len(settings["scale"]), len(settings["lr"])
    recorded = np.array(
        [[[np.reshape(found[m, _own(m, d), b], shape) for b in batches] for d in dampings] for m in methods],
        dtype=float,
    )
    names = [METHODS[method].name for method in methods]
    train = cache(partial(train_landscape, settings))

    def trained(values: dict[str, Any], data: Any) -> dict[str, np.ndarray]:
        method = methods[names.index(values["method"])]
        losses = train(method, _own(method, values["damping"]), int(values["batch"]))
        return _summary(losses[updates.index(values["updates"])])

    controls = [
        select("method", "optimizer", names, METHODS["acp"].name if "acp" in methods else None),
        slider("damping", "damping ε", dampings, 0.1),
        slider("batch", "examples in a minibatch", batches),
        slider("updates", "updates", updates),
    ]
    limits = np.log10([np.nanmin(recorded), np.nanquantile(recorded, 0.9)]).tolist()
    picture = partial(_picture, settings, controls, limits, [_own(m, 1.0) is not None for m in methods])
    lookup = {name: At(v, *(c.name for c in controls)) for name, v in _summary(recorded).items()}
    live = Explorer(formula=trained, **picture({name: Out(name) for name in lookup}))
    return LiveExplorer(live, **picture(lookup))


def _own(method: str, damping: float) -> float | None:
    """The damping, for a method that has one."""
    return damping if "damping" in METHODS[method].settings else None


def _summary(losses: np.ndarray) -> dict[str, np.ndarray]:
    """What is drawn and said of losses ``[..., scale, lr]``."""
    flat = losses.reshape(*losses.shape[:-2], -1)
    best = np.where(np.isnan(flat), np.inf, flat).argmin(-1)
    least = np.take_along_axis(flat, best[..., None], -1)[..., 0]
    up, across = np.divmod(best, losses.shape[-1])
    seen = {
        "color": np.log10(losses).astype(np.float32),
        "best": least.astype(np.float32),
        "up": up,
        "across": across,
        "good": (flat <= 1.2 * least[..., None]).sum(-1),
        "diverged": np.isnan(flat).sum(-1),
    }
    return {name: np.asarray(value) for name, value in seen.items()}


def _picture(
    settings: dict[str, Any],
    controls: list[Control],
    limits: list[float],
    damped: list[bool],
    seen: dict[str, Any],
) -> dict[str, Any]:
    """All of the explorer but for where the losses come from, which are ``seen``."""
    lr, scale = settings["lr"], settings["scale"]
    grid = {
        "type": "heatmap",
        "x": np.arange(len(lr)),
        "y": np.arange(len(scale)),
        "z": seen["color"],
        "zmin": limits[0],
        "zmax": limits[1],
        "colorscale": "Cividis",
        "reversescale": True,
        "colorbar": {"title": {"text": "log₁₀ loss"}, "thickness": 12},
        "text": [[f"λ {short(across)}, s {short(up)}" for across in lr] for up in scale],
        "hovertemplate": "%{text}: log₁₀ loss %{z:.3f}<extra></extra>",
    }
    axis = lambda title, values: {  # noqa: E731
        "title": {"text": title},
        "tickvals": list(range(len(values))),
        "ticktext": [short(v) for v in values],
        "range": [-0.5, len(values) - 0.5],
    }
    return {
        "alt": f"Training loss of {len(lr) * len(scale)} small autoencoders by learning rate and init scale, "
        "after so many updates; the best is ringed, and those that diverged are left blank.",
        "controls": controls,
        "traces": [grid, ring(seen["across"], seen["up"])],
        "layout": {
            "xaxis": axis("learning rate λ", lr),
            "yaxis": axis("init scale s", scale),
            "height": 480,
        },
        "text": say(
            f"Best loss {{best}} with λ {{lr}}, s {{scale}}; {{good}} of {len(lr) * len(scale)} are within "
            "20% of it, {diverged} diverged.{no_damping}",
            best=Short(seen["best"]),
            lr=Short(At(np.array(lr), seen["across"])),
            scale=Short(At(np.array(scale), seen["up"])),
            good=Short(seen["good"]),
            diverged=Short(seen["diverged"]),
            no_damping=At([" This optimizer has no damping.", ""], At(np.array(damped, int), "method")),
        ),
    }


if __name__ == "__main__":
    record_landscape(*sys.argv[1:2], progress=True)
