"""Jacobians against per-example loops and finite differences."""

import pytest
import references
import torch
from cases import CASES, build, case
from references import relative_error
from torch import nn

from sogrid.curvature import (
    evaluate,
    parameter_vector,
    per_example_gradient,
    per_example_jacobian,
    preactivation_jacobian,
    pull_back,
)
from sogrid.losses import Quadratic
from sogrid.networks import MLP

RTOL = 1e-12  # of the norm, float64 rounding
RTOL_DIFFERENCES = 1e-8  # central differences with step 1e-5


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_jacobian_is_the_loop_over_examples_and_outputs(case_):
    model, _, x, _ = build(case_)
    J = per_example_jacobian(model, x)
    assert J.shape == (len(x), model(x).shape[1], sum(p.numel() for p in model.parameters()))
    assert relative_error(J, references.jacobian(model, x)) < RTOL


def test_jacobian_is_the_limit_of_finite_differences():
    model, _, x, _ = case("sigmoid autoencoder")
    theta = parameter_vector(model)
    expected = references.finite_difference_jacobian(lambda t: evaluate(model, t, x), theta)
    assert relative_error(per_example_jacobian(model, x), expected) < RTOL_DIFFERENCES


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_per_example_gradient_is_the_loop_over_examples(case_):
    model, loss, x, y = build(case_)
    rows = references.rows(y, model(x).shape[1], x.dtype)
    expected = references.per_example_gradient(model, type(loss).__name__, x, rows)
    gradient = per_example_gradient(model, loss, x, y)
    if case_.targets.__name__ == "reached":
        assert gradient.abs().max() == 0
    else:
        assert relative_error(gradient, expected) < RTOL


def test_mean_of_per_example_gradients_is_the_gradient_of_the_mean_loss():
    model, loss, x, y = case("softmax at logits")
    assert loss.reduction == "mean"
    expected = references.flat_gradient(loss(model(x), y), model)
    assert relative_error(per_example_gradient(model, loss, x, y).mean(0), expected) < RTOL


def test_parameter_vector_is_row_major_weight_then_bias():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(6.0).view(2, 3))
        model[0].bias.copy_(torch.tensor([6.0, 7.0]))
        model[1].weight.copy_(torch.tensor([[8.0, 9.0]]))
    theta = parameter_vector(model)
    assert theta.tolist() == list(range(10))
    assert not theta.requires_grad


def test_evaluate_replaces_parameters_and_leaves_the_model_alone(draw):
    model, _, x, _ = case("tanh regression")
    before = parameter_vector(model)
    other = draw(len(before))
    f = evaluate(model, other, x)
    assert torch.equal(parameter_vector(model), before)
    torch.nn.utils.vector_to_parameters(other, model.parameters())
    assert torch.equal(f, model(x).detach())


@pytest.mark.parametrize("normalization", ["mean_only", "batch"])
def test_jacobian_of_a_network_that_mixes_examples_and_keeps_its_buffers(normalization, draw):
    model = MLP([3, 4, 2], "tanh", normalization=normalization, dtype=torch.float64).train()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    x = draw(6, 3)
    J = per_example_jacobian(model, x)
    assert {name: b.tolist() for name, b in model.named_buffers()} == {
        name: b.tolist() for name, b in buffers.items()
    }
    theta = parameter_vector(model)
    expected = references.finite_difference_jacobian(lambda t: evaluate(model, t, x), theta)
    assert relative_error(J, expected) < RTOL_DIFFERENCES


def test_evaluate_wants_a_matrix_of_outputs():
    with pytest.raises(ValueError, match=r"\[n, k\], got \[5\]"):
        per_example_jacobian(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), torch.zeros(5, 3))


def test_pull_back_is_the_mean_of_quadratic_forms(draw):
    J, D = draw(4, 2, 7), draw(4, 2, 2)  # not symmetric: Jᵀ D J, not Jᵀ Dᵀ J
    assert relative_error(pull_back(J, D), references.quadratic_form_mean(J, list(D))) < RTOL


@pytest.mark.parametrize("case_", CASES, ids=str)
def test_preactivation_jacobian_gives_the_jacobian_of_weights_and_biases(case_):
    """Eq. (6.2.1): ∂f_k/∂W = J_a[k] hᵀ and ∂f/∂b = J_a, against the loop over parameters."""
    model, _, x, _ = build(case_)
    J = references.jacobian(model, x)
    start = 0
    for name, layer in model.named_children():
        if not isinstance(layer, nn.Linear):
            continue
        h, J_a = preactivation_jacobian(model, name, x)
        assert h.shape == (len(x), layer.in_features)
        assert J_a.shape == (len(x), J.shape[1], layer.out_features)
        stop = start + layer.weight.numel()
        outer = torch.einsum("nko,ni->nkoi", J_a, h).flatten(2)
        assert relative_error(outer, J[:, :, start:stop]) < RTOL
        start = stop
        if layer.bias is not None:
            assert relative_error(J_a, J[:, :, start : start + layer.out_features]) < RTOL
            start += layer.out_features
    assert start == J.shape[-1]


def test_preactivation_jacobian_leaves_the_model_alone():
    model, _, x, _ = case("tanh regression")
    before = [(name, type(m)) for name, m in model.named_modules()]
    preactivation_jacobian(model, "linear1", x)
    assert [(name, type(m)) for name, m in model.named_modules()] == before
    assert all(not m._forward_hooks for m in model.modules())


def test_preactivation_jacobian_of_a_bare_layer_is_the_identity(draw):
    layer, x = nn.Linear(3, 2).double(), draw(4, 3)
    h, J_a = preactivation_jacobian(layer, "", x)
    assert torch.equal(h, x)
    assert torch.equal(J_a, torch.eye(2, dtype=torch.float64).expand(4, 2, 2))


def test_preactivation_jacobian_names_what_is_wrong():
    x = torch.zeros(4, 3)
    square = nn.Linear(3, 3)
    with pytest.raises(KeyError, match="no module named 'missing'"):
        preactivation_jacobian(nn.Sequential(square), "missing", x)
    with pytest.raises(TypeError, match=r"'1' must be an nn\.Linear, got Tanh"):
        preactivation_jacobian(nn.Sequential(square, nn.Tanh()), "1", x)
    with pytest.raises(ValueError, match="'0' must be applied once"):
        preactivation_jacobian(nn.Sequential(square, nn.Tanh(), square), "0", x)


def test_float32_stays_float32():
    model, x = MLP([3, 2]), torch.zeros(4, 3)
    assert per_example_jacobian(model, x).dtype == torch.float32
    assert per_example_gradient(model, Quadratic(), x, torch.ones(4, 2)).dtype == torch.float32
