"""The pure functions with a leading dimension: K configurations, each as if it were alone."""

import pytest
import torch
from torch import nn

from sogrid.factorize import FactorizationError, failures_are_nan, tikhonov_inverse
from sogrid.losses import Quadratic
from sogrid.optimizers import (
    acp_inverse,
    acp_update,
    centered_update,
    kfac_inverses,
    kfac_update,
    updated_backprop_update,
)
from sogrid.optimizers.updated_backprop import gauss_newton_term, hessian_term
from sogrid.statistics import input_moments, input_rows, output_rows, second_moment, squared_gradient_bound
from sogrid.structured import Factored, Gram, ThinInverse, add_outer, matrixwise, vectorwise

K, I, O = 3, 7, 3
RTOL = 1e-12


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LR, DAMPING, ALPHA = (torch.tensor(v, dtype=torch.float64) for v in ([0.1, 1, 10], [3, 0.2, 1], [1, 5, 0.3]))


def whole(value):
    return value.dense() if isinstance(value, Factored | ThinInverse) else value


def assert_each(function, *arguments):
    """``function`` of stacks is the stack of its values, for tuples of tensors."""
    for found, *alone in zip(
        function(*arguments), *(function(*(a[k] for a in arguments)) for k in range(K)), strict=True
    ):
        expected = torch.stack([whole(v) for v in alone])
        assert whole(found).shape == expected.shape
        torch.testing.assert_close(whole(found), expected, rtol=RTOL, atol=1e-13)


@pytest.fixture(params=[2, 20], ids=["thin", "dense"])
def layer(request):
    """(h, g), ``[K, n, ·]`` with n = 2 or 20."""
    return draw(K, request.param, I), draw(K, request.param, O, seed=1)


def gradient(h, g, factored):
    whole = Factored(g, h, 1 / h.shape[-2])
    return (whole if factored else whole.dense()), g.mean(-2)


def test_hyperparameters_are_shaped_for_what_they_multiply():
    assert matrixwise(LR).shape == (K, 1, 1)
    assert vectorwise(LR).shape == (K, 1)
    for one in (0.5, torch.tensor(0.5)):
        assert matrixwise(one) is vectorwise(one) is one


def test_statistics(layer):
    assert_each(lambda h, g: (*input_moments(h), squared_gradient_bound(g)), *layer)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("correction", [False, True])
def test_centred_gradient_descent(layer, factored, correction):
    def step(h, g, lr):
        return centered_update(*gradient(h, g, factored), h.mean(-2), lr=lr, bias_correction=correction)

    assert_each(step, *layer, LR)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("tikhonov", ["printed", "exact"])
def test_acp(layer, factored, tikhonov):
    def step(h, g, lr, damping, alpha):
        mean, rows = input_rows(h)
        shift = damping / alpha
        inverse = acp_inverse(mean, second_moment(rows), shift, tikhonov)
        assert isinstance(inverse, ThinInverse) == (h.shape[-2] == 2)
        return acp_update(
            *gradient(h, g, factored), mean, inverse, lr=lr, output_curvature=alpha, bias_correction=True,
            corner=shift if tikhonov == "exact" else 0.0,
        )  # fmt: skip

    assert_each(step, *layer, LR, DAMPING, ALPHA)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pi_correction", [False, True])
def test_kfac(layer, factored, bias, pi_correction):
    def step(h, g, lr, damping):
        grad_w, grad_b = gradient(h, g, factored)
        rows = input_rows(torch.cat([h, torch.ones_like(h[..., :1])], -1) if bias else h, centered=False)[1]
        inverses = kfac_inverses(second_moment(rows), second_moment(output_rows([g])), damping, pi_correction)
        dw, db = kfac_update(grad_w, grad_b if bias else None, *inverses, lr=lr)
        return (dw, db) if bias else (dw,)

    assert_each(step, *layer, LR, DAMPING)


