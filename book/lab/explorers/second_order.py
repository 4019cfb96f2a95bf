r"""Second order by eye (Thesis ch. 3): four steps from one point of a loss with two parameters.

The network is the smallest whose Hessian, Gauss-Newton and Fisher matrices all differ: one tanh neuron and
a sigmoid, :math:`f(x) = \sigma(w_2 \tanh(w_1 x))`, with cross-entropy on ten examples, three of them with the
wrong label. Gauss-Newton is cut at the probabilities, as in the thesis (§3.4). The origin is a saddle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lab.explorers.core import At, Explorer, Out, Short, ring, say, slider
from lab.plotting import COLORS

__all__ = ["DATA", "curvature", "second_order_by_eye", "second_order_steps"]

DATA = {
    "x": [-2.0, -1.5, -1.0, -0.6, -0.3, 0.3, 0.6, 1.0, 1.5, 2.0],
    "y": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0],
}
STEPS = {
    "gradient": ("gradient descent", "grey", "circle"),
    "newton": ("Newton", "purple", "diamond"),
    "gauss_newton": ("Gauss-Newton", "blue", "square"),
    "natural": ("natural gradient", "orange", "triangle-up"),
}
MINIMUM = (1.2642, 1.5135, -1.2642, -1.5135)
FAR = 100.0


def curvature(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Loss, gradient ``[2]`` and the matrices ``[2, 2]`` at w, by step.

    With z the logit, J its Jacobian and f = σ(z): the Fisher matrix is the mean of f(1 - f) J Jᵀ,
    Gauss-Newton that of (f - y)² J Jᵀ, and the Hessian is Fisher plus the mean of (f - y) ∇²z.
    """
    t = np.tanh(w[0] * x)
    z, slope = w[1] * t, x * (1 - t * t)
    f = (1 + np.tanh(z / 2)) / 2
    loss = np.mean(np.log1p(np.exp(-abs(z))) + np.maximum(z, 0) - y * z)
    J = np.stack([w[1] * slope, t])
    bend = np.mean((f - y) * np.stack([-2 * w[1] * x * t * slope, slope]), 1)
    fisher = (f * (1 - f) * J) @ J.T / len(x)
    return (
        float(loss),
        np.mean((f - y) * J, 1),
        {
            "gradient": np.eye(2),
            "newton": fisher + np.array([[bend[0], bend[1]], [bend[1], 0]]),
            "gauss_newton": ((f - y) ** 2 * J) @ J.T / len(x),
            "natural": fisher,
        },
    )


def second_order_steps(values: dict[str, float], data: dict[str, list[float]]) -> dict[str, Any]:
    """Paths of repeated steps -λ (M + εI)⁻¹ ∇R, with M = I and no damping for gradient descent.

    Args:
        values: ``w1``, ``w2``: where; ``lr``: λ; ``damping``: ε; ``steps``: how many.
        data: ``x`` and ``y``, a list each.

    Returns:
        For each step: ``x``, ``y``, the path (it ends where it has left far behind all that is drawn), and
        ``loss``, at its end; ``loss`` at its beginning; ``indefinite``: 1 where the Hessian is not positive.
    """
    x, y = (np.array(data[name]) for name in ("x", "y"))
    start = np.array([values["w1"], values["w2"]])
    loss, _, matrices = curvature(start, x, y)
    out: dict[str, Any] = {"loss": loss, "indefinite": int(np.linalg.det(matrices["newton"]) <= 0)}
    for name in STEPS:
        path = [start]
        for _ in range(int(values["steps"])):
            _, gradient, matrices = curvature(path[-1], x, y)
            damping = 0.0 if name == "gradient" else values["damping"]
            if abs(path[-1]).max() < FAR:
                path.append(path[-1] - values["lr"] * _solve(matrices[name], damping, gradient))
        px, py = np.array(path).T.tolist()
        out[name] = {"x": px, "y": py, "loss": curvature(path[-1], x, y)[0]}
    return out


