r"""The local criterion (Thesis §6.1): one input, one output; a cloud of wishes that the reader drags.

Each point is an example: its input :math:`h_i` to the right, its wish :math:`-\lambda g_i` upwards. A change
of the layer is a line, :math:`\Delta W h + \Delta b`. With c the covariance of inputs and wishes, v the
variance of inputs and bars for means, the solution of the criterion has the slope
:math:`c/(v + \varepsilon)` and goes through :math:`(\bar h, -\lambda\bar g)`. Gradient descent has the slope
:math:`c + \bar h(-\lambda\bar g)` and meets the axis :math:`h = 0` at :math:`-\lambda\bar g`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lab.explorers.core import At, Explorer, Out, Short, ring, say, slider
from lab.plotting import COLORS

__all__ = ["DATA", "START", "cloud", "regression_line", "regression_lines"]

SLOPE, NOISE, EXAMPLES = -1.2, 0.25, 60
ENDS = -3.0, 4.0
START = {"mean": 1.5, "wish": -0.4, "spread": 0.4, "damping": 0.0}
LINES = {
    "descent": ("gradient descent", "grey", "dash"),
    "solution": ("solution of the criterion", "orange", "solid"),
}


def _data() -> dict[str, Any]:
    """Inputs of mean 0 and variance 1, and wishes of mean 0 beside a line, as lists."""
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal((2, EXAMPLES))
    z, noise = (z - z.mean()) / z.std(), NOISE * (noise - noise.mean())
    return {"z": z.round(4).tolist(), "noise": noise.round(4).tolist(), "slope": SLOPE, "ends": list(ENDS)}


DATA = _data()


def cloud(
    mean: float, wish: float, spread: float, data: dict[str, Any] = DATA
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and wishes, ``[n]`` each.

    Args:
        mean: Of the inputs.
        wish: Mean of the wishes.
        spread: Standard deviation of the inputs.
        data: See ``DATA``.
    """
    deviation = spread * np.array(data["z"])
    return mean + deviation, wish + data["slope"] * deviation + np.array(data["noise"])


def regression_lines(values: dict[str, float], data: dict[str, Any]) -> dict[str, Any]:
    """Both changes of the layer, and how far from the wishes they are.

    Args:
        values: ``mean``, ``wish`` and ``spread`` of :func:`cloud`, and ``damping``: ε.
        data: See ``DATA``.

    Returns:
        ``x`` and ``y``, the cloud; ``rest``, the mean squared wish; for each line: ``y``, its heights at the
        ends, ``slope``, and ``miss``, the mean squared distance from the wishes.
    """
    h, t = cloud(values["mean"], values["wish"], values["spread"], data)
    v, c = h.var(), ((h - h.mean()) * t).mean()
    slope = c / (v + values["damping"])
    lines = {"descent": ((h * t).mean(), t.mean()), "solution": (slope, t.mean() - slope * h.mean())}
    out: dict[str, Any] = {"x": h.tolist(), "y": t.tolist(), "rest": float((t**2).mean())}
    for name, (w, b) in lines.items():
        heights = [float(w * end + b) for end in data["ends"]]
        out[name] = {"y": heights, "slope": float(w), "miss": float(((w * h + b - t) ** 2).mean())}
    out["worse"] = int(out["descent"]["miss"] > out["rest"])
    return out


def regression_line() -> Explorer:
    """Wishes against inputs, a cloud to drag, and the lines of the solution and of gradient descent."""
    means, wishes = np.linspace(-2, 3, 51).round(1), np.linspace(-2, 2, 41).round(1)
    return Explorer(
        alt="A cloud of points that falls to the right, which can be dragged by its mean. The line of the "
        "criterion's solution moves with it; gradient descent's line tilts as the cloud leaves the middle, "
        "and misses it.",
        controls=[
            slider("mean", "mean of the inputs h̄", means, START["mean"]),
            slider("wish", "mean wish −λḡ", wishes, START["wish"]),
            slider("spread", "spread of the inputs", np.linspace(0.1, 1, 10).round(1), START["spread"]),
            slider("damping", "damping ε", (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5), START["damping"]),
        ],
        traces=[_wishes(), *map(_line, LINES), ring(At(means, "mean"), At(wishes, "wish"), size=16)],
        layout={
            "xaxis": {"title": {"text": "input h"}, "range": list(ENDS), "fixedrange": True, "dtick": 1},
            "yaxis": {
                "title": {"text": "change of the pre-activation"},
                "range": [-4, 4],
                "fixedrange": True,
                "dtick": 2,
            },
            "height": 440,
        },
        text=say(
            "Doing nothing misses the wishes by {rest} (mean squared), gradient descent by {descent}{worse}, "
            "the solution by {solution}. Slopes: {steep} and {right}.",
            rest=Short(Out("rest")),
            descent=Short(Out("descent", "miss")),
            worse=At(["", ", worse than nothing"], Out("worse")),
            solution=Short(Out("solution", "miss")),
            steep=Short(Out("descent", "slope")),
            right=Short(Out("solution", "slope")),
        ),
        formula=regression_lines,
        data=DATA,
        handle=("mean", "wish"),
    )


def _wishes() -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": Out("x"),
        "y": Out("y"),
        "mode": "markers",
        "name": "wish −λg",
        "marker": {"color": COLORS["blue"], "size": 6},
        "hovertemplate": "h %{x:.2f}: %{y:.2f}<extra></extra>",
    }


def _line(name: str) -> dict[str, Any]:
    """Of one of the two changes."""
    words, shade, dash = LINES[name]
    return {
        "type": "scatter",
        "x": list(ENDS),
        "y": Out(name, "y"),
        "mode": "lines",
        "name": words,
        "line": {"color": COLORS[shade], "dash": dash},
        "hoverinfo": "skip",
    }