@pytest.mark.parametrize("second", ["gauss_newton", "hessian"])
def test_updated_backpropagation(second):
    h, w1, w2, b2, y = draw(K, 6, I), draw(K, 4, I), draw(K, O, 4), draw(K, O), draw(K, 6, O, seed=1)

    def step(h, w1, w2, b2, y, lr):
        f, loss = [nn.Tanh(), nn.Sigmoid()], Quadratic()
        a1 = h @ w1.mT
        a2 = f[0](a1) @ w2.mT + b2.unsqueeze(-2)
        out, weights = f[1](a2), [w1, w2]
        term = (
            gauss_newton_term([a1, a2], weights, f, lambda v: loss.hessian_product(out, y, v))
            if second == "gauss_newton"
            else hessian_term([a1, a2], weights, [None, b2], f, loss, y)
        )
        changes = updated_backprop_update(
            [h, f[0](a1)], [a1, a2], weights, f, loss.gradient(out, y), term, lr=[lr, 2 * lr]
        )
        return [part for change in changes for part in change]

    assert_each(step, h, w1, w2, b2, y, LR)


def test_data_shared_by_all_are_as_good_as_copies():
    """One minibatch for K configurations, with statistics, dampings and step sizes of their own."""
    for n in (2, 20):
        h, g = draw(n, I), draw(K, n, O, seed=1)
        copies = h.expand(K, n, I)
        mean, rows = input_rows(h)
        for tikhonov in ("printed", "exact"):
            found, expected = (
                acp_update(
                    Factored(g, x, 1 / n), g.mean(-2), x.mean(-2),
                    acp_inverse(mean, second_moment(rows), DAMPING, tikhonov), lr=LR, output_curvature=ALPHA,
                )
                for x in (h, copies)
            )  # fmt: skip
            assert whole(found[0]).shape == (K, O, I)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(whole(a), whole(b), rtol=RTOL, atol=1e-13)


def test_an_outer_product_with_a_weight_for_each():
    rows, vector = draw(2, I), draw(K, I, seed=1)
    for matrix in (Gram(rows), Gram(rows).dense()):
        found = add_outer(matrix, vector, DAMPING)
        found = found.dense() if isinstance(found, Gram) else found
        for k in range(K):
            expected = rows.mT @ rows + DAMPING[k] * torch.outer(vector[k], vector[k])
            torch.testing.assert_close(found[k], expected, rtol=RTOL, atol=1e-13)


# One failure


@pytest.mark.parametrize("bad", ["indefinite", "nan", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_failed_factorisation_is_nan_for_itself_alone(bad, dtype):
    matrices = Gram(draw(K, 9, 4)).dense().to(dtype)
    spoiled, expected = matrices.clone(), tikhonov_inverse(matrices, 0.1)
    spoiled[1] = -torch.eye(4) if bad == "indefinite" else float(bad)
    with failures_are_nan():
        found = tikhonov_inverse(spoiled, 0.1)
        assert found[1].isnan().all()
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        assert tikhonov_inverse(spoiled[1], 0.1).isnan().all()
    with pytest.raises(FactorizationError):
        tikhonov_inverse(spoiled, 0.1)


@pytest.mark.parametrize("bad", ["nan", "inf", "lost damping"])
def test_a_failed_thin_inverse_is_nan_for_itself_alone(bad):
    rows, damping = draw(K, 2, I), DAMPING.clone()
    spoiled, spoiled_damping = rows.clone(), damping.clone()
    if bad == "lost damping":
        spoiled_damping[1] = 1e-30
    else:
        spoiled[1, 0, 3] = float(bad)
    with failures_are_nan():
        found = tikhonov_inverse(Gram(spoiled), spoiled_damping)
    expected = tikhonov_inverse(Gram(rows), damping)
    assert isinstance(found, ThinInverse)
    assert found.factor[1].isnan().all()
    assert torch.equal(found.factor[[0, 2]], expected.factor[[0, 2]])


def test_float64_helps_where_float32_fails_and_changes_no_neighbour():
    """1 + 1e-8 is 1 in float32, where the damped matrix of ones is singular."""
    matrices, damping = torch.stack([torch.eye(3), torch.ones(3, 3)]), torch.tensor([0.3, 1e-8])
    with failures_are_nan():
        found = tikhonov_inverse(matrices, damping)
    assert torch.equal(found[0], tikhonov_inverse(matrices[0], damping[0]))
    assert torch.equal(found[1], tikhonov_inverse(matrices[1], damping[1]))
