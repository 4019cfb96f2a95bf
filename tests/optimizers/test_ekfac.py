"""EKFAC: its moments are the diagonal of the exact block in KFAC's basis, so it is never further from it."""

import pytest
import torch
from references import relative_error
from torch import nn

from sogrid.capture import Capture
from sogrid.kronecker import homogeneous, vec
from sogrid.losses import Quadratic
from sogrid.optimizers import EKFAC, KFAC, ekfac_moments, ekfac_update

ROUNDING = 1e-11


def rows(n, s, i=4, o=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, s, i, generator=generator, dtype=torch.float64) + 0.5
    return homogeneous(h), torch.randn(n, s, o, generator=generator, dtype=torch.float64)


def blocks(h, g):
    """(exact block, A ⊗ B, U_A, U_B), dense, over vec of [o, i]."""
    n = len(h)
    vectors = vec(g.mT @ h)
    flat_h, flat_g = h.flatten(0, 1), g.flatten(0, 1)
    a, b = flat_h.mT @ flat_h / len(flat_h), flat_g.mT @ flat_g / n
    return vectors.mT @ vectors / n, torch.kron(a, b), torch.linalg.eigh(a)[1], torch.linalg.eigh(b)[1]


@pytest.mark.parametrize(("n", "s"), [(1, 1), (3, 1), (20, 1), (5, 4), (20, 3)])
def test_moments_are_the_diagonal_of_the_exact_block_in_the_basis(n, s):
    h, g = rows(n, s)
    exact, _, u_a, u_b = blocks(h, g)
    basis = torch.kron(u_a, u_b)
    found = vec(ekfac_moments(h, g, u_a, u_b) / n)
    assert relative_error(found, (basis.mT @ exact @ basis).diagonal()) < ROUNDING


def test_gradients_of_examples_are_made_a_few_at_a_time(monkeypatch):
    h, g = rows(20, 3)
    _, _, u_a, u_b = blocks(h, g)
    whole = ekfac_moments(h, g, u_a, u_b)
    monkeypatch.setattr("sogrid.optimizers.ekfac.MOST", 40)
    assert relative_error(ekfac_moments(h, g, u_a, u_b), whole) < ROUNDING


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "s"), [(2, 1), (10, 1), (40, 1), (6, 5), (30, 2)])
def test_it_is_nearer_to_the_exact_block_than_kfac(n, s, seed):
    h, g = rows(n, s, seed=seed)
    exact, kfac, u_a, u_b = blocks(h, g)
    basis = torch.kron(u_a, u_b)
    ekfac = basis @ torch.diag(vec(ekfac_moments(h, g, u_a, u_b) / n)) @ basis.mT
    ours, theirs = (torch.linalg.matrix_norm(m - exact) for m in (ekfac, kfac))
    assert ours <= theirs * (1 + ROUNDING)
    assert ours < 0.999 * theirs


@pytest.mark.parametrize("bias", [True, False])
def test_the_update_solves_with_the_matrix_that_is_diagonal_in_the_basis(bias):
    h, g = rows(10, 1)
    h = h if bias else h[..., :-1]
    _, _, u_a, u_b = blocks(h, g)
    moments, gradient = ekfac_moments(h, g, u_a, u_b) / 10, (g.flatten(0, 1).mT @ h.flatten(0, 1)) / 10
    basis = torch.kron(u_a, u_b)
    matrix = basis @ torch.diag(vec(moments) + 0.3) @ basis.mT
    expected = -0.2 * torch.linalg.solve(matrix, vec(gradient))
    parts = (gradient[:, :-1], gradient[:, -1]) if bias else (gradient, None)
    dw, db = ekfac_update(*parts, u_a, u_b, moments, lr=0.2, damping=0.3)
    found = dw if db is None else torch.cat([dw, db.unsqueeze(-1)], -1)
    assert relative_error(vec(found), expected) < ROUNDING


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("repeated", [1, 6], ids=["one example", "one example, repeated"])
def test_where_kfac_is_exact_the_step_is_that_of_the_dense_block(repeated):
    """One example: its block has one direction, which the basis has too."""
    torch.manual_seed(1)
    x, y = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    x, y, loss, model = x.expand(repeated, -1), y.expand(repeated, -1), Quadratic(), network()
    with Capture(model) as capture:
        loss(model(x), y).backward()
    expected = []
    for name in ("0", "2"):
        seen, layer = capture.records[name].rows(), model[int(name)]
        v = vec(repeated * seen.g.mT @ homogeneous(seen.h)).mT
        gradient = torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(-1)], -1)
        block = v @ v.mT / repeated + 0.3 * torch.eye(len(v), dtype=v.dtype)
        step = -0.1 * torch.linalg.solve(block, vec(gradient))
        expected.append(step)
    before = [p.detach().clone() for p in model.parameters()]
    model.zero_grad()
    optimizer = EKFAC(model, 0.1, 0.3, loss=loss, curvature="empirical_fisher", max_change=None)
    loss(model(x), y).backward()
    optimizer.step()
    moves = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    for (dw, db), step in zip([moves[:2], moves[2:]], expected, strict=True):
        assert relative_error(vec(torch.cat([dw, db.unsqueeze(-1)], -1)), step) < 1e-9


def test_much_damping_is_gradient_descent():
    torch.manual_seed(1)
    x, y, loss, model = torch.randn(9, 4).double(), torch.randn(9, 3).double(), Quadratic(), network()
    optimizer = EKFAC(model, 1e6, 1e6, loss=loss, max_change=None)
    loss(model(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, q, grad in zip(model.parameters(), before, grads, strict=True):
        assert relative_error(p.detach() - q, -grad) < 1e-4


def test_it_trains_where_kfac_does():
    torch.manual_seed(1)
    x = torch.randn(64, 4).double()
    y, losses = torch.tanh(x[:, :3] * 2), {}
    for kind in (KFAC, EKFAC):
        model, loss = network(), Quadratic()
        optimizer = kind(model, 0.3, 0.1, loss=loss, refresh_every=5, max_change=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
        losses[kind] = value.item()
    assert losses[EKFAC] < 0.1
    assert losses[EKFAC] < 1.5 * losses[KFAC]


def test_it_has_no_rank():
    with pytest.raises(ValueError, match="EKFAC has no rank"):
        EKFAC(network(), 0.1, loss=Quadratic(), rank=2)
