"""When does centring pay? Steps that differ in the mean they take off the inputs, and Newton-Muon's.

Small autoencoders on the embedded digits, which differ in what the layers' inputs have for a mean. All
methods step as far as a bound lets them (λ = 10), which leaves no cliff for a search to fall off. Each gets
the same grid of bounds and dampings, and they are compared as in every study (:mod:`lab.trials`), by a
two-sided test. Grid, methods and rule come from pilots with other seeds.

Newton-Muon is the second study (:data:`NEWTON_MUON`): the same networks, uncentred as published, and centred;
both are searched on one grid of learning rates and ridges, both rates fall to zero over the run. Here the
test is one-sided: centring *pays* if its loss is lower at p < 0.01, *costs* if the other's is. Grid and rule
come from a pilot with other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from lab.plotting import COLORS, figure
from lab.rivals import FOOF, InGrid, NewtonMuonMethod
from lab.trials import FEW_SEEDS, SEARCH_SEEDS, SEEDS, Study, Trials, dots, number, paired, tuned
from sogrid.experiments.benchmarks import Method, Task
from sogrid.experiments.grid import pooled_digits, train_grid, training_grid
from sogrid.factorize import tikhonov_inverse
from sogrid.optimizers import ACP, NaturalNN
from sogrid.optimizers.acp import ACPMethod
from sogrid.statistics import input_moments
from sogrid.structured import quadratic_form, vectorwise

__all__ = [
    "CASES",
    "CENTRING",
    "DAMPINGS",
    "METHODS",
    "NEWTON_MUON",
    "ORTHOGONALISED",
    "Comparison",
    "MeanTwice",
    "OwnCovariance",
    "PreviousMean",
    "by_damping",
    "centred",
    "damped_ratios",
    "distances",
    "mean_shares",
    "orthogonalised",
    "ratios",
    "recorded",
    "verdict",
]

LR = 10.0
BOUNDS = (0.02, 0.04, 0.08)
DAMPINGS = (0.001, 0.004, 0.016, 0.064, 0.25)
RATES, RIDGES = (0.028, 0.04, 0.056, 0.08, 0.11, 0.16, 0.22), (0.2, 0.8, 3.2, 12.8, 51.2)
UPDATES = 200
OWN_SEEDS, OWN_SEARCH_SEEDS = tuple(range(401, 421)), (31, 32)
"""Those of the other studies have been seen in a pilot of this one."""
PLAN: dict[str, Any] = {"batch": 100, "evaluate_on": 1_000}


def _method(kind: Callable[..., torch.optim.Optimizer]) -> Method:
    options = {"refresh_every": 20, "gradients": "factored"}
    settings = ("damping", "max_change")
    return Method(lambda model, loss, s: kind(model, LR, **s, **options), settings=settings)


class MeanTwice(ACPMethod):
    """Algorithm 4, but the minibatch's mean pre-activation moves by −2λ ḡ, as it may without centring."""

    def update(self, gradient, state, group):  # noqa: D102
        dw, db = super().update(gradient, state, group)
        return dw, db - vectorwise(group["lr"]) * gradient.b


class PreviousMean(ACPMethod):
    """Algorithm 4, but the mean is of the minibatch of the update before."""

    def update(self, gradient, state, group):  # noqa: D102
        mean, state["previous"] = state.get("previous", gradient.mean_h), gradient.mean_h
        return super().update(gradient._replace(mean_h=mean), state, group)


class OwnCovariance(ACPMethod):
    """Algorithm 4, but the covariance, too, is of the update's own minibatch."""

    def update(self, gradient, state, group):  # noqa: D102
        _, covariance = input_moments(gradient.w.right)
        own = {**state, "inverse": tikhonov_inverse(covariance, group["damping"])}
        return super().update(gradient, own, group)


