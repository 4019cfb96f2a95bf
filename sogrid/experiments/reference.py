"""What the thesis's own curves say, as numbers: markers to draw beside ours (Thesis §5.4 and §6.5)."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["thesis_facts", "thesis_values"]

FIGURES = Path(__file__).parent / "thesis" / "figures.json"


def thesis_values(figure: str) -> dict:
    """Values read off one of the thesis's vector figures: a single run per method, on a Titan Black.

    Method names are the legends' (which are right where the captions of Figs 6.2 and 6.3 swap blue and
    orange): ``acp`` has the heuristic α, ``acp_fixedalpha`` a fixed one, ``nnn2`` is the natural neural
    network, ``jaco_update`` updated backpropagation; in Fig. 6.3 ``kfac`` is the Gauss-Newton and
    ``kfac_nat`` the natural-gradient variant. Read with about three digits; ``None`` means that the
    curve has ended, never gets there, or is cut by the axis (cross-entropy below 1e-2).

    Squared errors are sums over 784 pixels, averaged over examples. The axes of Figs 6.1 and 6.2 begin
    at update 1 and second 1. Fig. 6.3 has an axis in seconds only: its updates are inferred (50,000).

    Args:
        figure: ``"fig5_1"``, ``"fig6_1"``, ``"fig6_2"`` (MNIST autoencoder) or ``"fig6_3"`` (CIFAR-10).

    Returns:
        ``methods``: the legend, a list. ``curves``: by name, e.g. ``"train_mse_by_update"``, the abscissae
        ``x`` and for each method as many values ``y[method]``. ``headline[method]``: total seconds,
        milliseconds per update and their ratio to SGD's, best and final errors and when they were
        reached; for Fig. 5.1 the ratio alone, which §5.4 puts at about ten.

    Raises:
        ValueError: For a figure that has no values here.

    Example:
        >>> values = thesis_values("fig6_2")
        >>> values["headline"]["acp"]["ratio_to_sgd"]
        2.51
        >>> values["curves"]["train_mse_by_update"]["y"]["kfac"][-1]
        0.919
    """
    stored = json.loads(FIGURES.read_text(encoding="utf-8"))
    if figure not in stored["figures"]:
        raise ValueError(f"figure must be one of {tuple(stored['figures'])}, got {figure!r}")
    methods = stored["figures"][figure]["methods"]
    table = stored["tables"][stored["figures"][figure]["table"]]

    def rows(of: dict) -> dict:
        return {method: of[method] for method in methods}

    curves = {name: {"x": curve["x"], "y": rows(curve["y"])} for name, curve in table["curves"].items()}
    return {"methods": methods, "curves": curves, "headline": rows(table["headline"])}


def thesis_facts(key: str) -> dict:
    """What was read off the thesis's two search figures and its one table.

    Args:
        key: ``"fig2_2"``: number of ``runs``, ranges of learning rate and init scale, those of the 20 best
            runs, and the ``ridge`` on which these lie: log₁₀ scale = slope · log₁₀ lr + intercept.
            ``"fig4_1"``: share of each sampler's runs in the best tenth of the colour range.
            ``"table4_1"``: (mean, standard deviation) over 100 searches of the best of 100 experiments.

    Raises:
        ValueError: For another key.

    Example:
        >>> thesis_facts("table4_1")["biased"]
        [26.61, 0.13]
    """
    facts = json.loads(FIGURES.read_text(encoding="utf-8"))["facts"]
    if key not in facts:
        raise ValueError(f"key must be one of {tuple(facts)}, got {key!r}")
    return facts[key]
