"""Slow, obvious re-derivations to compare sogrid with. Imports nothing from sogrid.

Loops over examples, outputs and parameters, with plain ``torch.autograd`` or finite differences, and
numpy's Kronecker product. Losses are written out again, as the formulas of the thesis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

# --- losses of one example: f [k], y [k] -> scalar -------------------------------------------------

PROBABILITIES = {
    "BinaryCrossEntropyAtProbabilities": lambda f: f,
    "BinaryCrossEntropyAtLogits": lambda f: 1 / (1 + torch.exp(-f)),
    "CrossEntropyAtProbabilities": lambda f: f,
    "CrossEntropyAtLogits": lambda f: torch.exp(f) / torch.exp(f).sum(),
}
"""p(f) by the name of the loss's class."""


def example_loss(name: str, f: Tensor, y: Tensor) -> Tensor:
    """ℓ(f, y) of one example, from its definition; ``name`` is the loss's class."""
    if name == "Quadratic":
        return ((f - y) ** 2).sum()
    p = PROBABILITIES[name](f)
    if name.startswith("Binary"):
        return -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).sum()
    return -(y * torch.log(p)).sum()


def log_likelihood(name: str, f: Tensor, y: Tensor, variance: float = 0.5) -> Tensor:
    """Log p(y|f) of one example (Appendix B), up to a constant in f for the Gaussian."""
    if name == "Quadratic":
        return -((y - f) ** 2).sum() / (2 * variance)
    return -example_loss(name, f, y)


def outcomes(name: str, f: Tensor, variance: float = 0.5) -> list[tuple[Tensor, Tensor]]:
    """All (y, probability) of the model p(y|f): enumerated, or 3-point Gauss-Hermite for the Gaussian.

    Three points per dimension integrate polynomials of degree 5; s sᵀ has degree 2 in y.
    """
    k = len(f)
    if name == "Quadratic":
        nodes, weights = np.polynomial.hermite_e.hermegauss(3)
        weights = weights / weights.sum()
        pairs = []
        for index in itertools.product(range(3), repeat=k):
            z = torch.tensor([nodes[i] for i in index], dtype=f.dtype)
            pairs.append((f + variance**0.5 * z, f.new_tensor(np.prod([weights[i] for i in index]))))
        return pairs
    p = PROBABILITIES[name](f)
    if name.startswith("Binary"):
        labels = [torch.tensor(bits, dtype=f.dtype) for bits in itertools.product([0, 1], repeat=k)]
        return [(y, torch.where(y == 1, p, 1 - p).prod()) for y in labels]
    return [(row, p[c]) for c, row in enumerate(torch.eye(k, dtype=f.dtype))]


