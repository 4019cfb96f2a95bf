"""Every function of the package on the meta device: a stray CPU tensor, or a read by the host, fails."""

import pytest
import torch
from cases import CASES, build

from sogrid import curvature
from sogrid.losses import BinaryCrossEntropyAtLogits, CrossEntropyAtLogits


@pytest.fixture(params=CASES, ids=str)
def on_meta(request):
    model, loss, x, y = build(request.param)
    return model.to("meta"), loss, x.to("meta"), y.to("meta")


def assert_meta(*results):
    assert all(result.device.type == "meta" and result.dtype == torch.float64 for result in results)


def test_matrices_stay_on_the_device(on_meta):
    model, loss, x, y = on_meta
    size = sum(p.numel() for p in model.parameters())
    matrices = [
        curvature.hessian(model, loss, x, y),
        curvature.gauss_newton(model, loss, x, y),
        curvature.fisher(model, loss, x),
        curvature.sampled_fisher(model, loss, x, 3),
        curvature.empirical_fisher(model, loss, x, y),
    ]
    matrices += [
        curvature.block_diagonal(model, matrices[0]),
        curvature.block_inverse(model, matrices[0], 0.1),
    ]
    if isinstance(loss, CrossEntropyAtLogits | BinaryCrossEntropyAtLogits):
        matrices += [
            curvature.gauss_newton_at_logits(model, loss, x, y),
            curvature.gauss_newton_at_probabilities(model, loss, x, y),
        ]
    assert all(matrix.shape == (size, size) for matrix in matrices)
    assert_meta(*matrices, curvature.condition_number(matrices[0]))
    assert_meta(curvature.kl_divergence(model, loss, x, curvature.parameter_vector(model)))


def test_layers_stay_on_the_device(on_meta):
    model, loss, x, y = on_meta
    for name, block in curvature.layer_blocks(model, curvature.fisher(model, loss, x)).items():
        layer = model.get_submodule(name)
        thesis = curvature.to_thesis_order(layer, block)
        assert_meta(thesis)
        for targets in (None, y):
            assert_meta(*curvature.kronecker_factors(model, name, loss, x, targets))
            assert_meta(curvature.kronecker_sum(model, name, loss, x, targets))


@pytest.mark.parametrize(
    "fault", [lambda m: m + torch.eye(3), lambda m: m.sum().item(), lambda m: bool((m > 0).all())]
)
def test_the_meta_device_catches_planted_faults(fault):
    with pytest.raises(RuntimeError):
        fault(torch.zeros(3, 3, device="meta"))
