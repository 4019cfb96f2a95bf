r"""Better than the split: approximations of a layer's Gauss-Newton block, their errors, what they are worth.

The block is G = (1/n) Σ_i h̃_i h̃_iᵀ ⊗ M_i, M_i = s_iᵀ s_i (eq. 6.2.2). All of :data:`FORMS` but the block
itself are diagonal in a basis U_A ⊗ U_B (:class:`Spectrum`), so each is damped and inverted exactly, as
(Ĝ + εI)⁻¹: what differs between their steps is the approximation alone.

``python -m lab study better-blocks`` measures the errors along short runs of a classifier of small digits,
and trains it with each: one grid of bounds κ and ε at λ = 1, twenty other seeds, a one-sided test
(:mod:`lab.trials`): each form against KFAC. Grid and rule come from a pilot with other seeds.

Index letters: n example, k output of the network, i input (with the constant), o output of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch
from torch import Tensor

from lab.plotting import COLORS, figure, style
from lab.rivals import AdamMethod, InGrid
from lab.trials import FEW_SEEDS, SEARCH_SEEDS, SEEDS, Study, Trials, dots, number, paired, tuned
from sogrid.experiments.benchmarks import Method, Task
from sogrid.experiments.grid import StackedMLP, pooled_digits, train_grid
from sogrid.experiments.training import Minibatches, evaluation_points
from sogrid.kronecker import homogeneous, homogeneous_gradient, vec
from sogrid.losses import CrossEntropyAtLogits
from sogrid.networks import MLP
from sogrid.optimizers import KFAC
from sogrid.optimizers.kfac import KFACMethod, output_vectors
from sogrid.statistics import Statistics
from sogrid.structured import Factored, matrixwise

__all__ = [
    "BETTER_BLOCKS",
    "FORMS",
    "Spectrum",
    "along",
    "block",
    "classifier",
    "ends",
    "errors",
    "factors",
    "mean_of",
    "nearest_factors",
    "ratios",
    "rearranged",
    "trained",
    "verdicts",
]


class Spectrum(NamedTuple):
    """A matrix that is diagonal in the basis U_A ⊗ U_B.

    Attributes:
        a_basis: U_A, ``[..., i, i]``, eigenvectors as columns.
        b_basis: U_B, ``[..., o, o]``.
        values: Its eigenvalues, ``[..., o, i]``.
    """

    a_basis: Tensor
    b_basis: Tensor
    values: Tensor

    def solve(self, gradient: Tensor, damping: float | Tensor) -> Tensor:
        """(Ĝ + εI)⁻¹ times ``gradient: [..., o, i]``, as a matrix."""
        along = self.b_basis.mT @ gradient @ self.a_basis
        return self.b_basis @ (along / (self.values + matrixwise(damping))) @ self.a_basis.mT

    def dense(self) -> Tensor:
        """``[i·o, i·o]``, in the thesis's order."""
        basis = torch.kron(self.a_basis, self.b_basis)
        return basis * vec(self.values) @ basis.mT


