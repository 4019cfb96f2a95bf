"""FOOF and Newton-Muon against their formulas, on one layer and in float64."""

from copy import deepcopy

import pytest
import references
import torch
from torch import nn

from lab.rivals import (
    FOOF,
    AdamMethod,
    InGrid,
    NewtonMuon,
    NewtonMuonMethod,
    msgn,
    newton_schulz,
    ridged_inverse,
)
from sogrid.experiments.grid import Grid
from sogrid.losses import Quadratic
from sogrid.networks import MLP
from sogrid.optimizers import ACP

ROUNDING = 1e-12
n, n_in, n_out = 30, 5, 4


@pytest.fixture
def layer(draw):
    """A layer, inputs with a mean and targets."""
    made = nn.Linear(n_in, n_out, dtype=torch.float64)
    return made, draw(n, n_in) + 1.5, draw(n, n_out)


def gradients(layer, x, y):
    """(∇W, ∇b) of the mean of ‖a − y‖², by a loop over examples."""
    with torch.no_grad():
        g = [2 * (layer.weight @ xi + layer.bias - yi) for xi, yi in zip(x, y, strict=True)]
    return sum(torch.outer(gi, xi) for gi, xi in zip(g, x, strict=True)) / n, sum(g) / n


def second_moment(x):
    return sum(torch.outer(xi, xi) for xi in x) / len(x)


def step(optimizer, layer, x, y):
    """(ΔW, Δb) of one step."""
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer.zero_grad()
    Quadratic()(layer(x), y).backward()
    optimizer.step()
    return [p.detach() - old for p, old in zip(layer.parameters(), before, strict=True)]


@pytest.mark.parametrize("examples", [n, 3], ids=["dense", "thin"])
@pytest.mark.parametrize("gradient", ["matrix", "factored"])
def test_foof_is_the_formula(layer, gradient, examples):
    """ΔW = −λ ∇W (E[h hᵀ] + εI)⁻¹, Δb = −λ ∇b (Benzing 2022)."""
    layer, x, y = layer
    statistics = x[:examples], y[:examples]
    optimizer = FOOF(layer, 0.3, 0.2, max_change=None, gradients=gradient)
    optimizer.refresh(lambda: Quadratic()(layer(statistics[0]), statistics[1]))
    grad_w, grad_b = gradients(layer, x, y)
    matrix = second_moment(statistics[0]) + 0.2 * torch.eye(n_in, dtype=torch.float64)
    dw, db = step(optimizer, layer, x, y)
    assert references.relative_error(dw, -0.3 * grad_w @ torch.linalg.inv(matrix)) < ROUNDING
    assert references.relative_error(db, -0.3 * grad_b) < ROUNDING


