"""Kronecker algebra against numpy.kron, and the bordered matrix against its definition."""

import numpy as np
import pytest
import references
import torch
from references import relative_error

from sogrid.kronecker import (
    bordered,
    bordered_inverse,
    homogeneous,
    homogeneous_gradient,
    kronecker_product,
    kronecker_solve,
    unvec,
    vec,
)
from sogrid.statistics import input_moments
from sogrid.structured import Factored

RTOL = 1e-12  # of the norm, float64 rounding times a condition number of at most 1e3

leading_dimensions = pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)


def flattened(tensor, leading):
    """[..., *rest] as a list over the leading dimensions, to compare one at a time."""
    return list(tensor.reshape(-1, *tensor.shape[len(leading) :]))


@pytest.fixture
def definite(draw):
    """``definite(*leading, m)``: [..., m, m], symmetric with eigenvalues of at least one."""

    def make(*shape):
        h = draw(*shape, shape[-1])
        return h @ h.mT / shape[-1] + torch.eye(shape[-1], dtype=torch.float64)

    return make


# --- vec -------------------------------------------------------------------------------------------


@leading_dimensions
def test_vec_stacks_columns_and_unvec_undoes_it(draw, leading):
    matrix = draw(*leading, 4, 3)
    stacked = vec(matrix)
    assert stacked.shape == (*leading, 12)
    for v, m in zip(flattened(stacked, leading), flattened(matrix, leading), strict=True):
        assert torch.equal(v, references.vec(m))
        assert np.array_equal(v.numpy(), m.numpy().flatten(order="F"))
    assert torch.equal(unvec(stacked, 4), matrix)
    assert torch.equal(vec(unvec(stacked, 4)), stacked)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)], ids=str)
def test_vec_of_a_row_or_a_column(draw, shape):
    matrix = draw(*shape)
    assert torch.equal(vec(matrix), matrix.reshape(-1))
    assert torch.equal(unvec(vec(matrix), shape[0]), matrix)


def test_unvec_refuses_a_length_that_is_no_multiple_of_the_rows(draw):
    with pytest.raises(RuntimeError):
        unvec(draw(7), 2)


def test_vec_of_a_product(draw):
    """vec(A X B) = (Bᵀ ⊗ A) vec(X), Thesis §6.2, with every side of another length."""
    a, x, b = draw(4, 3), draw(3, 5), draw(5, 2)
    assert relative_error(vec(a @ x @ b), references.kron(b.mT, a) @ vec(x)) < RTOL


def test_vec_of_an_outer_product_is_a_kronecker_product(draw):
    """vec(g hᵀ) = h ⊗ g: why a layer's gradient is a Kronecker product per example (eq. 6.2.1)."""
    g, h = draw(3), draw(4)
    assert relative_error(vec(torch.outer(g, h)), references.kron(h, g)) < RTOL


# --- products --------------------------------------------------------------------------------------


def test_kronecker_product_is_numpys_for_any_two_square_matrices(draw):
    """Neither need be symmetric: a transpose in the wrong place shows."""
    a, b, v = draw(4, 4), draw(3, 3), draw(12)
    assert relative_error(kronecker_product(a, b, v), references.kron(a, b) @ v) < RTOL


def test_kronecker_product_broadcasts(draw):
    """A batch of vectors under one pair of matrices, and a batch of pairs on one vector."""
    a, b, v = draw(2, 4, 4), draw(2, 3, 3), draw(5, 12)
    for result, x in zip(kronecker_product(a[0], b[0], v), v, strict=True):
        assert relative_error(result, references.kron(a[0], b[0]) @ x) < RTOL
    for k, result in enumerate(kronecker_product(a, b, v[0])):
        assert relative_error(result, references.kron(a[k], b[k]) @ v[0]) < RTOL


def test_kronecker_solve_solves_the_product(definite, draw):
    """(A ⊗ B)⁻¹ vec(G), Thesis §6.2.1: by numpy, and back through kronecker_product."""
    a, b, gradient = definite(4), definite(3), draw(3, 4)
    solution = kronecker_solve(torch.linalg.inv(a), torch.linalg.inv(b), gradient)
    dense = np.linalg.solve(references.kron(a, b).numpy(), vec(gradient).numpy())
    assert relative_error(vec(solution), torch.from_numpy(dense)) < RTOL
    assert relative_error(kronecker_product(a, b, vec(solution)), vec(gradient)) < RTOL


