"""The Hessian against double backward passes and finite differences."""

import copy

import pytest
import references
import torch
from cases import CASES, build, case
from references import relative_error

from sogrid.curvature import evaluate, hessian, parameter_vector, per_example_gradient

RTOL = 1e-11  # of the norm, float64 rounding
RTOL_DIFFERENCES = 1e-8  # central differences of the gradient with step 1e-5


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_hessian_is_the_mean_of_double_backward_passes(case_):
    model, loss, x, y = build(case_)
    rows = references.rows(y, model(x).shape[1], x.dtype)
    expected = references.hessian(model, type(loss).__name__, x, rows)
    assert relative_error(hessian(model, loss, x, y), expected) < RTOL


def test_hessian_is_the_limit_of_finite_differences_of_the_gradient():
    model, loss, x, y = case("softmax at logits")
    work = copy.deepcopy(model)

    def gradient(theta):
        torch.nn.utils.vector_to_parameters(theta, work.parameters())
        return per_example_gradient(work, loss, x, y).mean(0)

    expected = references.finite_difference_jacobian(gradient, parameter_vector(model))
    assert relative_error(hessian(model, loss, x, y), expected) < RTOL_DIFFERENCES


def test_hessian_predicts_the_risk_to_third_order():
    """Thesis §3.1.1: along the gradient, the error of the quadratic model falls as step³."""
    model, loss, x, y = case("tanh regression")
    theta = parameter_vector(model)
    g, H = per_example_gradient(model, loss, x, y).mean(0), hessian(model, loss, x, y)
    delta = g / g.norm()

    def error(step):
        change = (
            loss.value(evaluate(model, theta + step * delta, x), y).mean() - loss.value(model(x), y).mean()
        )
        return (change - step * g @ delta - step**2 / 2 * delta @ H @ delta).abs().detach()

    order = torch.log2(error(2e-2) / error(1e-2)).item()
    assert 2.9 < order < 3.1


def test_hessian_is_of_the_mean_risk_whatever_the_reduction():
    model, loss, x, y = case("tanh regression")
    summed = type(loss)(reduction="sum")
    assert torch.equal(hessian(model, loss, x, y), hessian(model, summed, x, y))
    doubled = hessian(model, loss, torch.cat([x, x]), torch.cat([y, y]))
    assert relative_error(doubled, hessian(model, loss, x, y)) < RTOL


def test_hessian_does_not_depend_on_the_cut():
    at_p = case("softmax at probabilities")
    at_logits = case("softmax at logits")
    at_logits.model.load_state_dict(at_p.model.state_dict())
    expected = hessian(at_p.model, at_p.loss, at_p.x, at_p.y)
    assert relative_error(hessian(at_logits.model, at_logits.loss, at_p.x, at_p.y), expected) < RTOL


def test_newton_step_solves_linear_regression_at_once():
    """Thesis eq. (3.1.1): on a quadratic, one Newton step reaches the minimum."""
    model, loss, x, y = case("linear regression")
    g, H = per_example_gradient(model, loss, x, y).mean(0), hessian(model, loss, x, y)
    assert g.norm() > 1e-2
    step = -torch.linalg.solve(H, g)
    torch.nn.utils.vector_to_parameters(parameter_vector(model) + step, model.parameters())
    assert per_example_gradient(model, loss, x, y).mean(0).norm() < 1e-12 * H.norm()
