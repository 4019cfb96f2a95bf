"""The three Fishers against enumerated outcomes, and the KL divergence against its definition."""

import pytest
import references
import torch
from cases import CASES, EMPIRICAL, FISHER, build, case
from references import relative_error
from torch import nn

from sogrid.curvature import (
    empirical_fisher,
    evaluate,
    fisher,
    gauss_newton,
    kl_divergence,
    parameter_vector,
    sampled_fisher,
)
from sogrid.losses import CrossEntropyAtProbabilities, Loss, Quadratic

RTOL = 1e-11  # of the norm, float64 rounding
DIFFERENT = 1e-2  # two matrices that are not equal differ by more than this
RTOL_KL = 1e-9  # KL is a difference of logarithms near 1e-4


def variance(loss):
    return getattr(loss, "variance", 0.5)


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_fisher_is_the_expected_outer_product_of_scores_over_all_outcomes(case_):
    model, loss, x, _ = build(case_)
    expected = references.fisher(model, type(loss).__name__, x, variance(loss))
    assert relative_error(fisher(model, loss, x), expected) < RTOL


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_gauss_newton_is_the_fisher_exactly_on_the_labelled_cases(case_):
    model, loss, x, y = build(case_)
    error = relative_error(gauss_newton(model, loss, x, y), fisher(model, loss, x))
    assert (error < RTOL) if FISHER in case_.exact else (error > DIFFERENT)


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_gauss_newton_is_the_empirical_fisher_exactly_on_the_labelled_cases(case_):
    model, loss, x, y = build(case_)
    error = relative_error(empirical_fisher(model, loss, x, y), gauss_newton(model, loss, x, y))
    assert (error < RTOL) if EMPIRICAL in case_.exact else (error > DIFFERENT)


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_empirical_fisher_is_the_mean_outer_product_of_observed_scores(case_):
    model, loss, x, y = build(case_)
    rows = references.rows(y, model(x).shape[1], x.dtype)
    total = 0.0
    for x_i, y_i in zip(x, rows, strict=True):
        log_p = references.log_likelihood(type(loss).__name__, model(x_i[None])[0], y_i, variance(loss))
        s = references.flat_gradient(log_p, model)
        total = total + torch.outer(s, s) / len(x)
    F = empirical_fisher(model, loss, x, y)
    if case_.targets.__name__ == "reached":
        assert F.abs().max() == 0
        assert total.abs().max() < 1e-28  # an example alone is not rounded as in its minibatch
    else:
        assert relative_error(F, total) < RTOL


def test_fisher_of_the_gaussian_scales_with_one_over_the_variance():
    model, _, x, _ = case("tanh regression")
    scaled = 0.37 * fisher(model, Quadratic(variance=0.37), x)
    assert relative_error(scaled, 0.5 * fisher(model, Quadratic(), x)) < RTOL


@pytest.mark.parametrize(
    "name", ["tanh regression, σ² = .37", "softmax at logits", "three Bernoulli outputs at the probabilities"]
)
def test_sampled_fisher_approaches_the_fisher(name, generator):
    """SAMPLES draws per example; the error falls as 1/√samples, here to about 1 %."""
    SAMPLES, RTOL_SAMPLED = 20_000, 0.03
    model, loss, x, _ = case(name)
    F = fisher(model, loss, x)
    error = relative_error(sampled_fisher(model, loss, x, SAMPLES, generator), F)
    assert error < RTOL_SAMPLED
    few = [relative_error(sampled_fisher(model, loss, x, 20, generator), F) for _ in range(20)]
    assert sum(few) / len(few) > 10 * error  # √1000 = 32 in expectation


def test_sampled_fisher_is_reproducible_and_of_low_rank():
    model, loss, x, _ = case("tanh regression")
    first, second = (sampled_fisher(model, loss, x, 1, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.linalg.matrix_rank(first, hermitian=True) == len(x)
    assert torch.linalg.matrix_rank(fisher(model, loss, x), hermitian=True) == 2 * len(x)


def test_sampled_fisher_needs_a_sample():
    model, loss, x, _ = case("tanh regression")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sampled_fisher(model, loss, x, samples=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case_", CASES, ids=str)
def test_kl_is_the_expected_log_ratio_over_all_outcomes(case_, reverse, draw):
    model, loss, x, _ = build(case_)
    theta = parameter_vector(model)
    delta = 0.1 * draw(len(theta))
    p, q = evaluate(model, theta, x), evaluate(model, theta + delta, x)
    if reverse:
        p, q = q, p
    name, expected = type(loss).__name__, 0.0
    for p_i, q_i in zip(p, q, strict=True):
        for y, weight in references.outcomes(name, p_i, variance(loss)):
            log_p, log_q = (references.log_likelihood(name, f, y, variance(loss)) for f in (p_i, q_i))
            expected = expected + weight * (log_p - log_q) / len(x)
    value = kl_divergence(model, loss, x, delta, reverse)
    assert value.ndim == 0
    assert value > 0
    assert abs(value - expected) < RTOL_KL * expected


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case_", CASES, ids=str)
def test_kl_is_half_the_fishers_quadratic_form(case_, reverse, draw):
    """Erratum E5: KL / ΔᵀFΔ = ½ + O(step) in both orders.

    Extrapolating the linear term away from steps 2e-3 and 1e-3 leaves O(step²), below 1e-4.
    """
    model, loss, x, _ = build(case_)
    delta = draw(len(parameter_vector(model)))
    delta = delta / delta.norm()
    form = delta @ fisher(model, loss, x) @ delta
    far, near = (kl_divergence(model, loss, x, s * delta, reverse) / (s**2 * form) for s in (2e-3, 1e-3))
    assert abs(2 * near - far - 0.5) < 1e-4


def test_kl_of_no_move_is_zero_and_unknown_models_are_refused():
    model, loss, x, _ = case("softmax at logits")
    nothing = torch.zeros_like(parameter_vector(model))
    assert kl_divergence(model, loss, x, nothing) == 0
    certain = nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1)).requires_grad_(False)  # which underflows
    certain[0].weight.mul_(1e4)
    move = torch.zeros_like(parameter_vector(certain))
    assert kl_divergence(certain, CrossEntropyAtProbabilities(), torch.ones(4, 2), move) == 0
    with pytest.raises(TypeError, match="for Loss"):
        kl_divergence(model, Loss(), x, nothing)
