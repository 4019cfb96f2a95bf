r"""KFAC's damping (Thesis §6.4.1) over the eigenvalues of its factors: what is left of the Newton step.

Along an eigenvector of A with eigenvalue a and one of B with eigenvalue b the curvature is ab. Damping
:math:`A \otimes B + \varepsilon I` leaves the share :math:`\frac{ab}{ab + \varepsilon}` of the Newton step,
:math:`(A + \pi\sqrt\varepsilon I) \otimes (B + \frac{\sqrt\varepsilon}{\pi} I)` leaves
:math:`\frac{a}{a + \pi\sqrt\varepsilon}\,\frac{b}{b + \sqrt\varepsilon/\pi}`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lab.explorers.core import At, Explorer, Short, Times, ring, say, select, short, slider
from lab.plotting import COLORS

__all__ = ["kfac_damping"]

DAMPINGS = [m * 10.0**e for e in range(-6, 0) for m in (1, 3)] + [1.0]
EIGENVALUES = np.logspace(-4, 2, 25)
LEFT = 0.1, 0.5, 0.9
ALONG = 1 / (1 + np.exp(-np.linspace(-14, 14, 57)))  # t, from 0 to 1
RULES = {"exact": ("A ⊗ B + εI", "grey", "solid"), "split": ("split over the factors", "blue", "solid")}


def kfac_damping(a: np.ndarray, b: np.ndarray) -> Explorer:
    """Where, in the plane of two eigenvalues, damping leaves so much of the Newton step, exact and split.

    Args:
        a: Eigenvalues of a layer's input factor.
        b: Of its output factor; those of the block are their products.
    """
    a, b = (np.asarray(v, dtype=float) for v in (a, b))
    pis = np.array([1.0, float(np.sqrt(a.mean() / b.mean()))])
    root = np.sqrt(DAMPINGS)
    of_a, of_b = np.outer(root, pis), np.outer(root, 1 / pis)  # [damping, pi], added to each factor
    axis = {"type": "log", "dtick": 2, "exponentformat": "power", "fixedrange": True}
    ends = [-4.2, 2.2]
    return Explorer(
        alt="The plane of the eigenvalues a and b, on logarithmic axes, with lines where a tenth, a half and "
        "nine tenths of the Newton step are left. With exact damping they are straight lines of constant ab; "
        "split over the factors they bend to a corner.",
        controls=[
            slider("a", "eigenvalue a of A", EIGENVALUES, 3.0),
            slider("b", "eigenvalue b of B", EIGENVALUES, 0.01),
            slider("damping", "damping ε", DAMPINGS, 0.01),
            select("pi", "π", ["1: the same for both", f"{short(pis[1])}: by the mean eigenvalues"]),
        ],
        traces=[
            _eigenvalues(a, b),
            _lines("exact", _exact()),
            _lines("split", _split(of_a, of_b)),
            _labels(_split(of_a, of_b)),
            ring(At(EIGENVALUES, "a"), At(EIGENVALUES, "b"), size=16),
        ],
        layout={
            "xaxis": {"title": {"text": "a"}, "range": ends, "constrain": "domain", **axis},
            "yaxis": {
                "title": {"text": "b"},
                "range": ends,
                "constrain": "domain",
                "scaleanchor": "x",
                **axis,
            },
            "height": 480,
        },
        text=_sentence(a, b, of_a, of_b),
        handle=("a", "b"),
    )


def _kept(values: np.ndarray, damping: np.ndarray) -> np.ndarray:
    """v/(v + damping), ``[value, *damping's]``."""
    return values.reshape(-1, *(1 for _ in damping.shape)) / (np.add.outer(values, damping))


def _exact() -> tuple[np.ndarray, np.ndarray]:
    """Places a and b where a share is left, ``[damping, share, place]``: ab = ε s/(1 - s)."""
    odds = np.array(LEFT) / (1 - np.array(LEFT))
    a = np.broadcast_to([1e-5, 1e3], (len(DAMPINGS), len(LEFT), 2))
    return a, np.array(DAMPINGS)[:, None, None] * odds[:, None] / a


def _split(of_a: np.ndarray, of_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same when both factors are damped, ``[damping, pi, share, place]``: a keeps s^t, b the rest."""
    left_a = np.array(LEFT)[:, None] ** ALONG
    return tuple(
        damping[..., None, None] * left / (1 - left)
        for damping, left in ((of_a, left_a), (of_b, left_a[:, ::-1]))
    )


def _lines(rule: str, places: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """The three lines of a rule, as one trace with gaps between them."""
    words, shade, dash = RULES[rule]
    by = ("damping", "pi")[: places[0].ndim - 2]
    gap = np.full((*places[0].shape[:-1], 1), np.nan)
    x, y = (np.concatenate([v, gap], -1).reshape(*v.shape[:-2], -1) for v in places)
    return {
        "type": "scatter",
        "x": At(x, *by),
        "y": At(y, *by),
        "mode": "lines",
        "name": words,
        "line": {"color": COLORS[shade], "dash": dash},
        "hoverinfo": "skip",
    }


def _labels(places: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Shares, at the corners of the split rule's lines."""
    x, y = (v[..., v.shape[-1] // 2] for v in places)
    return {
        "type": "scatter",
        "x": At(x, "damping", "pi"),
        "y": At(y, "damping", "pi"),
        "text": [f"{100 * share:.0f}%" for share in LEFT],
        "mode": "text",
        "textposition": "top right",
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _eigenvalues(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Those of the layer, each direction a mark."""
    return {
        "type": "scatter",
        "x": np.repeat(a, len(b)),
        "y": np.tile(b, len(a)),
        "mode": "markers",
        "name": "directions of the layer",
        "marker": {"color": COLORS["brown"], "size": 4},
        "hovertemplate": "a %{x:.2g}, b %{y:.2g}<extra></extra>",
    }


def _sentence(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> list[Any]:
    block, dampings = np.outer(a, b).clip(0).ravel(), np.array(DAMPINGS)
    exact = (_kept(block, dampings) >= 0.5).sum(0)  # [damping]
    both = _kept(a.clip(0), of_a)[:, None] * _kept(b.clip(0), of_b)  # [a, b, damping, pi]
    shares = _kept(np.outer(EIGENVALUES, EIGENVALUES).ravel(), dampings)
    return say(
        "Along the ringed direction, of curvature ab = {curvature}, exact damping leaves {exact}% of the "
        "Newton step, split damping {split}%. At least half of it is left in {many} of the layer's "
        f"{len(block)} directions, and in {{few}} if split.",
        curvature=Short(Times(At(EIGENVALUES, "a"), At(EIGENVALUES, "b"))),
        exact=Short(At(100 * shares.reshape(len(EIGENVALUES), len(EIGENVALUES), -1), "a", "b", "damping")),
        split=Short(
            Times(
                100,
                At(_kept(EIGENVALUES, of_a), "a", "damping", "pi"),
                At(_kept(EIGENVALUES, of_b), "b", "damping", "pi"),
            )
        ),
        many=At(exact, "damping"),
        few=At((both >= 0.5).sum((0, 1)), "damping", "pi"),
    )
