"""Paths in a plane of two parameters: the valley of the introduction, and page 3.2's one model in two charts.

A *chart* is a way to name the functions of a model by two numbers. The model of page 3.2 says "one" with
probability σ(w₂ tanh(w₁x)): by its weights, or by the logarithms of two numbers that can be read off its
logit, the slope w₁w₂ at zero and the height w₂ at which it saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch
from torch import Tensor

from lab.plotting import color, figure
from sogrid.optimizers import newton_update
from sogrid.statistics import input_moments

__all__ = ["CHARTS", "Chart", "by_chart", "descend", "gaps_by_step", "largest_gap", "predictions", "valley"]


class Chart(NamedTuple):
    """Two numbers φ, ``[2]``, in place of the weights θ = (w₁, w₂).

    Attributes:
        weights: θ of φ.
        numbers: φ of θ.
        jacobian: ∂θ/∂φ at θ, ``[2, 2]``.
    """

    weights: Callable[[Tensor], Tensor]
    numbers: Callable[[Tensor], Tensor]
    jacobian: Callable[[Tensor], Tensor]


CHARTS = {
    "weights": Chart(lambda phi: phi, lambda theta: theta, lambda theta: torch.eye(2).to(theta)),
    "slope and height": Chart(
        lambda phi: torch.stack([phi[0] - phi[1], phi[1]]).exp(),
        lambda theta: torch.stack([theta.prod(), theta[1]]).log(),
        lambda theta: theta[:, None] * theta.new_tensor([[1, -1], [0, 1]]),
    ),
}
"""The weights themselves; and log w₁w₂, log w₂."""

DASHES = ("solid", "dot")


def predictions(theta: Tensor, x: Tensor) -> Tensor:
    """Probabilities of one, ``[..., n]``, at inputs ``x``, ``[n]``, of weights ``theta``, ``[..., 2]``."""
    return (theta[..., 1:] * torch.tanh(theta[..., :1] * x)).sigmoid()


def descend(
    chart: Chart, start: Tensor, x: Tensor, y: Tensor, *, lr: float, steps: int, natural: bool
) -> Tensor:
    """Weights along gradient descent, or the undamped natural gradient, on a chart's numbers.

    The loss is the mean cross-entropy of targets ``y``, ``[n]``, zeros and ones.

    Args:
        chart: Whose numbers move.
        start: Weights to begin with, ``[2]``.
        x: Inputs, ``[n]``.
        y: Targets, ``[n]``.
        lr: Length of a step.
        steps: How many.
        natural: Whether the gradient is multiplied by the inverse of the Fisher matrix.

    Returns:
        Weights, ``[steps + 1, 2]``, whatever the chart.
    """
    path = [start]
    for _ in range(steps):
        theta = path[-1]
        p, t = predictions(theta, x), torch.tanh(theta[0] * x)
        J = torch.stack([theta[1] * x * (1 - t**2), t], 1) @ chart.jacobian(theta)  # of the logit, [n, 2]
        gradient = J.mT @ (p - y) / len(x)
        fisher = (J.mT * p * (1 - p)) @ J / len(x)
        step = newton_update(gradient, fisher, lr=lr) if natural else -lr * gradient
        path.append(chart.weights(chart.numbers(theta) + step))
    return torch.stack(path)


def largest_gap(paths: Sequence[Tensor], x: Tensor) -> float:
    """Largest difference of two paths' predictions at ``x``, ``[n]``, at any step."""
    one, other = (predictions(path, x) for path in paths)
    return float((one - other).abs().max())


def gaps_by_step(
    start: Tensor, x: Tensor, y: Tensor, lengths: Sequence[float], *, time: float, natural: bool
) -> list[float]:
    """Each length's :func:`largest_gap` of the two charts, over the same ``time``, length times steps."""
    charts = CHARTS.values()
    return [
        largest_gap(
            [descend(chart, start, x, y, lr=lr, steps=round(time / lr), natural=natural) for chart in charts],
            x,
        )
        for lr in lengths
    ]


