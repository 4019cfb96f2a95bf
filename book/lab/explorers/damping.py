r"""Damping and α (Thesis §6.3.2): what ACP's step does to each eigendirection of the inputs' covariance.

A linear layer with the loss :math:`\|f - y\|^2`, whose curvature at the output is 2: along an eigendirection
with variance c the gradient is 2c times the error. Gradient descent on centred inputs multiplies it by λ, ACP
by :math:`\frac{\lambda}{\alpha}\frac{1}{c + \varepsilon/\alpha} = \frac{\lambda}{\alpha c + \varepsilon}`.
2c times that is the share of the error that an update removes: above 1 it overshoots, above 2 it diverges.
"""

from __future__ import annotations

from typing import Any

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
    return Explorer(
        alt="Two curves by eigendirection of the covariance of digits' pixels, for ACP and for SGD: the "
        "factor that multiplies the gradient, and the share of the error that an update removes.",
        controls=[
            slider("damping", "damping ε", DAMPINGS, 0.2),
            slider("alpha", "output curvature α", ALPHAS, 1),
            slider("lr", "learning rate λ", RATES, 0.5),
        ],
        traces=_traces(c),
        layout=_layout(len(c)),
        text=_sentence(c),
    )


def _inverse(c: np.ndarray) -> np.ndarray:
    """ACP's factor over λ, ``[damping, alpha, direction]``."""
    damping, alpha = np.array(DAMPINGS)[:, None, None], np.array(ALPHAS)[:, None]
    return 1 / (alpha * c + damping)


def _traces(c: np.ndarray) -> list[dict[str, Any]]:
    """Factors above and shares below: of ACP, of SGD, and of SGD at the rate that is best for c₁."""
    directions = np.unique(np.geomspace(1, len(c), 60).round().astype(int))
    drawn, ones, best = c[directions - 1], np.ones(len(directions)), 1 / (CURVATURE * c[0])
    factor, rate = At(_inverse(drawn), "damping", "alpha"), At(np.array(RATES), "lr")
    factors = Times(rate, factor), Times(rate, ones), best * ones
    removed = Times(CURVATURE, rate, drawn, factor), Times(CURVATURE, rate, drawn), CURVATURE * best * drawn
    sgd = style("standard_sgd")["line"]
    names = ("ACP", style("acp")["line"]), ("SGD", sgd), ("SGD, λ = 1/(2c₁)", {**sgd, "dash": "dot"})
    return [
        {
            "type": "scatter",
            "x": directions,
            "y": y,
            "mode": "lines",
            "name": name,
            "line": look,
            "hovertemplate": "direction %{x}: %{y:.3g}",
            "yaxis": axis,
            "showlegend": axis == "y",
        }
        for axis, ys in (("y", factors), ("y2", removed))
        for y, (name, look) in zip(ys, names, strict=True)
    ]


def _layout(directions: int) -> dict[str, Any]:
    """Axes, and lines where an update overshoots and where it diverges."""
    pink = {"color": COLORS["pink"], "dash": "dot", "width": 1.5}
    limit = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y2", "line": pink}
    log = {"type": "log", "exponentformat": "power"}
    return {
        "xaxis": {
            "title": {"text": "eigendirection, from the most varying"},
            "range": [0, float(np.log10(directions))],
            "dtick": "D2",
            "anchor": "y2",
            **log,
        },
        "yaxis": {"title": {"text": "factor"}, "range": [-3, 4], "dtick": 2, "domain": [0.56, 1], **log},
        "yaxis2": {"title": {"text": "share removed"}, "range": [0, 2.3], "dtick": 1, "domain": [0, 0.46]},
        "shapes": [{**limit, "y0": height, "y1": height} for height in (1, 2)],
        "height": 560,
    }


def _sentence(c: np.ndarray) -> list[Any]:
    rates, halved = np.array(RATES), lambda share: (abs(1 - share) <= 0.5).sum(-1)
    sgd = CURVATURE * rates[:, None] * c  # [lr, direction]
    acp = sgd * _inverse(c)[:, :, None, :]  # [damping, alpha, lr, direction]
    verdicts = ["", " ACP overshoots: a share is above 1.", " ACP diverges: a share is above 2."]
    verdict = (acp[..., 0] > 1).astype(int) + (acp[..., 0] > 2)
    return say(
        f"With ε/α = {{shift}} one update of ACP at least halves the error in {{acp}} of {len(c)} "
        "directions, SGD in {sgd} with the same λ.{verdict}{sgd_verdict}",
        shift=Short(At(np.array(DAMPINGS)[:, None] / np.array(ALPHAS), "damping", "alpha")),
        acp=At(halved(acp), "damping", "alpha", "lr"),
        sgd=At(halved(sgd), "lr"),
        verdict=At(verdicts, At(verdict, "damping", "alpha", "lr")),
        sgd_verdict=At(["", " SGD diverges."], At(sgd[:, 0] > 2, "lr")),
    )
