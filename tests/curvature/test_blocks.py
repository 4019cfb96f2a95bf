"""Layer blocks, their inverse, and the two orders of a layer's parameters."""

import pytest
import references
import torch
from cases import CASES, build, case
from references import relative_error
from torch import nn

from sogrid.curvature import (
    block_diagonal,
    block_inverse,
    condition_number,
    fisher,
    layer_blocks,
    layer_indices,
    parameter_vector,
    to_thesis_order,
)
from sogrid.networks import MLP

RTOL = 1e-12  # of the norm, float64 rounding


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_layer_indices_partition_the_parameters_in_order(case_):
    model = build(case_).model
    indices = layer_indices(model)
    assert list(indices) == [name for name, m in model.named_children() if isinstance(m, nn.Linear)]
    assert torch.cat(list(indices.values())).tolist() == list(range(len(parameter_vector(model))))
    theta = parameter_vector(model)
    for name, where in indices.items():
        assert torch.equal(theta[where], parameter_vector(model.get_submodule(name)))


def test_normalisations_have_blocks_of_their_own():
    model = MLP([3, 4, 2], normalization="mean_only")
    assert {name: len(where) for name, where in layer_indices(model).items()} == {
        "linear1": 12,
        "norm1": 4,
        "linear2": 10,
    }


def test_layer_blocks_are_rows_and_columns_of_weight_and_bias():
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))  # 3 and 4 parameters
    matrix = torch.arange(49.0).view(7, 7)
    blocks = layer_blocks(model, matrix)
    assert torch.equal(blocks["0"], matrix[:3, :3])
    assert torch.equal(blocks["1"], matrix[3:, 3:])


def test_block_diagonal_is_torchs():
    model, loss, x, _ = case("deep linear")
    F = fisher(model, loss, x)
    expected = torch.block_diag(*layer_blocks(model, F).values())
    assert torch.equal(block_diagonal(model, F), expected)
    assert relative_error(expected, F) > 1e-2  # the blocks are not all there is


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_block_inverse_is_the_inverse_of_the_damped_block_diagonal(case_):
    """Condition numbers here are below 1e5, so 1e-9 is rounding."""
    model, loss, x, _ = build(case_)
    damping = 1e-2
    F = fisher(model, loss, x)
    damped = block_diagonal(model, F) + damping * torch.eye(len(F), dtype=F.dtype)
    assert condition_number(damped) < 1e5
    assert relative_error(block_inverse(model, F, damping), torch.linalg.inv(damped)) < 1e-9
    assert relative_error(block_inverse(model, F, damping) @ damped, torch.eye(len(F), dtype=F.dtype)) < 1e-9


def test_block_inverse_undamped_and_singular():
    model, loss, x, _ = case("linear regression")
    F = fisher(model, loss, x)
    assert relative_error(block_inverse(model, F), torch.linalg.inv(F)) < 1e-10
    with pytest.raises(torch.linalg.LinAlgError):
        block_inverse(model, torch.zeros_like(F))


@pytest.mark.parametrize("function", [layer_blocks, block_diagonal, block_inverse])
def test_blocks_refuse_a_matrix_of_another_size(function):
    with pytest.raises(ValueError, match=r"must be \[9, 9\] for this model, got \[8, 8\]"):
        function(nn.Linear(2, 3), torch.eye(8))


def test_condition_number_of_known_spectra(draw):
    basis = torch.linalg.qr(draw(5, 5))[0]
    values = torch.tensor([1.0, -2.0, 3.0, 50.0, 1000.0], dtype=torch.float64)
    matrix = basis @ torch.diag(values) @ basis.mT
    assert abs(condition_number(matrix) - 1000) < 1e-8
    values[0] = 0
    assert condition_number(basis @ torch.diag(values) @ basis.mT) == torch.inf


def test_condition_number_falls_with_damping():
    model, loss, x, _ = case("tanh regression")
    F = fisher(model, loss, x)
    identity = torch.eye(len(F), dtype=F.dtype)
    high = torch.linalg.matrix_norm(F, 2)
    assert condition_number(F) == torch.inf  # 10 rows of Jacobian, 26 parameters
    for damping in (1e-2, 1e-1, 1.0):
        expected = (high + damping) / damping
        assert abs(condition_number(F + damping * identity) / expected - 1) < 1e-9


@pytest.mark.parametrize("bias", [True, False])
def test_thesis_order_stacks_columns(bias, draw):
    layer = nn.Linear(4, 3, bias=bias).double()
    thesis = references.vec(layer.weight.detach())
    if bias:
        thesis = torch.cat([thesis, layer.bias.detach()])
    assert torch.equal(to_thesis_order(layer, parameter_vector(layer)), thesis)
    block = draw(len(thesis), len(thesis))
    order = to_thesis_order(layer, torch.arange(len(thesis)))
    assert torch.equal(to_thesis_order(layer, block), block[order][:, order])
    v = draw(len(thesis))
    product = to_thesis_order(layer, block) @ to_thesis_order(layer, v)
    assert relative_error(product, to_thesis_order(layer, block @ v)) < RTOL


@pytest.mark.parametrize("shape", [(7,), (7, 8), (8, 8, 8), ()])
def test_thesis_order_refuses_other_shapes(shape):
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="must have side 8"):
        to_thesis_order(layer, torch.zeros(shape))
