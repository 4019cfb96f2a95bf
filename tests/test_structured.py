"""Matrices known by their factors, against the matrices themselves in float64, and which route is taken."""

import numpy as np
import pytest
import torch
from references import relative_error
from torch.utils.flop_counter import FlopCounterMode

from sogrid.factorize import (
    tikhonov_inverse,
)
from sogrid.structured import (
    Factored,
    Gram,
    add_to,
    scalar,
)

RTOL = 1e-12  # of the norm, float64 rounding times a condition number of at most 1e3


# --- gradients known by their factors ----------------------------------------------------------------

SHAPES = [(1, 4, 6), (3, 4, 6), (4, 4, 6), (5, 4, 6), (6, 4, 6), (9, 4, 6), (5, 6, 4), (7, 6, 4)]  # n, o, i


def factored(draw, n, o, i, *, centered=False, scale=0.3):
    """G, by factors and as a matrix."""
    left, right, mean = draw(n, o), draw(n, i), draw(i)
    matrix = scale * left.mT @ (right - mean if centered else right)
    gradient = Factored(left, right, scale)
    return (gradient.centered(mean) if centered else gradient), matrix


def whole(product):
    return product.dense() if isinstance(product, Factored) else product


def thin_inverse(draw, m, leading=()):
    return tikhonov_inverse(Gram(draw(*leading, 2, m)), torch.full(leading, 0.7, dtype=torch.float64))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_multiply_like_their_matrix(draw, shape, centered):
    """By dense and thin matrices and by columns, from both sides and in turn; s may be a tensor."""
    for scale in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        gradient, matrix = factored(draw, *shape, centered=centered, scale=scale)
        _, o, i = shape
        right, left, column = draw(i, i), draw(o, o), draw(i, 1)
        p, q = thin_inverse(draw, i), thin_inverse(draw, o)
        both = 2 * (q @ (-1.5 * gradient) @ p)
        for found, expected in [
            (gradient, matrix),
            (gradient.mT, matrix.mT),
            (gradient @ right, matrix @ right),
            (left @ gradient, left @ matrix),
            (gradient @ p, matrix @ p.dense()),
            (q @ gradient, q.dense() @ matrix),
            (gradient @ column, matrix @ column),
            (draw(1, o).fill_(2.0) @ gradient, 2 * matrix.sum(0, keepdim=True)),
            (both, -3 * q.dense() @ matrix @ p.dense()),
            (gradient[..., :-1], matrix[..., :-1]),
            (gradient[..., -1], matrix[..., -1]),
            ((left @ gradient)[..., -1], (left @ matrix)[..., -1]),
        ]:
            assert whole(found).shape == expected.shape
            assert relative_error(whole(found), expected) < RTOL
            weight = torch.ones_like(expected)
            if weight.dim() == 2:
                add_to(weight, found)
                assert relative_error(weight, 1 + expected) < RTOL


@pytest.mark.parametrize("centered", [False, True])
def test_factors_are_not_written_to(draw, centered):
    for n in (2, 9):
        gradient, _ = factored(draw, n, 4, 6, centered=centered)
        before = gradient.left.clone(), gradient.right.clone()
        for product in (
            gradient @ thin_inverse(draw, 6),
            gradient @ draw(6, 6),
            thin_inverse(draw, 4) @ gradient,
        ):
            add_to(torch.zeros(4, 6, dtype=torch.float64), -0.5 * product)
        assert torch.equal(gradient.left, before[0])
        assert torch.equal(gradient.right, before[1])


@pytest.mark.parametrize("n", [2, 9])
def test_factors_broadcast(draw, n):
    """A grid of configurations, each with a scale and a damping of its own."""
    scale = draw(3, 1, 1)
    gradient = scale * Factored(draw(3, n, 4), draw(3, n, 6)).centered(draw(3, 6))
    p, q = thin_inverse(draw, 6, (3,)), thin_inverse(draw, 4, (3,))
    found, weight = whole(q @ gradient @ p), torch.zeros(3, 4, 6, dtype=torch.float64)
    add_to(weight, gradient)
    for k in range(3):
        right = gradient.right[k] - gradient.mean[k]
        one = scale[k] * gradient.left[k].mT @ right
        assert relative_error(found[k], q.dense()[k] @ one @ p.dense()[k]) < RTOL
        assert relative_error(weight[k], one) < RTOL


@pytest.mark.parametrize("n", [2, 9])
def test_one_factor_may_be_shared(draw, n):
    """By a whole grid, as the inputs of a first layer are; the matrix, and its products from both sides."""
    shared, own, x = draw(n, 4), draw(3, n, 6), draw(5, 6)
    gradient = Factored(own, shared, 0.5)
    for k in range(3):
        one = 0.5 * own[k].mT @ shared
        assert relative_error(gradient.dense()[k], one) < RTOL
        assert relative_error(gradient.mT.dense()[k], one.mT) < RTOL
        assert relative_error(whole(x @ gradient)[k], x @ one) < RTOL
        assert relative_error(whole(gradient.mT @ x.mT)[k], one.mT @ x.mT) < RTOL


def test_numpy_numbers_scale_factors(draw):
    gradient, matrix = factored(draw, 2, 4, 6)
    assert relative_error((np.float64(-2.0) * gradient).dense(), -2 * matrix) < RTOL


@pytest.mark.parametrize(
    ("n", "route"), [(3, Factored), (4, Factored), (5, torch.Tensor), (6, torch.Tensor), (7, torch.Tensor)]
)
@pytest.mark.parametrize("thin", [False, True])
def test_where_factors_are_multiplied_and_where_the_matrix(draw, n, route, thin):
    """A square matrix from the right meets n rows of R or o = 4 of G; from the left n of L or i = 6."""
    gradient, _ = factored(draw, n, 4, 6)
    right, left = (thin_inverse(draw, 6), thin_inverse(draw, 4)) if thin else (draw(6, 6), draw(4, 4))
    assert isinstance(gradient @ right, route)
    assert isinstance(left @ gradient, Factored) == (n < 4)  # as wide as L: nothing is left to spare
    assert isinstance(gradient.mT @ left, Factored) == (n < 4)
    assert isinstance(right @ gradient.mT, route)


def addmm_flops(matrix, a, b, *, out_shape=None, **options):
    """Torch's counter knows all products but this one, which is in place."""
    return 2 * a[0] * a[1] * b[1]


def flops(work):
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("columns", ["thin", 7, 1, 3, 8])
@pytest.mark.parametrize("n", range(1, 12))
def test_the_route_is_the_cheaper_one(draw, n, columns):
    """Multiplications counted by torch, of the product and of forming it, from either side."""
    gradient, _ = factored(draw, n, 5, 7)
    thin = columns == "thin"
    x = thin_inverse(draw, 7) if thin else draw(7, columns)
    chosen = flops(lambda: whole(gradient @ x))
    factor_first = flops(lambda: gradient.left.mT @ (gradient.right @ x))
    matrix_first = flops(lambda: (gradient.left.mT @ gradient.right) @ x)
    assert chosen == min(factor_first, matrix_first)
    if not thin:
        assert flops(lambda: whole(x.mT @ gradient.mT)) == chosen


def test_a_scalar_is_read_where_nobody_waits():
    assert scalar(torch.tensor(2.0)) == 2.0
    assert isinstance(scalar(torch.tensor(2.0)), float)
    for value in (torch.tensor([2.0]), torch.tensor(2.0, device="meta")):
        assert scalar(value) is value
    assert scalar(3) == 3