def _by(kind: type[ACPMethod]) -> Callable[..., ACP]:
    """ACP's optimizer with another method in it."""

    def build(*arguments: Any, **options: Any) -> ACP:
        optimizer = ACP(*arguments, **options)
        optimizer.method = kind()
        return optimizer

    return build


METHODS = {
    "centred": _method(ACP),
    "twice": _method(_by(MeanTwice)),
    "together": _method(_by(OwnCovariance)),
    "previous": _method(_by(PreviousMean)),
    "kept": _method(NaturalNN),
    "uncentred": _method(FOOF),
}
"""Algorithm 4 with the bias term; its mean moved twice; its covariance of the same minibatch; its mean of the
minibatch before; its mean of the statistics minibatch, and kept; and FOOF."""


def shifted(task: Task, change: Callable[[Tensor], Tensor]) -> Task:
    """The same task with other inputs; the targets stay."""
    (x, y), (x_test, y_test) = task.train, task.test
    return replace(task, train=(change(x), y), test=(change(x_test), y_test))


def _tanh() -> Task:
    return pooled_digits(activation="tanh")


def _centred() -> Task:
    task = _tanh()
    mean = task.train[0].mean(0)
    return shifted(task, lambda x: x - mean)


CASES: dict[str, tuple[Callable[[], Task], float]] = {
    "tanh, no mean": (_centred, 4.0),
    "tanh": (_tanh, 4.0),
    "tanh, inverted": (lambda: shifted(_tanh(), lambda x: 1 - x), 4.0),
    "ReLU": (lambda: pooled_digits(activation="relu", init="he"), 2.0),
    "sigmoid": (pooled_digits, 16.0),
}
"""Networks 64-32-16-32-64 by their activation and inputs, each with the scale of its initial weights.

No mean: that of the pixels is subtracted. Inverted: dark on white.
"""


class Comparison(NamedTuple):
    """What methods did in one case.

    Attributes:
        case: Key of :data:`CASES`.
        settings: The best of the grid, by method.
        losses: Of the last update by seed, by method; infinite if it diverged.
        by_damping: Of the search, mean loss at the best κ for each ε of the grid, by method; of Newton-Muon
            nothing.
    """

    case: str
    settings: dict[str, dict[str, float]]
    losses: dict[str, list[float]]
    by_damping: dict[str, list[float]]


def centred(
    case: str,
    method: str,
    *,
    updates: int = UPDATES,
    bounds: Sequence[float] = BOUNDS,
    dampings: Sequence[float] = DAMPINGS,
    seeds: Sequence[int] = OWN_SEEDS,
    search_seeds: Sequence[int] = OWN_SEARCH_SEEDS,
) -> Trials:
    """What becomes of a method on one of the networks.

    Args:
        case: Key of :data:`CASES`.
        method: Key of :data:`METHODS`.
        updates: Of a run, in the search too.
        bounds: κ of the grid.
        dampings: ε of the grid.
        seeds: See :func:`~lab.trials.tuned`.
        search_seeds: Likewise.
    """
    build, scale = CASES[case]
    task = build()
    grid = [{"damping": d, "max_change": k, "scale": scale} for d, k in product(dampings, bounds)]
    run = lambda s, own: _runs(task, METHODS[method], s, own, updates)  # noqa: E731
    return tuned(run, grid, seeds, search_seeds)


def _runs(
    task: Task, method: Method, settings: list[dict[str, float]], seeds: list[int], updates: int
) -> list[dict[str, Any]]:
    """Last losses of a batch of runs."""
    curves = train_grid(task, method, settings, seeds=seeds, updates=updates, points=[updates], **PLAN)
    return [{"loss": c.train[-1] if c.status == "finished" else None} for c in curves]


def _newton_muon(centred: bool) -> Method:
    return Method(
        lambda model, loss, s: InGrid(NewtonMuonMethod(centred), model, **s),
        settings=("lr", "ridge", "horizon"),
    )


ORTHOGONALISED = {"centred": _newton_muon(True), "uncentred": _newton_muon(False)}