def _solve(matrix: np.ndarray, damping: float, vector: np.ndarray) -> np.ndarray:
    """(M + εI)⁻¹ v; no step where that does not exist."""
    (a, b), (_, d) = matrix + damping * np.eye(2)
    determinant = a * d - b * b
    if determinant == 0:
        return np.zeros(2)
    return np.array([d * vector[0] - b * vector[1], a * vector[1] - b * vector[0]]) / determinant


def second_order_by_eye() -> Explorer:
    """Gradient, Newton, Gauss-Newton and natural-gradient steps from a point that the reader drags."""
    grid = np.linspace(-3, 3, 121).round(2)
    start = ring(At(grid, "w1"), At(grid, "w2"), size=16)
    ends = ", ".join(f"{words} {{{name}}}" for name, (words, *_) in STEPS.items())
    axis = {"range": [-3, 3], "constrain": "domain", "fixedrange": True, "dtick": 1, "showgrid": False}
    return Explorer(
        alt="Contours of a loss with two parameters, a point to drag, and the paths that gradient descent, "
        "Newton's method, Gauss-Newton and the natural gradient take from there.",
        controls=[
            slider("w1", "w₁", grid, -0.75),
            slider("w2", "w₂", grid, 0.75),
            slider("lr", "learning rate λ", (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5), 1),
            slider("damping", "damping ε", (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10), 0.1),
            slider("steps", "steps", range(1, 11), 3),
        ],
        traces=[_contours(np.linspace(-3, 3, 31)), _places(), *map(_path, STEPS), start],
        layout={
            "xaxis": {"title": {"text": "w₁"}, **axis},
            "yaxis": {"title": {"text": "w₂"}, "scaleanchor": "x", **axis},
            "height": 520,
        },
        text=say(
            f"The Hessian is {{sign}} here. Loss {{here}} at the point; at the end of its path {ends}.",
            sign=At(["positive definite", "not positive definite"], Out("indefinite")),
            here=Short(Out("loss")),
            **{name: Short(Out(name, "loss")) for name in STEPS},
        ),
        formula=second_order_steps,
        data=DATA,
        handle=("w1", "w2"),
    )


def _contours(grid: np.ndarray) -> dict[str, Any]:
    x, y = (np.array(DATA[name]) for name in ("x", "y"))
    return {
        "type": "contour",
        "x": grid,
        "y": grid,
        "z": np.array([[curvature(np.array([a, b]), x, y)[0] for a in grid] for b in grid]),
        "contours": {"coloring": "lines", "start": 0.55, "end": 1.46, "size": 0.07},
        "colorscale": [[0, "#7a7a7a"], [1, "#b0b0b0"]],
        "line": {"width": 1},
        "showscale": False,
        "hovertemplate": "w₁ %{x:.2f}, w₂ %{y:.2f}: loss %{z:.3f}<extra></extra>",
    }


def _path(name: str) -> dict[str, Any]:
    """Of one of the steps."""
    words, color, symbol = STEPS[name]
    return {
        "type": "scatter",
        "x": Out(name, "x"),
        "y": Out(name, "y"),
        "mode": "lines+markers",
        "name": words,
        "line": {"color": COLORS[color]},
        "marker": {"symbol": symbol, "size": 8},
        "hovertemplate": "w₁ %{x:.2f}, w₂ %{y:.2f}",
    }


def _places() -> dict[str, Any]:
    """The saddle and the minima."""
    return {
        "type": "scatter",
        "x": [0, *MINIMUM[::2]],
        "y": [0, *MINIMUM[1::2]],
        "text": ["saddle", "minimum", "minimum"],
        "mode": "markers+text",
        "textposition": ["bottom right", "top center", "bottom center"],
        "marker": {"symbol": "cross-thin", "size": 9, "line": {"width": 1.5, "color": COLORS["grey"]}},
        "showlegend": False,
        "hoverinfo": "skip",
    }
