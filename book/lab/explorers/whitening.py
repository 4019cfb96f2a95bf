r"""Whitening in two dimensions (Thesis §6.4.2): inputs in three coordinates, and gradient descent in each.

A layer with two inputs and one output has the loss :math:`\delta^{\mathsf T} M \delta`, with
:math:`\delta = [\Delta W, \Delta b]` how far its parameters are from the best, and M the second moment of
:math:`[h; 1]`. In other coordinates of the input, h - μ or U(h - μ), the parameters are others, and so is M.
A step of gradient descent is :math:`\delta \leftarrow \delta - 2\lambda M\delta`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lab.explorers.core import At, Explorer, Out, ring, say, slider
from lab.plotting import COLORS

__all__ = ["DATA", "whitening", "whitening_by_hand"]

EXAMPLES, UPDATES = 120, 20
GOAL = 0.01
ERROR = 1.0, -0.5, 0.5
COORDINATES = {
    "h": ("h", "grey", "circle", "solid"),
    "centred": ("h − μ", "purple", "cross", "dash"),
    "white": ("U(h − μ)", "green", "diamond", "solid"),
}


def _data() -> dict[str, Any]:
    """Draws of mean zero and covariance I, as lists."""
    z = np.random.default_rng(0).standard_normal((EXAMPLES, 2))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / len(z))).T
    return {"z": z.round(12).tolist(), "error": list(ERROR), "updates": UPDATES, "goal": GOAL}


DATA = _data()


def whitening(values: dict[str, float], data: dict[str, Any]) -> dict[str, Any]:
    """The inputs and the losses of gradient descent, in each of the coordinates.

    Args:
        values: ``mean1`` and ``mean2`` of the inputs, their ``correlation`` (both have variance 1),
            ``damping`` of U = (C + εI)^(-1/2), and ``lr``: λ.
        data: See ``DATA``.

    Returns:
        For each of the coordinates: ``x`` and ``y``, the inputs; ``loss`` before each update and after the
        last, relative to the first; and ``count``, the updates to a hundredth of it, one too many if there
        are not enough. ``diverges``: 1 if gradient descent ends higher than it begins, with the inputs h.
    """
    z, mean, r = np.array(data["z"]), np.array([values["mean1"], values["mean2"]]), values["correlation"]
    centred = np.stack([z[:, 0], r * z[:, 0] + np.sqrt(1 - r * r) * z[:, 1]], 1)
    C = centred.T @ centred / len(z)
    U = _inverse_root(C + values["damping"] * np.eye(2))
    w, b = np.array(data["error"][:2]), data["error"][2]
    white = np.linalg.solve(U, w)  # of V in V U = W; U is symmetric
    points = {
        "h": (mean + centred, w, b),
        "centred": (centred, w, b + w @ mean),
        "white": (centred @ U, white, b + w @ mean),
    }
    out = {}
    for name, (h, w, b) in points.items():
        ones = np.concatenate([h, np.ones((len(h), 1))], 1)
        M, error = ones.T @ ones / len(h), np.array([*w, b])
        losses = [error @ M @ error]
        for _ in range(data["updates"]):
            error = error - 2 * values["lr"] * M @ error
            losses.append(error @ M @ error)
        x, y = h.T.tolist()
        loss = [float(v / losses[0]) for v in losses]
        count = next((i for i, v in enumerate(loss) if v <= data["goal"]), len(loss))
        out[name] = {"x": x, "y": y, "loss": loss, "count": count}
    out["diverges"] = int(out["h"]["loss"][-1] > 1)
    return out


def _inverse_root(M: np.ndarray) -> np.ndarray:
    """M^(-1/2) of a symmetric positive 2 × 2 matrix: its root is (M + sI)/t, s² = det M, t² = tr M + 2s."""
    s = np.sqrt(np.linalg.det(M))
    return np.linalg.inv((M + s * np.eye(2)) / np.sqrt(np.trace(M) + 2 * s))


def whitening_by_hand() -> Explorer:
    """Inputs that the reader drags and turns, what whitening makes of them, and how fast they are learned."""
    means = np.linspace(-1, 3, 41).round(1)
    counts = [*map(str, range(UPDATES + 1)), f"more than {UPDATES}"]
    rates = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    return Explorer(
        alt="Three clouds of points: the inputs, to be dragged, the same centred, and the same whitened, "
        "which are round. Below, the loss of gradient descent by update in each of these coordinates.",
        controls=[
            slider("mean1", "mean of the first input", means, 2.0),
            slider("mean2", "mean of the second", means, 1.0),
            slider("correlation", "correlation", (-0.9, -0.7, -0.5, -0.3, 0, 0.3, 0.5, 0.7, 0.9, 0.97), 0.9),
            slider("damping", "damping ε", (0, 0.01, 0.03, 0.1, 0.3, 1, 3), 0),
            slider("lr", "learning rate λ", rates, 0.15),
        ],
        traces=[
            *map(_cloud, COORDINATES),
            *map(_losses, COORDINATES),
            ring(At(means, "mean1"), At(means, "mean2"), size=16),
        ],
        layout=_layout(),
        text=say(
            "To a hundredth of its loss gradient descent takes {h}{worse} updates with the inputs h, "
            "{centred} with h − μ, {white} with U(h − μ).",
            **{name: At(counts, Out(name, "count")) for name in COORDINATES},
            worse=At(["", " (it diverges)"], Out("diverges")),
        ),
        formula=whitening,
        data=DATA,
        handle=("mean1", "mean2"),
    )


def _cloud(name: str) -> dict[str, Any]:
    """The inputs, in one of the coordinates."""
    words, shade, symbol, _ = COORDINATES[name]
    return {
        "type": "scatter",
        "x": Out(name, "x"),
        "y": Out(name, "y"),
        "mode": "markers",
        "name": words,
        "legendgroup": name,
        "marker": {"color": COLORS[shade], "size": 5, "symbol": symbol},
        "hovertemplate": "%{x:.2f}, %{y:.2f}",
    }


def _losses(name: str) -> dict[str, Any]:
    """The loss by update, in one of the coordinates."""
    words, shade, _, dash = COORDINATES[name]
    return {
        "type": "scatter",
        "x": list(range(UPDATES + 1)),
        "y": Out(name, "loss"),
        "mode": "lines",
        "name": words,
        "legendgroup": name,
        "line": {"color": COLORS[shade], "dash": dash},
        "hovertemplate": "update %{x}: %{y:.3g}",
        "showlegend": False,
        "xaxis": "x2",
        "yaxis": "y2",
    }


def _layout() -> dict[str, Any]:
    """The plane of the inputs above, the losses below."""
    zero = {
        "zeroline": True,
        "zerolinecolor": "#7a7a7a",
        "zerolinewidth": 1.5,
        "fixedrange": True,
        "dtick": 2,
    }
    plane = {"range": [-3.6, 5.6], "constrain": "domain", **zero}
    power = {"type": "log", "exponentformat": "power", "dtick": 2, "range": [-6.2, 1.2], "fixedrange": True}
    return {
        "xaxis": {"title": {"text": "first input"}, "anchor": "y", **plane},
        "yaxis": {"title": {"text": "second"}, "scaleanchor": "x", "domain": [0.36, 1], **plane},
        "xaxis2": {"title": {"text": "update"}, "range": [0, UPDATES], "fixedrange": True, "anchor": "y2"},
        "yaxis2": {"title": {"text": "loss"}, "domain": [0, 0.22], "anchor": "x2", **power},
        "height": 640,
    }
