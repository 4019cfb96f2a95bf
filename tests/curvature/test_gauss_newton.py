"""Gauss-Newton against its definition, and where it is cut."""

import pytest
import references
import torch
from cases import CASES, HESSIAN, HESSIAN_BLOCKS, build, case
from references import relative_error

from sogrid.curvature import (
    block_diagonal,
    empirical_fisher,
    fisher,
    gauss_newton,
    gauss_newton_at_logits,
    gauss_newton_at_probabilities,
    hessian,
)
from sogrid.losses import BinaryCrossEntropyAtLogits, CrossEntropyAtLogits, Quadratic
from sogrid.networks import MLP

RTOL = 1e-11  # of the norm, float64 rounding
DIFFERENT = 1e-2  # two matrices that are not equal differ by more than this


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_gauss_newton_is_the_mean_of_pulled_back_loss_hessians(case_):
    model, loss, x, y = build(case_)
    rows = references.rows(y, model(x).shape[1], x.dtype)
    expected = references.gauss_newton(model, type(loss).__name__, x, rows)
    assert relative_error(gauss_newton(model, loss, x, y), expected) < RTOL


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_gauss_newton_is_the_hessian_exactly_on_the_labelled_cases(case_):
    model, loss, x, y = build(case_)
    error = relative_error(gauss_newton(model, loss, x, y), hessian(model, loss, x, y))
    assert (error < RTOL) if HESSIAN in case_.exact else (error > DIFFERENT)


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_gauss_newton_blocks_are_the_hessians_exactly_on_the_labelled_cases(case_):
    model, loss, x, y = build(case_)
    G, H = (block_diagonal(model, M(model, loss, x, y)) for M in (gauss_newton, hessian))
    error = relative_error(G, H)
    assert (error < RTOL) if HESSIAN_BLOCKS in case_.exact else (error > DIFFERENT)


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_gauss_newton_is_symmetric_and_positive_semi_definite(case_):
    model, loss, x, y = build(case_)
    G = gauss_newton(model, loss, x, y)
    assert relative_error(G, G.mT) < RTOL
    values = torch.linalg.eigvalsh(G)
    assert values[0] > -RTOL * values[-1]
    assert torch.linalg.matrix_rank(G, hermitian=True) <= len(x) * model(x).shape[1]


@pytest.mark.parametrize(
    ("loss", "soft_output"), [(CrossEntropyAtLogits(), "softmax"), (BinaryCrossEntropyAtLogits(), "sigmoid")]
)
def test_both_cuts_from_one_network_of_logits(loss, soft_output, draw, generator):
    """Each named cut is gauss_newton of the network that ends there, and the two differ."""
    logits = MLP([3, 4, 3], "tanh", dtype=torch.float64)
    probabilities = MLP([3, 4, 3], "tanh", soft_output, dtype=torch.float64)
    probabilities.load_state_dict(logits.state_dict())
    x = draw(5, 3)
    y = loss.sample(logits(x).detach(), generator)
    name = type(loss).__name__
    at_p = references.gauss_newton(probabilities, name.replace("Logits", "Probabilities"), x, y)
    at_logits = references.gauss_newton(logits, name, x, y)
    assert relative_error(gauss_newton_at_probabilities(logits, loss, x, y), at_p) < RTOL
    assert relative_error(gauss_newton_at_logits(logits, loss, x, y), at_logits) < RTOL
    assert relative_error(at_p, at_logits) > DIFFERENT


def test_cuts_are_the_two_fishers_for_one_hot_labels():
    model, loss, x, y = case("softmax at logits")
    at_logits, at_p = (
        cut(model, loss, x, y) for cut in (gauss_newton_at_logits, gauss_newton_at_probabilities)
    )
    assert relative_error(at_logits, fisher(model, loss, x)) < RTOL
    assert relative_error(at_p, empirical_fisher(model, loss, x, y)) < RTOL


@pytest.mark.parametrize("cut", [gauss_newton_at_logits, gauss_newton_at_probabilities])
@pytest.mark.parametrize("name", ["softmax at probabilities", "tanh regression"])
def test_cuts_refuse_a_loss_that_is_not_at_the_logits(cut, name):
    model, loss, x, y = case(name)
    with pytest.raises(TypeError, match=f"cut at the logits, got {type(loss).__name__}"):
        cut(model, loss, x, y)


def test_gauss_newton_is_a_mean_whatever_the_reduction():
    model, loss, x, y = case("tanh regression")
    assert torch.equal(gauss_newton(model, loss, x, y), gauss_newton(model, Quadratic("sum"), x, y))
    one_by_one = [gauss_newton(model, loss, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    assert relative_error(gauss_newton(model, loss, x, y), torch.stack(one_by_one).mean(0)) < RTOL