def rows(y: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Class indices as one-hot rows; anything else unchanged."""
    return y if y.is_floating_point() else one_hot(y, k).to(dtype)


# --- derivatives of one example in f, by autograd --------------------------------------------------


def gradient_in_output(function: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """∂function/∂f of a scalar function."""
    f = f.detach().clone().requires_grad_()
    return torch.autograd.grad(function(f), f)[0]


def hessian_in_output(function: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """∂²function/∂f² of a scalar function, one row at a time."""
    f = f.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(function(f), f, create_graph=True)
    # the zero term keeps a graph where g is constant in f
    return torch.stack([torch.autograd.grad(g_k + 0 * f.sum(), f, retain_graph=True)[0] for g_k in g])


def fisher_in_output(name: str, f: Tensor, variance: float = 0.5) -> Tensor:
    """D(f) = Σ_y p(y|f) s sᵀ, s = ∂ log p(y|f)/∂f."""
    total = torch.zeros(len(f), len(f), dtype=f.dtype)
    for y, p in outcomes(name, f, variance):
        s = gradient_in_output(lambda f, y=y: log_likelihood(name, f, y, variance), f)
        total = total + p * torch.outer(s, s)
    return total


# --- derivatives in the parameters -----------------------------------------------------------------


def flat(tensors) -> Tensor:
    """Row-major concatenation."""
    return torch.cat([t.reshape(-1) for t in tensors])


def flat_gradient(value: Tensor, model: nn.Module, **options) -> Tensor:
    """∂value/∂θ as one vector; zero for parameters that value does not use."""
    parameters = list(model.parameters())
    if not value.requires_grad:
        return flat([torch.zeros_like(p) for p in parameters])
    grads = torch.autograd.grad(value, parameters, allow_unused=True, **options)
    return flat([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)])


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """J_θ(x_i): one backward pass per example and output."""
    return torch.stack(
        [
            torch.stack([flat_gradient(f_k, model, retain_graph=True) for f_k in model(x_i[None])[0]])
            for x_i in x
        ]
    )


def per_example_gradient(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    """∇_θ ℓ_i: one backward pass per example."""
    return torch.stack(
        [
            flat_gradient(example_loss(name, model(x_i[None])[0], y_i), model)
            for x_i, y_i in zip(x, y, strict=True)
        ]
    )


def hessian(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Mean of per-example Hessians: one backward pass per row of each."""
    total = 0.0
    for x_i, y_i in zip(x, y, strict=True):
        value = example_loss(name, model(x_i[None])[0], y_i)
        g = flat_gradient(value, model, create_graph=True)
        total = total + torch.stack([flat_gradient(g_p, model, retain_graph=True) for g_p in g])
    return total / len(x)


def quadratic_form_mean(J: Tensor, D: list[Tensor]) -> Tensor:
    """(1/n) Σ J_iᵀ D_i J_i, one example at a time."""
    total = torch.zeros(J.shape[-1], J.shape[-1], dtype=J.dtype)
    for J_i, D_i in zip(J, D, strict=True):
        total = total + J_i.T @ D_i @ J_i
    return total / len(J)


def gauss_newton(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    """(1/n) Σ J_iᵀ ∂²ℓ_i/∂f² J_i with every factor from autograd."""
    f = model(x).detach()
    D = [
        hessian_in_output(lambda f, y_i=y_i: example_loss(name, f, y_i), f_i)
        for f_i, y_i in zip(f, y, strict=True)
    ]
    return quadratic_form_mean(jacobian(model, x), D)


def fisher(model: nn.Module, name: str, x: Tensor, variance: float = 0.5) -> Tensor:
    """(1/n) Σ_i Σ_y p(y|x_i) s sᵀ with s = ∂ log p(y|x_i)/∂θ, all outcomes enumerated."""
    total = 0.0
    for x_i in x:
        f = model(x_i[None])[0]
        for y, p in outcomes(name, f.detach(), variance):
            s = flat_gradient(log_likelihood(name, f, y, variance), model, retain_graph=True)
            total = total + p * torch.outer(s, s)
    return total / len(x)


# --- finite differences ----------------------------------------------------------------------------


def finite_difference_jacobian(
    function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5
) -> Tensor:
    """Central differences of a function of a vector: ``[..., len(at)]``, error O(step²)."""
    columns = []
    for e in torch.eye(len(at), dtype=at.dtype):
        columns.append((function(at + step * e) - function(at - step * e)) / (2 * step))
    return torch.stack(columns, -1)


# --- Kronecker -------------------------------------------------------------------------------------


def vec(matrix: Tensor) -> Tensor:
    """Columns on top of each other."""
    return torch.cat([matrix[:, j] for j in range(matrix.shape[1])])


def kron(a: Tensor, b: Tensor) -> Tensor:
    """numpy's Kronecker product."""
    return torch.from_numpy(np.kron(a.detach().numpy(), b.detach().numpy()))


# --- comparison ------------------------------------------------------------------------------------


def relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ (Frobenius); NaN and shape differences count as infinite."""
    if value.shape != reference.shape or not bool(torch.isfinite(value).all()):
        return measured(float("inf"))
    return measured(((value - reference).norm() / reference.norm()).item())


MEASURED: list[tuple[str, float]] = []
"""What the running test has measured."""


def measured(value: float, what: str = "relative error") -> float:
    """Note a number for the ledger of claims (see ``ledger.py``), and return it."""
    MEASURED.append((what, float(value)))
    return value
