"""The small layer of the page *Since 2017*: its matrices by loops, and what a share of a decrease is."""

import math

import pytest
import references
import torch

from lab.relatives import draw, share
from sogrid.kronecker import unvec

ROUNDING = 1e-10


@pytest.fixture(params=[0.0, 3.0], ids=["no mean", "mean 3"])
def layer(request):
    return draw(request.param, seed=1, n=40)


def test_the_matrices_by_loops(layer):
    tilde = torch.cat([layer.h, torch.ones(len(layer.h), 1, dtype=torch.float64)], 1)
    examples = list(zip(tilde, layer.g, layer.rows, strict=True))
    G = sum(references.kron(torch.outer(h, h), J.mT @ J) for h, _, J in examples) / len(examples)
    assert references.relative_error(layer.G, G) < ROUNDING
    assert references.relative_error(layer.A, sum(torch.outer(h, h) for h, _, _ in examples) / 40) < ROUNDING
    assert references.relative_error(layer.B, sum(J.mT @ J for _, _, J in examples) / 40) < ROUNDING
    gradient = sum(torch.outer(g, h) for h, g, _ in examples) / len(examples)
    assert references.relative_error(layer.grad_w, gradient[:, :-1]) < ROUNDING
    assert references.relative_error(layer.grad_b, gradient[:, -1]) < ROUNDING
    assert references.relative_error(layer.M - torch.outer(layer.mean_h, layer.mean_h), layer.C) < ROUNDING


def test_the_mean_is_as_asked_and_changes_nothing_else(layer):
    other = draw(7.0, seed=1, n=40)
    assert float(other.mean_h.norm()) == pytest.approx(7.0)
    for name in ("g", "rows", "C", "grad_b"):
        assert references.relative_error(getattr(other, name), getattr(layer, name)) < ROUNDING


def test_share_of_the_exact_step_is_one(layer):
    v = torch.cat([layer.grad_w, layer.grad_b[:, None]], 1).mT.flatten()
    exact = unvec(torch.linalg.solve(layer.G, v), layer.g.shape[1])
    for length in (1.0, -0.01):
        assert share(layer, length * exact[:, :-1], length * exact[:, -1]) == pytest.approx(1, abs=ROUNDING)


def test_share_is_the_decrease_at_the_best_length(layer):
    """By a line search over the quadratic model vᵀd t + ½ t² dᵀGd."""
    v = torch.cat([layer.grad_w, layer.grad_b[:, None]], 1).mT.flatten()
    model = lambda d: float(v @ d + d @ layer.G @ d / 2)  # noqa: E731
    lowest = min(model(-(10**e) * v) for e in torch.linspace(-2, 1, 1501).tolist())
    best = model(-torch.linalg.solve(layer.G, v))
    assert share(layer, layer.grad_w, layer.grad_b) == pytest.approx(lowest / best, rel=1e-5)
    assert (
        share(layer, layer.grad_w, layer.grad_b) <= share(layer, layer.grad_w, layer.grad_b, apart=True) <= 1
    )


def test_share_is_a_squared_cosine(layer):
    v = torch.cat([layer.grad_w, layer.grad_b[:, None]], 1).mT.flatten()
    exact = torch.linalg.solve(layer.G, v)
    inner = lambda a, b: float(a @ layer.G @ b)  # noqa: E731
    cosine = inner(v, exact) / math.sqrt(inner(v, v) * inner(exact, exact))
    assert share(layer, layer.grad_w, layer.grad_b) == pytest.approx(cosine**2, rel=1e-9)