def test_foof_is_acp_of_inputs_without_a_mean(layer):
    layer, x, y = layer
    x = x - x.mean(0)
    twin = nn.Linear(n_in, n_out, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    options = {"lr": 0.3, "damping": 0.2, "max_change": None}
    steps = step(FOOF(layer, **options), layer, x, y), step(ACP(twin, **options), twin, x, y)
    for ours, theirs in zip(*steps, strict=True):
        assert references.relative_error(ours, theirs) < ROUNDING


def test_foof_watches_its_own_quadratic_form(layer):
    """The adaptive schedule takes h̃ᵀ P h̃, here of uncentred inputs."""
    layer, x, y = layer
    optimizer = FOOF(layer, 0.1, 0.2)
    step(optimizer, layer, x, y)
    state = optimizer.state[layer.weight]
    inverse = torch.linalg.inv(second_moment(x) + 0.2 * torch.eye(n_in, dtype=torch.float64))
    expected = sum(xi @ inverse @ xi for xi in x) / n
    found = optimizer.method.quadratic_form(x, None, True, state, optimizer.param_groups[0])
    assert abs(float(found - expected)) < ROUNDING * float(expected)
    watching = FOOF(layer, 0.1, 0.2, refresh_every="adaptive")
    for _ in range(3):  # a look after each of the first updates
        step(watching, layer, x, y)


def test_msgn_has_singular_values_of_one(draw):
    matrix = draw(4, 7)
    found = msgn(matrix)
    assert torch.allclose(found @ found.mT, torch.eye(4, dtype=torch.float64), atol=ROUNDING)
    root = torch.linalg.inv(torch.linalg.cholesky(matrix @ matrix.mT))
    assert torch.linalg.eigvalsh(found @ matrix.mT).min() > 0  # the polar factor, not another rotation
    assert references.relative_error((root @ matrix) @ (root @ matrix).mT, found @ found.mT) < ROUNDING


@pytest.mark.parametrize("ridge", [0.2, 1.0])
def test_newton_muon_is_muon_of_the_preconditioned_gradient(layer, ridge):
    """W ← W − λ msgn(∇W (M + γI)⁻¹), by torch's own momentum and orthogonalisation (Du & Su 2026)."""
    layer, x, y = layer
    twin = nn.Linear(n_in, n_out, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    muon = torch.optim.Muon([twin.weight], 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam([twin.bias], 0.1)
    optimizer, moment = NewtonMuon(layer, 0.1, ridge=ridge, refresh_every=2, averaging=0.5), second_moment(x)
    for update in range(5):
        x = x + 0.1
        if update % 2 == 0:
            moment = second_moment(x) if update == 0 else (moment + second_moment(x)) / 2
        gamma = ridge * moment.diagonal().mean()
        grad_w, grad_b = gradients(twin, x, y)
        inverse = torch.linalg.inv(moment + gamma * torch.eye(n_in, dtype=torch.float64))
        twin.weight.grad, twin.bias.grad = grad_w @ inverse, grad_b
        muon.step()
        adam.step()
        step(optimizer, layer, x, y)
        assert references.relative_error(layer.weight.detach(), twin.weight.detach()) < 1e-2  # bfloat16
        assert references.relative_error(optimizer.inverses[0], inverse) < 1e-6  # the 1e-8 on the diagonal
        assert references.relative_error(layer.bias.detach(), twin.bias.detach()) < 1e-2


def test_newton_muon_steps_along_the_formula(layer):
    layer, x, y = layer
    grad_w, _ = gradients(layer, x, y)
    exact, plain = -msgn(grad_w @ ridged_inverse(second_moment(x))), -msgn(grad_w)
    dw, _ = step(NewtonMuon(layer, 0.1), layer, x, y)

    def cosine(other):
        return float((dw * other).sum() / (dw.norm() * other.norm()))

    assert cosine(exact) > 0.96  # torch's five Newton-Schulz steps leave singular values about one
    assert cosine(plain) < 0.93


def test_newton_muon_resumes(layer):
    layer, x, y = layer
    optimizer = NewtonMuon(layer, 0.1, refresh_every=3)
    for _ in range(2):
        step(optimizer, layer, x, y)
    twin = nn.Linear(n_in, n_out, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    resumed = NewtonMuon(twin, 0.1, refresh_every=3)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for _ in range(3):
        for ours, theirs in zip(step(optimizer, layer, x, y), step(resumed, twin, x, y), strict=True):
            assert torch.equal(ours, theirs)


def test_newton_muon_refuses_other_matrices():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="others"):
        NewtonMuon(model, 0.1)


# -- in a grid -------------------------------------------------------------------------------------------


def in_grid(method, **options):
    """A grid of one layer, and that layer."""
    model = MLP([n_in, n_out], output="identity", generator=torch.Generator().manual_seed(1)).double()
    return Grid([model], [InGrid(method, model, **options)], Quadratic()), model


def test_newton_schulz_is_that_of_torch(draw):
    for matrix in (draw(4, 7), draw(7, 4)):
        theirs = torch.optim._muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)
        found = newton_schulz(torch.stack([matrix, 3 * matrix]))
        assert references.relative_error(found[0], theirs.double()) < 0.05  # theirs is bfloat16
        assert references.relative_error(found[1], found[0]) < 1e-9


def test_newton_muon_in_a_grid_is_newton_muon(layer):
    """Uncentred, while its rate is constant; refreshes leave the momentum alone."""
    _, x, y = layer
    grid, model = in_grid(NewtonMuonMethod(False), lr=0.1, ridge=0.2, horizon=10**9, refresh_every=2)
    optimizer = NewtonMuon(model, 0.1, refresh_every=2, averaging=0.0)
    for _ in range(5):
        if grid.refresh_due:
            grid.refresh(x, y)
        grid.update(x, y)
        step(optimizer, model, x, y)
        (linear,) = (m for m in model if isinstance(m, nn.Linear))
        assert references.relative_error(grid.stack.weights[0][0], linear.weight.detach()) < 1e-2
        assert references.relative_error(grid.stack.biases[0][0], linear.bias.detach()) < 1e-2


def test_centred_newton_muon_is_newton_muon_of_centred_inputs(layer):
    """The same run as uncentred on h − h̄, with b + W h̄ for the bias."""
    _, x, y = layer
    options = {"lr": 0.1, "ridge": 0.2, "horizon": 8}
    centred, _ = in_grid(NewtonMuonMethod(True), **options)
    twin, _ = in_grid(NewtonMuonMethod(False), **options)
    mean = x.mean(0)
    twin.stack.biases[0] = twin.stack.biases[0] + twin.stack.weights[0] @ mean
    for _ in range(4):
        for grid, inputs in ((centred, x), (twin, x - mean)):
            if grid.refresh_due:
                grid.refresh(inputs, y)
            grid.update(inputs, y)
    assert references.relative_error(centred.stack.weights[0], twin.stack.weights[0]) < 1e-9
    assert references.relative_error(centred.stack(x), twin.stack(x - mean)) < 1e-9


def test_the_rate_falls_to_zero(layer):
    _, x, y = layer
    grid, _ = in_grid(NewtonMuonMethod(True), lr=0.1, ridge=0.2, horizon=2)
    grid.refresh(x, y)
    grid.update(x, y)
    grid.update(x, y)
    before = grid.stack.weights[0].clone()
    grid.update(x, y)
    assert torch.equal(grid.stack.weights[0], before)


def test_adam_in_a_grid_is_torch_s(layer):
    _, x, y = layer
    grid, model = in_grid(AdamMethod(), lr=0.1, beta=0.5)
    adam = torch.optim.Adam(model.parameters(), 0.1, betas=(0.5, 0.999))
    for _ in range(4):
        grid.update(x, y)
        step(adam, model, x, y)
    (linear,) = (m for m in model if isinstance(m, nn.Linear))
    assert references.relative_error(grid.stack.weights[0][0], linear.weight.detach()) < ROUNDING
    assert references.relative_error(grid.stack.biases[0][0], linear.bias.detach()) < ROUNDING


def test_what_is_for_a_grid_makes_no_step(layer):
    model, _, _ = layer
    with pytest.raises(TypeError, match="grid"):
        InGrid(AdamMethod(), model, 0.1, beta=0.9).step()
