r"""Damping and α (Thesis §6.3.2): what ACP's step does to each eigendirection of the inputs' covariance.

A linear layer with the loss :math:`\|f - y\|^2`, whose curvature at the output is 2: along an eigendirection
with variance c the gradient is 2c times the error. Gradient descent on centred inputs multiplies it by λ, ACP
by :math:`\frac{\lambda}{\alpha}\frac{1}{c + \varepsilon/\alpha} = \frac{\lambda}{\alpha c + \varepsilon}`.
2c times that is the share of the error that an update removes: above 1 it overshoots, above 2 it diverges.
"""

from __future__ import annotations

import numpy as np
import torch

from lab.explorers.core import At, Explorer, Short, Times, say, slider
from lab.plotting import COLORS, style
from sogrid.experiments import data
from sogrid.statistics import input_moments

__all__ = ["damping_and_alpha", "digit_variances"]

CURVATURE = 2.0
DAMPINGS, ALPHAS, RATES = (
    [m * 10.0**e for e in range(low, high) for m in (1, 2, 5)] + [10.0**high]
    for low, high in ((-4, 1), (-2, 2), (-3, 1))
)


def digit_variances(examples: int = 200) -> np.ndarray:
    """Eigenvalues of the pixels' covariance, descending, without those that are zero: ``[examples - 1]``."""
    x = data.load("mnist", source="embedded").train[0][:examples].double()
    return torch.linalg.eigvalsh(input_moments(x)[1]).flip(0)[: examples - 1].numpy()


def damping_and_alpha(variances: np.ndarray | None = None) -> Explorer:
    """ACP's factor in each eigendirection, and the share of the error it removes, against SGD's.

    Args:
        variances: Eigenvalues of the covariance, descending; default those of the embedded digits' pixels.
    """
    c = digit_variances() if variances is None else np.asarray(variances, dtype=float)
    directions = np.unique(np.geomspace(1, len(c), 60).round().astype(int))
    drawn, rates, damping, alpha = c[directions - 1], np.array(RATES), np.array(DAMPINGS), np.array(ALPHAS)
    inverse = lambda c: 1 / (alpha[:, None] * c + damping[:, None, None])  # noqa: E731
    factor, rate = At(inverse(drawn), "damping", "alpha"), At(rates, "lr")
    shares = CURVATURE * rates[:, None] * (c * inverse(c))[:, :, None, :]  # [damping, alpha, lr, direction]
    halved = lambda share: (abs(1 - share) <= 0.5).sum(-1)  # noqa: E731
    verdicts = ["", " ACP overshoots: a share is above 1.", " ACP diverges: a share is above 2."]
    verdict = (shares[..., 0] > 1).astype(int) + (shares[..., 0] > 2)
    best = 1 / (CURVATURE * c[0])

    def line(y, name, look, axis):
        trace = {"type": "scatter", "x": directions, "y": y, "mode": "lines", "name": name, "line": look}
        hover = {"hovertemplate": "direction %{x}: %{y:.3g}"}
        return {**trace, **hover, "yaxis": axis, "showlegend": axis == "y"}

    sgd = style("standard_sgd")["line"]
    names = ("ACP", style("acp")["line"]), ("SGD", sgd), ("SGD, λ = 1/(2c₁)", {**sgd, "dash": "dot"})
    ones = np.ones(len(directions))
    factors = Times(rate, factor), Times(rate, ones), best * ones
    removed = Times(CURVATURE, rate, drawn, factor), Times(CURVATURE, rate, drawn), CURVATURE * best * drawn
    pink = {"color": COLORS["pink"], "dash": "dot", "width": 1.5}
    limit = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y2", "line": pink}
    log = {"type": "log", "exponentformat": "power"}
    end = float(np.log10(len(c)))
    return Explorer(
        alt="Two curves by eigendirection of the covariance of digits' pixels, for ACP and for SGD: the "
        "factor that multiplies the gradient, and the share of the error that an update removes.",
        controls=[
            slider("damping", "damping ε", DAMPINGS, 0.2),
            slider("alpha", "output curvature α", ALPHAS, 1),
            slider("lr", "learning rate λ", RATES, 0.5),
        ],
        traces=[
            line(y, name, look, axis)
            for axis, ys in (("y", factors), ("y2", removed))
            for y, (name, look) in zip(ys, names, strict=True)
        ],
        layout={
            "xaxis": {
                "title": {"text": "eigendirection, from the most varying"},
                "range": [0, end],
                "dtick": "D2",
                "anchor": "y2",
                **log,
            },
            "yaxis": {"title": {"text": "factor"}, "range": [-3, 4], "dtick": 2, "domain": [0.56, 1], **log},
            "yaxis2": {
                "title": {"text": "share removed"},
                "range": [0, 2.3],
                "dtick": 1,
                "domain": [0, 0.46],
            },
            "shapes": [{**limit, "y0": height, "y1": height} for height in (1, 2)],
            "height": 560,
        },
        text=say(
            f"With ε/α = {{shift}} one update of ACP at least halves the error in {{acp}} of {len(c)} "
            "directions, SGD in {sgd} with the same λ.{verdict}{sgd_verdict}",
            shift=Short(At(damping[:, None] / alpha, "damping", "alpha")),
            acp=At(halved(shares), "damping", "alpha", "lr"),
            sgd=At(halved(CURVATURE * rates[:, None] * c), "lr"),
            verdict=At(verdicts, At(verdict, "damping", "alpha", "lr")),
            sgd_verdict=At(["", " SGD diverges."], At(CURVATURE * rates * c[0] > 2, "lr")),
        ),
    )