def factors(h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """KFAC's A ``[..., i, i]`` and B ``[..., o, o]``: the split of the expectation.

    Args:
        h: h̃, ``[..., n, i]``.
        s: Rows with M_i = s_iᵀ s_i, ``[..., n, k, o]``.
    """
    return h.mT @ h / h.shape[-2], (s.mT @ s).mean(-3)


def nearest_factors(h: Tensor, s: Tensor, steps: int = 30) -> tuple[Tensor, Tensor]:
    """A and B of which A ⊗ B is nearest to the block in Frobenius norm (Van Loan & Pitsianis 1993).

    The leading pair of singular vectors of the rearranged block, by power iteration: A is the second moment
    of inputs *weighted* by how much comes back, ⟨M_i, B⟩, and B the mean curvature weighted by h̃ᵀAh̃.
    Both stay positive semi-definite. The block is never formed.

    Args:
        h: As in :func:`factors`.
        s: Likewise.
        steps: Of the iteration, from KFAC's B.
    """
    (a, b), m = factors(h, s), s.mT @ s
    for _ in range(steps):
        weights = (m * b.unsqueeze(-3)).sum((-2, -1))
        a = (h * weights.unsqueeze(-1)).mT @ h / h.shape[-2]
        a = a / matrixwise(torch.linalg.matrix_norm(a).clamp(min=torch.finfo(a.dtype).tiny))
        weights = (h @ a * h).sum(-1)
        b = (weights[..., None, None] * m).mean(-3)
    return a, b


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and -vectors, in float64; of a run that has diverged, of zero."""
    values, vectors = torch.linalg.eigh(matrix.double().nan_to_num(0, 0, 0))
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _product(a: Tensor, b: Tensor) -> Spectrum:
    (of_a, a_basis), (of_b, b_basis) = _eigh(a), _eigh(b)
    return Spectrum(a_basis, b_basis, of_b.unsqueeze(-1) * of_a.unsqueeze(-2))


def _moments(h: Tensor, s: Tensor, a_basis: Tensor, b_basis: Tensor) -> Tensor:
    """The block's diagonal in a basis, ``[..., o, i]``."""
    along = (s @ b_basis.unsqueeze(-3)).square().sum(-2)
    return along.mT @ (h @ a_basis).square() / h.shape[-2]


def kfac(h: Tensor, s: Tensor) -> Spectrum:
    """A ⊗ B."""
    return _product(*factors(h, s))


def ekfac(h: Tensor, s: Tensor) -> Spectrum:
    """KFAC's basis, the block's own second moments along it."""
    a_basis, b_basis, _ = kfac(h, s)
    return Spectrum(a_basis, b_basis, _moments(h, s, a_basis, b_basis))


def nearest(h: Tensor, s: Tensor) -> Spectrum:
    """The nearest Kronecker product."""
    return _product(*nearest_factors(h, s))


def input_factor(h: Tensor, s: Tensor) -> Spectrum:
    """A ⊗ αI, the thesis's G_in, with the α for which it is nearest to the block."""
    a, _ = factors(h, s)
    traces = s.square().sum((-2, -1))
    alpha = ((h @ a * h).sum(-1) * traces).mean(-1) / (a.square().sum((-2, -1)) * s.shape[-1])
    eye = torch.eye(s.shape[-1], dtype=s.dtype).expand(*alpha.shape, -1, -1)
    return _product(a, alpha[..., None, None] * eye)


def diagonal(h: Tensor, s: Tensor) -> Spectrum:
    """The block's diagonal."""
    a_basis, b_basis = (torch.eye(x.shape[-1], dtype=x.dtype).expand(*h.shape[:-2], -1, -1) for x in (h, s))
    return Spectrum(a_basis, b_basis, _moments(h, s, a_basis, b_basis))


FORMS = {
    "KFAC": kfac,
    "EKFAC": ekfac,
    "nearest Kronecker": nearest,
    "input factor alone": input_factor,
    "diagonal": diagonal,
}
"""By name. *Input factor alone* is ACP's."""

EXACT, ADAM = "exact block", "Adam"


def rearranged(h: Tensor, s: Tensor) -> Tensor:
    """(1/n) Σ vec(h̃h̃ᵀ) vec(M)ᵀ, ``[..., i·i, o·o]``: the block, of which Kronecker products have rank one."""
    squares = (h.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2)
    return squares.mT @ (s.mT @ s).flatten(-2) / h.shape[-2]


def block(h: Tensor, s: Tensor) -> Tensor:
    """G, ``[..., i·o, i·o]``, in the thesis's order."""
    n_in, n_out = h.shape[-1], s.shape[-1]
    entries = rearranged(h, s).unflatten(-1, (n_out, n_out)).unflatten(-3, (n_in, n_in))
    return entries.transpose(-3, -2).flatten(-4, -3).flatten(-2)


# -- the classifier, and what is measured of it ----------------------------------------------------------

LOSS = CrossEntropyAtLogits()
DAMPINGS = (0.1, 0.01, 0.001)
POINTS, EXAMPLES, PATHS = (0, 3, 10, 30, 100, 300), 500, (1, 2, 3)


@cache
def classifier() -> Task:
    """A tanh network 64-8-8-10 on the digits at 8 × 8 pixels."""
    task = pooled_digits()
    (x, _), (x_test, _), data = task.train, task.test, task.data

    def network(**options) -> MLP:
        return MLP([64, 8, 8, 10], **{"activation": "tanh", **options})

    parts = {"train": (x, data.train[1]), "test": (x_test, data.test[1])}
    return replace(task, name="pooled_classifier", **parts, network=network, loss=LOSS)


def seen(model: MLP, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(h̃, s, gradient as ``[o, i]``) of each layer, on the examples ``x`` and the exact Fisher."""
    found = StackedMLP([model]).trace(x[None])
    f = found.f.detach()[0]
    gradients = found.pull(LOSS.gradient(f, y)[None])
    rows = [found.pull(v[None]) for v in output_vectors(f, loss=LOSS, samples=None, seed=0)]
    layers = []
    for layer, (h, g) in enumerate(zip(found.inputs, gradients, strict=True)):
        h = homogeneous(h[0])
        layers.append((h, torch.stack([row[layer][0] for row in rows], -2), g[0].mT @ h / len(h)))
    return layers


def _compared(step: Tensor, exact: Tensor, gradient: Tensor, damped: Tensor) -> dict[str, float]:
    """How far a step is from the exact one, and what it is worth to the damped quadratic model."""
    cosine = step @ exact / (step.norm() * exact.norm())
    share = (gradient @ step) ** 2 / ((step @ damped @ step) * (gradient @ exact))
    gap = (step - exact).norm() / exact.norm()
    return {"cosine": float(cosine), "gap": float(gap), "share": float(share)}


def measured(layers: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[dict[str, Any]]:
    """Errors of every form for every layer and damping, and those of the block diagonal for all layers."""
    rows, exact_steps, blocks = [], {d: [] for d in DAMPINGS}, []
    for layer, (h, s, gradient) in enumerate(layers):
        g, v = block(h, s), vec(gradient)
        spectra = {name: form(h, s) for name, form in FORMS.items()}
        off = {name: float((one.dense() - g).norm() / g.norm()) for name, one in spectra.items()}
        blocks.append(g)
        for d in DAMPINGS:
            damped = g + d * torch.eye(len(g), dtype=g.dtype)
            exact = torch.linalg.solve(damped, v)
            exact_steps[d].append(exact)
            for name, one in spectra.items():
                step = vec(one.solve(gradient, d))
                row = {"layer": layer + 1, "form": name, "damping": d, "error": off[name]}
                rows.append(row | _compared(step, exact, v, damped))
    jacobian = torch.cat([torch.einsum("ni,nko->nkio", h, s).flatten(2) for h, s, _ in layers], -1)
    whole = torch.einsum("nkp,nkq->pq", jacobian, jacobian) / len(jacobian)
    v = torch.cat([vec(gradient) for _, _, gradient in layers])
    error = float((torch.block_diag(*blocks) - whole).norm() / whole.norm())
    for d in DAMPINGS:
        damped = whole + d * torch.eye(len(whole), dtype=whole.dtype)
        row = {"layer": 0, "form": "block diagonal", "damping": d, "error": error}
        step = torch.cat(exact_steps[d])
        rows.append(row | _compared(step, torch.linalg.solve(damped, v), v, damped))
    return [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def errors(seed: int, points: Sequence[int] = POINTS, examples: int = EXAMPLES) -> list[dict[str, Any]]:
    """Errors along a run of KFAC with its defaults, in float64, on the first examples of the training set.

    Args:
        seed: Of weights and minibatches.
        points: After how many updates to measure.
        examples: That blocks and gradients are means over.
    """
    task, generator = classifier().to("cpu", torch.float64), torch.Generator().manual_seed(seed)
    model = task.network(generator=generator).double()
    optimizer, (x, y) = KFAC(model, lr=10.0, loss=LOSS), task.train
    order, rows = Minibatches(len(x), 200, torch.Generator().manual_seed(seed)), []
    for done in range(points[-1] + 1):
        if done in points:
            rows += [{"update": done, **row} for row in measured(seen(model, x[:examples], y[:examples]))]
        if done < points[-1]:
            i = next(order)
            optimizer.zero_grad()
            LOSS(model(x[i]), y[i]).backward()
            optimizer.step()
    return rows


# -- the effect on the loss ------------------------------------------------------------------------------

BOUNDS, TRAINING_DAMPINGS = (0.04, 0.06, 0.09, 0.13, 0.2), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
ADAM_RATES, BETAS = tuple(1e-3 * 1.4**k for k in range(15)), (0.5, 0.9)
UPDATES = 200
PLAN: dict[str, Any] = {"batch": 200, "evaluate_on": 2_000}


class BlockMethod(KFACMethod):
    """(Ĝ + εI)⁻¹ of the exact Fisher's block in some form, as the verbs of a grid."""

    def __init__(self, form: str) -> None:
        """See the class."""
        super().__init__(LOSS, "fisher_exact", 1, 0)
        self.form = form

    def measure(self, rows, group):
        h = homogeneous(rows.inputs)
        return Statistics(h.mean(-2), h, torch.stack(rows.pulled, -2))

    def invert(self, statistics, group, name):
        _, h, s = statistics
        if self.form != EXACT:
            return FORMS[self.form](h, s)._asdict()
        g = block(h, s)
        damped = g + matrixwise(group["damping"]) * torch.eye(g.shape[-1], dtype=g.dtype)
        return {"inverse": torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)}

    def update(self, gradient, state, group):
        w = gradient.w.dense() if isinstance(gradient.w, Factored) else gradient.w
        whole = homogeneous_gradient(w, gradient.b)
        if self.form == EXACT:
            along = state["inverse"] @ vec(whole).unsqueeze(-1)
            step = along.squeeze(-1).unflatten(-1, whole.mT.shape[-2:]).mT
        else:
            step = Spectrum(**state).solve(whole, group["damping"])
        step = -matrixwise(group["lr"]) * step
        return step[..., :-1], step[..., -1]


def _method(form: str) -> Method:
    if form == ADAM:
        return Method(lambda model, loss, s: InGrid(AdamMethod(), model, **s), settings=("lr", "beta"))
    return Method(
        lambda model, loss, s: InGrid(BlockMethod(form), model, 1.0, **s), settings=("max_change", "damping")
    )


def trained(
    form: str,
    *,
    updates: int = UPDATES,
    bounds: Sequence[float] = BOUNDS,
    dampings: Sequence[float] = TRAINING_DAMPINGS,
    **seeds: Sequence[int],
) -> Trials:
    """What becomes of the classifier under a form, or under Adam with as many trials.

    Args:
        form: Of :data:`FORMS`, ``"exact block"`` or ``"Adam"``.
        updates: Of a run.
        bounds: κ of the grid.
        dampings: ε of the grid.
        **seeds: Of :func:`~lab.trials.tuned`.
    """
    grid = [{"max_change": k, "damping": d, "scale": 2.0} for k, d in product(bounds, dampings)]
    if form == ADAM:
        pairs = list(product(ADAM_RATES, BETAS))[: len(grid)]
        grid = [{"lr": r, "beta": b, "scale": 2.0} for r, b in pairs]
    task, points = classifier(), evaluation_points(updates, per_decade=6)

    def run(settings: list[dict[str, float]], own: list[int]) -> list[dict[str, Any]]:
        curves = train_grid(task, _method(form), settings, seeds=own, updates=updates, points=points, **PLAN)
        return [
            {
                "update": c.update,
                "train": [float(f"{v:.5g}") for v in c.train],
                "loss": c.train[-1] if c.status == "finished" else None,
            }
            for c in curves
        ]

    return tuned(run, grid, **seeds)


TRAINED = (EXACT, *FORMS, ADAM)


def _part(part: str, of: str | int, points: Sequence[int] = POINTS, **few: Any) -> dict[str, Any]:
    return {"rows": errors(of, points)} if part == "errors" else trained(of, **few).entry()


BETTER_BLOCKS = Study(
    "better_blocks",
    {
        **{"points": POINTS, "examples": EXAMPLES, "dampings": DAMPINGS, "updates": UPDATES, "plan": PLAN},
        **{"bounds": BOUNDS, "training_dampings": TRAINING_DAMPINGS, "adam": [ADAM_RATES, BETAS]},
        **{"seeds": SEEDS, "search_seeds": SEARCH_SEEDS},
    },
    [
        *({"part": "errors", "of": seed} for seed in PATHS),
        *({"part": "training", "of": form} for form in TRAINED),
    ],
    _part,
    few={
        "points": POINTS[:2],
        "updates": 2,
        "bounds": BOUNDS[:2],
        "dampings": TRAINING_DAMPINGS[:1],
        **FEW_SEEDS,
    },
)
"""Errors by seed of the path, and training by form."""


# -- what the record says --------------------------------------------------------------------------------

BLOCK_DIAGONAL = "block diagonal"
LOOKS = {
    "KFAC": style("kfac")["line"],
    "EKFAC": {"color": COLORS["purple"]},
    "nearest Kronecker": {"color": COLORS["green"]},
    "input factor alone": style("acp")["line"],
    "diagonal": {"color": COLORS["brown"]},
}


def mean_of(content: dict[str, Any], what: str, form: str, layer: int, damping: float) -> dict[int, float]:
    """By update: a number of a form, mean over the paths.

    Args:
        content: Of the record.
        what: ``"error"`` of the matrix, ``"cosine"``, ``"gap"`` or ``"share"`` of its step.
        form: Of :data:`FORMS`, or ``"block diagonal"``.
        layer: From one; zero for the block diagonal, which is of all.
        damping: ε.
    """
    wanted, found = (form, layer, damping), {}
    for run in content["runs"]:
        for row in run["rows"] if run["part"] == "errors" else ():
            if (row["form"], row["layer"], row["damping"]) == wanted:
                found.setdefault(row["update"], []).append(row[what])
    return {update: fmean(values) for update, values in found.items()}


def along(content: dict[str, Any], layer: int = 1, damping: float = 0.01) -> go.Figure:
    """Error of the matrix (left) and share of the exact decrease (right), by update."""
    traces, words = [], []
    for i, what in enumerate(("error", "share")):
        axes = {"xaxis": "x2", "yaxis": "y2"} if i else {}
        for name, line in LOOKS.items():
            means = mean_of(content, what, name, layer, damping)
            values = list(means.values())
            look = {"line": line, "mode": "lines+markers", "legendgroup": name, "showlegend": not i}
            traces.append(go.Scatter(x=list(map(str, means)), y=values, name=name, **look, **axes))
            words.append(f"{name} {values[0]:.2f} to {values[-1]:.2f}")
    half = len(LOOKS)
    alt = f"Left, error: {'; '.join(words[:half])}. Right, share: {'; '.join(words[half:])}."
    axis = {"title": "update", "type": "category"}
    return figure(
        traces,
        alt=alt,
        xaxis={**axis, "domain": [0, 0.45]},
        xaxis2={**axis, "domain": [0.55, 1], "anchor": "y2"},
        yaxis={"title": "error of the matrix", "rangemode": "tozero"},
        yaxis2={"title": "share of the exact decrease", "rangemode": "tozero", "anchor": "x2"},
        height=440,
    )


def ends(content: dict[str, Any]) -> dict[str, list[float]]:
    """By form: last training losses, one for each seed."""
    trained = [run for run in content["runs"] if run["part"] == "training"]
    return {run["of"]: [number(one["loss"]) for one in run["runs"]] for run in trained}


def verdicts(content: dict[str, Any]) -> dict[str, tuple[str, float, float]]:
    """By form but KFAC: (ahead of it, behind it, or neither shown; KFAC's loss over its own; p)."""
    losses, words = ends(content), {1: "ahead", -1: "behind", 0: "no difference shown"}
    found = {name: paired(own, losses["KFAC"], sided=1) for name, own in losses.items() if name != "KFAC"}
    return {name: (words[sign], ratio, p) for name, (sign, ratio, p) in found.items()}


def ratios(content: dict[str, Any]) -> go.Figure:
    """KFAC's last loss over that of each form, a dot for each seed."""
    losses, told = ends(content), {name: word for name, (word, *_) in verdicts(content).items()}
    return dots({name: (losses[name], losses["KFAC"]) for name in told}, told, x="loss, KFAC / the other")