def by_chart(paths: dict[str, dict[str, Tensor]], at: tuple[float, float]) -> go.Figure:
    """Paths of predictions: the probability at one input against that at another.

    Args:
        paths: Of each method the weights along its path in each chart, ``[steps + 1, 2]``.
        at: The two inputs.
    """
    traces = []
    for (method, by_name), shade in zip(paths.items(), ("grey", "blue"), strict=True):
        for (name, path), dash in zip(by_name.items(), DASHES, strict=True):
            seen = predictions(path, path.new_tensor(at))
            wide = {"width": 6, "color": color(shade, 0.35)} if dash == "solid" else {"color": color(shade)}
            traces.append(
                go.Scatter(
                    x=seen[:, 0].tolist(),
                    y=seen[:, 1].tolist(),
                    mode="lines",
                    name=f"{method}, {name}",
                    line={**wide, "dash": dash},
                )
            )
    start = traces[0]
    traces.append(
        go.Scatter(
            x=start.x[:1],
            y=start.y[:1],
            mode="markers+text",
            text=["start"],
            textposition="top center",
            marker={"color": color("grey"), "size": 9},
            showlegend=False,
            hoverinfo="skip",
        )
    )
    return figure(
        traces,
        alt="Predictions at two inputs along four paths from one start. The two of gradient descent part "
        "at once; the two of the natural gradient lie on each other.",
        xaxis={"title": f"probability at x = {at[0]:g}"},
        yaxis={"title": f"probability at x = {at[1]:g}"},
        height=440,
    )


def valley(h: Tensor, start: tuple[float, float], *, share: float = 0.9, steps: int = 30) -> go.Figure:
    """Inputs of one linear unit, and the valley they make: gradient descent's path in it, and Newton's step.

    The unit's target is w₁ = w₂ = 0 and its loss the mean of (w·h)², so that the Hessian is twice the second
    moment of the inputs.

    Args:
        h: Inputs, ``[n, 2]``.
        start: Weights to begin with.
        share: Learning rate of gradient descent, as a part of the largest one that does not diverge.
        steps: How many it takes.
    """
    hessian = 2 * input_moments(h, centered=False)[1]
    weights = [torch.tensor(start, dtype=h.dtype)]
    lr = 2 * share / float(torch.linalg.eigvalsh(hessian)[-1])
    for _ in range(steps):
        weights.append(weights[-1] - lr * hessian @ weights[-1])
    newton = [weights[0], weights[0] + newton_update(hessian @ weights[0], hessian)]
    reach = 1.2 * max(map(abs, start))
    traces = [_contours(hessian / 2, reach), _cloud(h)]
    for name, path, shade in (("gradient descent", weights, "grey"), ("Newton's step", newton, "blue")):
        look = {"line": {"color": color(shade)}, "marker": {"color": color(shade), "size": 5}}
        traces.append(_line(torch.stack(path), name=name, mode="lines+markers", **look))
    axis = {"range": [-reach, reach], "constrain": "domain"}
    return figure(
        traces,
        alt="A long thin cloud of inputs that rises to the right, and at a right angle to it the contours of "
        "the loss, a long narrow valley. Gradient descent jumps from side to side of the valley and creeps "
        "along it, Newton's step goes to the minimum at once.",
        height=440,
        xaxis={"title": "weight w₁, input h₁", **axis},
        yaxis={"title": "weight w₂, input h₂", "scaleanchor": "x", **axis},
    )


def _line(points: Tensor, **look: Any) -> go.Scatter:
    return go.Scatter(x=points[:, 0].tolist(), y=points[:, 1].tolist(), **look)


def _cloud(h: Tensor) -> go.Scatter:
    marker = {"color": color("orange", 0.6), "size": 6}
    return _line(h, mode="markers", name="inputs", marker=marker, hoverinfo="skip")


def _contours(form: Tensor, reach: float) -> go.Contour:
    axis = torch.linspace(-reach, reach, 61, dtype=form.dtype)
    plane = torch.cartesian_prod(axis, axis)
    return go.Contour(
        x=axis.tolist(),
        y=axis.tolist(),
        z=((plane @ form) * plane).sum(1).view(61, 61).mT.sqrt().tolist(),
        ncontours=24,
        contours_coloring="lines",
        line_width=1,
        colorscale=[[0, "#999"], [1, "#999"]],
        showscale=False,
        hoverinfo="skip",
    )
