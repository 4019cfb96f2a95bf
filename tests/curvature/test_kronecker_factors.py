"""A layer's block as a sum of Kronecker products, and when one product is enough."""

import pytest
import references
import torch
from cases import CASES, KFAC, build, case
from references import relative_error
from torch import nn

from sogrid.curvature import (
    fisher,
    gauss_newton,
    kronecker_factors,
    kronecker_sum,
    layer_blocks,
    preactivation_curvature,
    to_thesis_order,
)

RTOL = 1e-11  # of the norm, float64 rounding
DIFFERENT = 1e-2  # two matrices that are not equal differ by more than this


def thesis_blocks(model, matrix):
    blocks = layer_blocks(model, matrix)
    return {name: to_thesis_order(model.get_submodule(name), block) for name, block in blocks.items()}


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_kronecker_sum_is_the_gauss_newton_block(case_):
    """Eq. (6.2.2), against the block of a matrix that knows nothing of layers."""
    model, loss, x, y = build(case_)
    for name, block in thesis_blocks(model, gauss_newton(model, loss, x, y)).items():
        assert relative_error(kronecker_sum(model, name, loss, x, y), block) < RTOL


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_kronecker_sum_is_the_fisher_block(case_):
    model, loss, x, _ = build(case_)
    for name, block in thesis_blocks(model, fisher(model, loss, x)).items():
        assert relative_error(kronecker_sum(model, name, loss, x), block) < RTOL


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_one_kronecker_product_is_exact_on_the_labelled_cases(case_):
    model, loss, x, _ = build(case_)
    errors = []
    for name, block in thesis_blocks(model, fisher(model, loss, x)).items():
        A, B = kronecker_factors(model, name, loss, x)
        errors.append(relative_error(references.kron(A, B), block))
    assert (max(errors) < RTOL) if KFAC in case_.exact else (max(errors) > DIFFERENT)


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_factors_are_means_of_the_per_example_terms(case_):
    model, loss, x, y = build(case_)
    for name, layer in model.named_children():
        if not isinstance(layer, nn.Linear):
            continue
        for targets in (None, y):
            h, M = preactivation_curvature(model, name, loss, x, targets)
            A, B = kronecker_factors(model, name, loss, x, targets)
            assert relative_error(A, sum(torch.outer(v, v) for v in h) / len(h)) < RTOL
            assert relative_error(B, sum(M) / len(M)) < RTOL
            assert h.shape[1] == layer.in_features + (layer.bias is not None)
            assert M.shape == (len(x), layer.out_features, layer.out_features)


def test_first_layers_input_factor_is_the_second_moment_of_the_data():
    model, loss, x, _ = case("tanh regression")
    A, _ = kronecker_factors(model, "linear1", loss, x)
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    assert relative_error(A, ones.mT @ ones / len(x)) < RTOL
    assert A[-1, -1] == 1
    assert relative_error(A[:-1, -1], x.mean(0)) < RTOL


def test_targets_select_gauss_newton():
    model, loss, x, y = case("softmax at probabilities")
    with_targets, without = (kronecker_factors(model, "linear2", loss, x, t)[1] for t in (y, None))
    assert relative_error(with_targets, without) > DIFFERENT


def test_layers_are_checked():
    model, loss, x, _ = case("tanh regression")
    for function in (preactivation_curvature, kronecker_factors, kronecker_sum):
        with pytest.raises(TypeError, match="'act1' must be an"):
            function(model, "act1", loss, x)