def orthogonalised(
    case: str,
    method: str,
    *,
    updates: int = UPDATES,
    rates: Sequence[float] = RATES,
    ridges: Sequence[float] = RIDGES,
    **seeds: Sequence[int],
) -> Trials:
    """What becomes of a Newton-Muon on one of the networks.

    Args:
        case: Key of :data:`CASES`.
        method: ``"centred"`` or ``"uncentred"``.
        updates: Of a run, in the search too.
        rates: λ of the grid.
        ridges: γ of the grid, in multiples of the mean of the matrix's diagonal.
        **seeds: Of :func:`~lab.trials.tuned`.
    """
    build, scale = CASES[case]
    task = build()
    grid = [{"lr": r, "ridge": g, "horizon": updates, "scale": scale} for r, g in product(rates, ridges)]
    return tuned(lambda s, own: _runs(task, ORTHOGONALISED[method], s, own, updates), grid, **seeds)


CENTRING = Study(
    "centring",
    {
        **{"updates": UPDATES, "bounds": BOUNDS, "dampings": DAMPINGS, "plan": PLAN},
        **{"seeds": OWN_SEEDS, "search_seeds": OWN_SEARCH_SEEDS},
    },
    [{"case": case, "method": method} for case in CASES for method in METHODS],
    lambda case, method, **few: centred(case, method, **few).entry(),
    few={"updates": 2, "bounds": BOUNDS[:1], "dampings": DAMPINGS[:2], **FEW_SEEDS},
)
"""Of every network, all methods."""

NEWTON_MUON = Study(
    "centring_newton_muon",
    {
        **{"updates": UPDATES, "rates": RATES, "ridges": RIDGES, "plan": PLAN},
        **{"seeds": SEEDS, "search_seeds": SEARCH_SEEDS},
    },
    [{"case": case, "method": method} for case in CASES for method in ORTHOGONALISED],
    lambda case, method, **few: orthogonalised(case, method, **few).entry(),
    few={"updates": 2, "rates": RATES[:1], "ridges": RIDGES[:2], **FEW_SEEDS},
)
"""Of every network, both Newton-Muons."""


def recorded(content: dict[str, Any]) -> list[Comparison]:
    """The comparisons of a record of :data:`CENTRING` or :data:`NEWTON_MUON`."""
    found, bounds = [], len(content["settings"].get("bounds", ()))
    for case in CASES:
        own = {run["method"]: run for run in content["runs"] if run["case"] == case}
        losses = {name: [number(r["loss"]) for r in run["runs"]] for name, run in own.items()}
        best = {name: _lowest(run["searched"], bounds) for name, run in own.items() if bounds}
        found.append(Comparison(case, {name: run["settings"] for name, run in own.items()}, losses, best))
    return found


def _lowest(searched: Sequence[float | None], bounds: int) -> list[float]:
    """Of a grid's losses, those at the best bound, for each damping."""
    losses = [number(loss) for loss in searched]
    return [min(losses[k : k + bounds]) for k in range(0, len(losses), bounds)]


def verdict(comparison: Comparison, sided: int = 2, method: str = "centred") -> tuple[str, float, float]:
    """(whether centring pays, mean ratio of uncentred to centred loss, p); see :func:`~lab.trials.paired`."""
    sign, ratio, p = paired(comparison.losses[method], comparison.losses["uncentred"], sided)
    return {1: "pays", -1: "costs", 0: "no difference shown"}[sign], ratio, p


@torch.no_grad()
def distances(case: str, damping: float, seed: int = 0, examples: int = 1_000) -> list[float]:
    """m² = h̄ᵀ(C + εI)⁻¹h̄ of each layer's inputs at the initial weights."""
    build, scale = CASES[case]
    task = build()
    h, found = task.train[0][:examples].double(), []
    for module in task.network(scale=scale, generator=torch.Generator().manual_seed(seed)).double():
        if isinstance(module, nn.Linear):
            mean, covariance = input_moments(h)
            found.append(float(quadratic_form(mean[None], tikhonov_inverse(covariance, damping))))
        h = module(h)
    return found


