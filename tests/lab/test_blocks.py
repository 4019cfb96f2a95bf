"""Approximations of a layer's block against dense matrices, in float64; the study's machinery and record."""

import pytest
import references
import torch
from studies import require_whole

from lab.blocks import (
    BETTER_BLOCKS,
    EXACT,
    FORMS,
    LOSS,
    POINTS,
    BlockMethod,
    along,
    block,
    classifier,
    ends,
    errors,
    factors,
    mean_of,
    nearest_factors,
    ratios,
    rearranged,
    seen,
    trained,
    verdicts,
)
from lab.rivals import InGrid
from sogrid.curvature import kronecker_factors, kronecker_sum
from sogrid.experiments.grid import Grid
from sogrid.kronecker import vec
from sogrid.networks import MLP
from sogrid.optimizers.ekfac import ekfac_moments, ekfac_update

ROUNDING = 1e-10
n, k, n_in, n_out = 30, 3, 5, 4


@pytest.fixture
def rows(draw):
    """h̃ with its constant, and s."""
    h = torch.cat([draw(n, n_in - 1) + 1.0, torch.ones(n, 1, dtype=torch.float64)], 1)
    return h, draw(n, k, n_out) * h[:, :1, None].abs()


def test_the_block_is_the_sum_of_kronecker_products(rows):
    h, s = rows
    expected = sum(torch.kron(torch.outer(a, a), b.mT @ b) for a, b in zip(h, s, strict=True)) / n
    assert references.relative_error(block(h, s), expected) < ROUNDING


def test_it_is_that_of_the_package(draw):
    model = MLP([5, 4, 3], "tanh", generator=torch.Generator().manual_seed(0)).double()
    x, y = draw(20, 5), torch.arange(20) % 3
    layers = seen(model, x, y)
    LOSS(model(x), y).backward()
    for (h, s, gradient), name in zip(layers, ("linear1", "linear2"), strict=True):
        assert references.relative_error(block(h, s), kronecker_sum(model, name, LOSS, x)) < ROUNDING
        for ours, theirs in zip(factors(h, s), kronecker_factors(model, name, LOSS, x), strict=True):
            assert references.relative_error(ours, theirs) < ROUNDING
        linear = model.get_submodule(name)
        expected = torch.cat([linear.weight.grad, linear.bias.grad[:, None]], 1)
        assert references.relative_error(gradient, expected) < ROUNDING


def test_the_nearest_product_is_the_leading_singular_pair_of_the_rearranged_block(rows):
    """Van Loan & Pitsianis 1993, by torch's singular value decomposition."""
    h, s = rows
    u, sigma, vh = torch.linalg.svd(rearranged(h, s))
    expected = sigma[0] * torch.kron(u[:, 0].view(n_in, n_in), vh[0].view(n_out, n_out))
    a, b = nearest_factors(h, s)
    assert references.relative_error(torch.kron(a, b), expected) < 1e-9
    assert torch.linalg.eigvalsh(a).min() > 0
    assert torch.linalg.eigvalsh(b).min() > 0


def test_ekfac_is_that_of_the_package(rows, draw):
    h, s = rows
    a_basis, b_basis, values = FORMS["EKFAC"](h, s)
    moments = sum(ekfac_moments(h[:, None], s[:, [j]], a_basis, b_basis) for j in range(k)) / n
    assert references.relative_error(values, moments) < ROUNDING
    gradient = draw(n_out, n_in)
    step, _ = ekfac_update(gradient, None, a_basis, b_basis, values, lr=-1.0, damping=0.1)
    assert references.relative_error(FORMS["EKFAC"](h, s).solve(gradient, 0.1), step) < ROUNDING


@pytest.mark.parametrize("name", FORMS)
def test_what_is_solved_is_what_is_dense(rows, draw, name):
    h, s = rows
    spectrum, gradient = FORMS[name](h, s), draw(n_out, n_in)
    damped = spectrum.dense() + 0.1 * torch.eye(n_in * n_out, dtype=torch.float64)
    assert references.relative_error(damped @ vec(spectrum.solve(gradient, 0.1)), vec(gradient)) < 1e-8
    both = FORMS[name](torch.stack([h, 2 * h]), torch.stack([s, s]))
    assert references.relative_error(both.values[0], spectrum.values) < 1e-8


def test_who_is_nearer(rows):
    """EKFAC and the nearest product are never further from the block than KFAC, in Frobenius norm."""
    h, s = rows
    off = {name: float((form(h, s).dense() - block(h, s)).norm()) for name, form in FORMS.items()}
    assert off["EKFAC"] < off["KFAC"]
    assert off["nearest Kronecker"] < min(off["KFAC"], off["input factor alone"])
    a, _ = factors(h, s)
    eye = torch.eye(n_out, dtype=torch.float64)
    best = FORMS["input factor alone"](h, s).dense()
    for factor in (0.9, 1.1):  # α is the best there is
        assert (factor * best - block(h, s)).norm() > off["input factor alone"]
    assert (
        references.relative_error(best / best.norm(), torch.kron(a, eye) / torch.kron(a, eye).norm()) < 1e-9
    )


def test_with_one_input_the_split_is_exact(rows):
    h, s = rows
    h = h[:1].expand(n, -1)
    for name in ("KFAC", "EKFAC", "nearest Kronecker"):
        assert references.relative_error(FORMS[name](h, s).dense(), block(h, s)) < 1e-9


@pytest.mark.parametrize("form", ["KFAC", EXACT])
def test_a_step_in_a_grid_is_the_dense_one(draw, form):
    model = MLP([5, 3], generator=torch.Generator().manual_seed(0)).double()
    x, y = draw(20, 5), torch.arange(20) % 3
    ((h, s, gradient),) = seen(model, x, y)
    matrix = block(h, s) if form == EXACT else torch.kron(*factors(h, s))
    step = torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64), vec(gradient))
    grid = Grid([model], [InGrid(BlockMethod(form), model, 1.0, damping=0.1)], LOSS)
    before = grid.stack.weights[0][0].clone()
    grid.refresh(x, y)
    grid.update(x, y)
    expected = -step.view(6, 3).mT[:, :-1]
    assert references.relative_error(grid.stack.weights[0][0] - before, expected) < 1e-8


def test_errors_are_of_every_form_layer_and_damping():
    rows = errors(7, points=(0, 2), examples=40)
    exact = [row for row in rows if row["layer"]]
    assert len(exact) == 2 * 3 * 3 * len(FORMS)
    assert all(0 <= row["share"] <= 1.001 and row["error"] < 1 for row in exact)


def test_every_form_is_searched_alike():
    few = {"updates": 2, "bounds": (0.05,), "dampings": (0.1, 0.01), "seeds": (1, 2), "search_seeds": (3,)}
    for form in ("nearest Kronecker", EXACT, "Adam"):
        found = trained(form, **few)
        assert len(found.searched) == len(found.losses) == 2
        assert found.runs[0]["update"] == [0, 1, 2]
    assert classifier().train[1].max() == 9


def test_the_record_is_whole():
    content = require_whole(BETTER_BLOCKS)
    paths = [run for run in content["runs"] if run["part"] == "errors"]
    assert {row["update"] for row in paths[0]["rows"]} == {*POINTS}
    for what in ("error", "share"):
        assert list(mean_of(content, what, "KFAC", 1, 0.01)) == list(POINTS)
    assert verdicts(content).keys() == ends(content).keys() - {"KFAC"}
    for drawing in (along(content), ratios(content)):
        assert drawing.layout.meta["alt"]
