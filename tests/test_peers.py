"""Our factors beside those of curvlinops and nngeometry, where these are installed (``make bench`` does).

Run as ``PYTHONPATH=.venv/peers python -m pytest tests/test_peers.py``.
"""

import pytest
import torch
from references import relative_error
from test_sharing import draw, factors, network, rows_of, tokens
from torch import nn

from sogrid.losses import Quadratic
from sogrid.optimizers.ekfac import EKFACMethod
from sogrid.optimizers.kfac import KFACMethod
from sogrid.rows import SHARED

ROUNDING = 1e-10
N = 6
EXACT = KFACMethod(Quadratic(), "fisher_exact", 1, 0)


def images(*options, **more):
    return network(nn.Conv2d(2, 3, *options, **more), nn.Tanh, nn.Flatten, nn.LazyLinear(2))


NETWORKS = {
    "perceptron": (lambda: network(nn.Linear(4, 5), nn.Tanh, nn.Linear(5, 3)), (4,)),
    "tokens": (lambda: tokens(nn.Tanh), (5, 4)),
    "tokens, pooled": (lambda: tokens(nn.Tanh, pooled=True), (5, 4)),
    "images": (lambda: images(3), (2, 6, 6)),
    "images, strided, padded": (lambda: images((2, 3), stride=2, padding=1), (2, 6, 6)),
}


def make(name):
    build, shape = NETWORKS[name]
    model, x = build(), draw(N, *shape)
    model(x)
    return model, x


def in_torchs_order(matrix, o):
    """From vec[W, b] to [W.flatten(); b]."""
    at = torch.arange(len(matrix)).view(-1, o)
    order = torch.cat([at[:-1].mT.flatten(), at[-1]])
    return matrix[order][:, order]


def blocks(dense, model):
    """The blocks of the layers, along the diagonal."""
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model if list(layer.parameters())]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [dense[a : a + size, a : a + size] for a, size in zip(starts, sizes, strict=False)]


def curvlinops_matrix(kind, model, x, shared):
    curvlinops = pytest.importorskip("curvlinops")
    batch = x, torch.zeros_like(model(x)).detach()
    options = {"fisher_type": "type-2", "kfac_approx": shared, "separate_weight_and_bias": False}
    parameters = list(model.parameters())
    operator = getattr(curvlinops, kind)(
        model, nn.MSELoss(reduction="sum"), parameters, [batch], check_deterministic=False, **options
    )
    return operator @ torch.eye(sum(p.numel() for p in parameters), dtype=x.dtype) / N


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shared", SHARED)
def test_kfac_has_the_factors_of_curvlinops(name, shared):
    model, x = make(name)
    theirs = blocks(curvlinops_matrix("KFACLinearOperator", model, x, shared), model)
    for rows, their in zip(rows_of(model, x, EXACT).values(), theirs, strict=True):
        a, b = factors(rows, shared)
        assert relative_error(in_torchs_order(torch.kron(a, b), len(b)), their) < ROUNDING


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "tokens"])
def test_ekfac_has_the_moments_of_curvlinops(name):
    """Reduced, theirs are of the reduced rows; ours of an example's gradient, which is what the block has."""
    model, x = make(name)
    theirs = blocks(curvlinops_matrix("EKFACLinearOperator", model, x, "expand"), model)
    method = EKFACMethod(Quadratic(), "fisher_exact", 1, 0)
    for rows, their in zip(rows_of(model, x, method).values(), theirs, strict=True):
        state = method.invert(method.measure(rows, {}), {}, "")
        basis = torch.kron(state["a_basis"], state["b_basis"])
        moments = method.moments(rows, state, {})
        ours = basis @ moments.mT.flatten().diag() @ basis.mT
        assert relative_error(in_torchs_order(ours, len(moments)), their) < ROUNDING


@pytest.mark.parametrize("name", ["perceptron", "images", "images, strided, padded"])
def test_kfac_has_the_factors_of_nngeometry(name):
    """It expands convolutions, knows no tokens, and has its matrices in float32."""
    metrics = pytest.importorskip("nngeometry.metrics")
    kind = pytest.importorskip("nngeometry.object").PMatKFAC
    model, x = make(name)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), N)
    fisher = metrics.FIM(model, loader, kind, variant="regression", function=lambda x, _: 2**0.5 * model(x))
    for rows, their in zip(rows_of(model, x, EXACT).values(), blocks(fisher.to_torch(), model), strict=True):
        a, b = factors(rows, "expand")
        assert relative_error(in_torchs_order(torch.kron(a, b), len(b)), their.double()) < 1e-6