@torch.no_grad()
def mean_shares(case: str, damping: float, seeds: Sequence[int] = range(4)) -> dict[str, list[float]]:
    """Share of the mean in what each method's step changes in the pre-activations, between 0 and 1, by layer.

    The norm of the change's mean over the update's minibatch, by its root mean square: a bound leaves that as
    it is. Of the second update after the first refresh, the mean over seeds.

    Args:
        case: Key of :data:`CASES`.
        damping: ε.
        seeds: Of weights and minibatches.
    """
    build, scale = CASES[case]
    task = build()
    settings = [{"damping": damping, "max_change": BOUNDS[0], "scale": scale}] * len(seeds)
    order = [torch.randperm(len(task.train[0]), generator=torch.Generator().manual_seed(s)) for s in seeds]
    picks = torch.stack(order)[:, : 3 * PLAN["batch"]].chunk(3, 1)
    statistics, first, second = ([part[i] for part in task.train] for i in picks)
    found = {}
    for name, method in METHODS.items():
        grid = training_grid(task, method, settings, list(seeds))
        grid.refresh(*statistics)
        grid.update(*first)
        before = [(w.clone(), b.clone()) for w, b in zip(grid.stack.weights, grid.stack.biases, strict=True)]
        inputs = grid.stack.trace(second[0]).inputs
        grid.update(*second)
        found[name] = []
        for h, w, b, (w0, b0) in zip(inputs, grid.stack.weights, grid.stack.biases, before, strict=True):
            change = h @ (w - w0).mT + (b - b0).unsqueeze(-2)
            root = change.square().sum(-1).mean(-1).sqrt()
            found[name].append(float((change.mean(-2).norm(dim=-1) / root).mean()))
    return found


def ratios(comparisons: Sequence[Comparison], sided: int = 2) -> go.Figure:
    """A dot for each seed, right of one where the centred step did better, and a bar at each mean."""
    return dots(
        {c.case: (c.losses["centred"], c.losses["uncentred"]) for c in comparisons},
        {c.case: verdict(c, sided)[0] for c in comparisons},
        x="loss, uncentred / centred",
    )


def by_damping(
    comparisons: Sequence[Comparison],
    dampings: Sequence[float] = DAMPINGS,
    method: str = "centred",
    against: str = "uncentred",
    y: str = "loss, uncentred / centred",
) -> go.Figure:
    """Loss of a method over another's by damping, each at its best bound: a line for each network."""
    found = {c.case: damped_ratios(c, method, against) for c in comparisons}
    colors = ("grey", "blue", "purple", "brown", "orange")
    traces = [
        go.Scatter(x=list(dampings), y=values, name=case, line={"color": COLORS[color]})
        for (case, values), color in zip(found.items(), colors, strict=False)
    ]
    line = {"dash": "dot", "width": 1, "color": COLORS["grey"]}
    ends = "; ".join(f"{case}: {values[0]:.2f} to {values[-1]:.2f}" for case, values in found.items())
    return figure(
        traces,
        alt=f"{y}, by damping, a line for each network. From the smallest damping to the largest: {ends}.",
        xaxis={"title": "damping ε", "type": "log", "exponentformat": "power", "dtick": 1},
        yaxis={"title": y, "type": "log"},
        shapes=[{"type": "line", "line": line, "y0": 1, "y1": 1, "x0": 0, "x1": 1, "xref": "paper"}],
    )


def damped_ratios(comparison: Comparison, method: str = "centred", against: str = "uncentred") -> list[float]:
    """Another method's loss over a method's in the search, for each ε of the grid."""
    pairs = zip(comparison.by_damping[against], comparison.by_damping[method], strict=True)
    return [other / own for other, own in pairs]