@leading_dimensions
def test_kronecker_solve_broadcasts(definite, draw, leading):
    a, b = torch.linalg.inv(definite(*leading, 4)), torch.linalg.inv(definite(*leading, 3))
    gradient = draw(*leading, 3, 4)
    together = zip(
        *(flattened(t, leading) for t in (kronecker_solve(a, b, gradient), a, b, gradient)), strict=True
    )
    for result, a_k, b_k, g_k in together:
        assert relative_error(vec(result), references.kron(a_k, b_k) @ vec(g_k)) < RTOL


def test_the_inverse_of_a_product_is_the_product_of_inverses(definite):
    a, b = definite(4), definite(3)
    inverse = references.kron(torch.linalg.inv(a), torch.linalg.inv(b))
    assert relative_error(inverse, torch.linalg.inv(references.kron(a, b))) < RTOL


# --- the bordered matrix ---------------------------------------------------------------------------


@leading_dimensions
def test_homogeneous_appends_a_one(draw, leading):
    h = draw(*leading, 5, 3)
    assert torch.equal(homogeneous(h)[..., :3], h)
    assert torch.equal(homogeneous(h)[..., 3], torch.ones(*leading, 5, dtype=torch.float64))


@leading_dimensions
def test_bordered_is_the_second_moment_of_homogeneous_inputs(draw, leading):
    """A = E[h̃h̃ᵀ], one example at a time, from mean and covariance."""
    h = draw(*leading, 7, 3) + 2
    mean, covariance = input_moments(h)
    a = bordered(covariance, mean)
    assert a.shape == (*leading, 4, 4)
    for a_k, h_k in zip(flattened(a, leading), flattened(h, leading), strict=True):
        rows = [np.append(row.numpy(), 1.0) for row in h_k]
        expected = sum(np.outer(row, row) for row in rows) / len(rows)
        assert relative_error(a_k, torch.from_numpy(expected)) < RTOL


@leading_dimensions
def test_bordered_inverse_needs_only_the_inverse_covariance(definite, draw, leading):
    """Thesis §6.2.2, THESIS row 19: equal to numpy's inverse of the bordered matrix."""
    covariance, mean = definite(*leading, 4), draw(*leading, 4)
    inverse = bordered_inverse(torch.linalg.inv(covariance), mean)
    expected = np.linalg.inv(bordered(covariance, mean).numpy())
    assert relative_error(inverse, torch.from_numpy(expected)) < RTOL
    identity = torch.eye(5, dtype=torch.float64).expand(*leading, 5, 5)
    assert relative_error(inverse @ bordered(covariance, mean), identity) < RTOL


def test_bordered_inverse_separates_weights_from_biases(definite, draw):
    """[∇W, ∇b] A⁻¹ = [(∇W − ∇b h̄ᵀ) C⁻¹, ∇b − that · h̄]: the boxed updates, eqs. (6.2.4) and (6.2.5)."""
    covariance, mean = definite(4), draw(4)
    grad_w, grad_b = draw(3, 4), draw(3)
    step = torch.cat([grad_w, grad_b[:, None]], 1) @ bordered_inverse(torch.linalg.inv(covariance), mean)
    dw = (grad_w - torch.outer(grad_b, mean)) @ torch.linalg.inv(covariance)
    assert relative_error(step[:, :4], dw) < RTOL
    assert relative_error(step[:, 4], grad_b - dw @ mean) < RTOL


@pytest.mark.parametrize("n", [2, 9])
def test_a_factored_gradient_takes_its_bias_along(definite, draw, n):
    """[∇W, ∇b] = gᵀ[h; 1], and B⁻¹ [∇W, ∇b] A⁻¹ by whichever route."""
    g, h = draw(n, 4), draw(n, 5)
    gradient = homogeneous_gradient(Factored(g, h, 0.5), None)
    expected = homogeneous_gradient(0.5 * g.mT @ h, 0.5 * g.sum(0))
    torch.testing.assert_close(gradient.dense(), expected, rtol=1e-12, atol=1e-12)
    a, b = definite(6), definite(4)
    found = kronecker_solve(a, b, gradient)
    found = found.dense() if isinstance(found, Factored) else found
    torch.testing.assert_close(found, kronecker_solve(a, b, expected), rtol=1e-12, atol=1e-12)
