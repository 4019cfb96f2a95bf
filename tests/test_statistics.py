"""Moments against numpy and loops, their blending against the population it stands for, and schedules."""

import cases
import numpy as np
import pytest
import torch
from references import relative_error

from sogrid.optimizers import ACP
from sogrid.statistics import (
    Statistics,
    input_moments,
    input_rows,
    output_factor,
    output_rows,
    refresh_due,
    second_moment,
    squared_gradient_bound,
)
from sogrid.structured import Gram

RTOL = 1e-12  # of the norm, float64 rounding

leading_dimensions = pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)


def flattened(tensor, leading):
    """[..., *rest] as a list over the leading dimensions, to compare one at a time."""
    return list(tensor.reshape(-1, *tensor.shape[len(leading) :]))


# --- moments ---------------------------------------------------------------------------------------


@leading_dimensions
def test_input_moments_have_divisor_n(draw, leading):
    """numpy's covariance with bias=True, and a loop over examples."""
    h = draw(*leading, 6, 3) + 1
    mean, covariance = input_moments(h)
    together = zip(*(flattened(t, leading) for t in (h, mean, covariance)), strict=True)
    for h_k, mean_k, covariance_k in together:
        assert relative_error(mean_k, torch.from_numpy(h_k.numpy().mean(0))) < RTOL
        assert relative_error(covariance_k, torch.from_numpy(np.cov(h_k.numpy().T, bias=True))) < RTOL
        loop = sum(torch.outer(x - mean_k, x - mean_k) for x in h_k) / 6
        assert relative_error(covariance_k, loop) < RTOL


def test_without_centring_the_mean_is_zero_and_the_second_moment_is_returned(draw):
    """What a layer without a bias sees."""
    h = draw(2, 6, 3) + 1
    mean, second = input_moments(h, centered=False)
    assert torch.equal(mean, torch.zeros(2, 3, dtype=torch.float64))
    assert relative_error(second, torch.from_numpy(np.einsum("kni,knj->kij", h, h) / 6)) < RTOL


def test_one_example_has_no_covariance(draw):
    """Divisor n, not n − 1: zero, not NaN."""
    h = draw(1, 3)
    mean, covariance = input_moments(h)
    assert torch.equal(mean, h[0])
    assert torch.equal(covariance, torch.zeros(3, 3, dtype=torch.float64))


def test_two_passes_keep_float32_accurate_under_a_large_mean(draw):
    """Mean 1e4, deviation 1: E[hhᵀ] − h̄h̄ᵀ would lose all digits of float32 (1e8 · 6e-8 = 6)."""
    h = (draw(200, 3) + 1e4).float()
    covariance = input_moments(h)[1]
    exact = torch.from_numpy(np.cov(h.double().numpy().T, bias=True))
    # the float32 mean is off by 1e4 · 6e-8 per sum step at worst, which enters squared
    assert relative_error(covariance.double(), exact) < 1e-4
    one_pass = (h.mT @ h / len(h) - torch.outer(h.mean(0), h.mean(0))).double()
    assert relative_error(one_pass, exact) > 1e-1


# --- rows ------------------------------------------------------------------------------------------


@leading_dimensions
def test_rows_are_kept_where_fewer_than_columns(draw, leading):
    """The crossover n = m; on both sides of it, the same matrix."""
    for n, m, kept in [(6, 6, False), (6, 7, True), (8, 7, False), (1, 1, False), (1, 2, True)]:
        rows = draw(*leading, n, m)
        moment = second_moment(rows)
        assert isinstance(moment, Gram) == kept
        assert relative_error(moment.dense() if kept else moment, rows.mT @ rows) < RTOL


@leading_dimensions
@pytest.mark.parametrize("centered", [True, False])
def test_rows_are_those_of_the_moments(draw, leading, centered):
    h, passes = draw(*leading, 3, 9), [draw(*leading, 3, 9) for _ in range(2)]
    mean, rows = input_rows(h, centered)
    assert torch.equal(mean, input_moments(h, centered)[0])
    assert relative_error(rows.mT @ rows, input_moments(h, centered)[1]) < RTOL
    rows = output_rows(passes)
    assert rows.shape == (*leading, 6, 9)
    assert relative_error(rows.mT @ rows, output_factor(passes)) < RTOL


def test_dense_statistics_hold_the_matrices_of_their_rows(draw):
    mean, rows = input_rows(draw(3, 9))
    for output in (None, torch.tensor(2.0), draw(4, 4), Gram(draw(2, 9))):
        dense = Statistics(mean, second_moment(rows), output).dense()
        assert torch.equal(dense.covariance, rows.mT @ rows)
        if isinstance(output, Gram):
            assert torch.equal(dense.output, output.dense())
        else:
            assert dense.output is output


# --- the output side -------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 3])
@leading_dimensions
def test_output_factor_sums_over_rows_and_averages_over_examples(draw, leading, passes):
    rows = [draw(*leading, 5, 2) for _ in range(passes)]
    factor = output_factor(rows)
    assert factor.shape == (*leading, 2, 2)
    stacked = [flattened(row, leading) for row in rows]
    for k, result in enumerate(flattened(factor, leading)):
        expected = sum(torch.outer(g, g) for row in stacked for g in row[k]) / 5
        assert relative_error(result, expected) < RTOL


def test_output_factor_with_the_rows_of_a_factor_is_the_expected_pull_back(draw):
    """Rows of S_i, SᵀS = D_i, pulled back by J_i: B = (1/n) Σ J_iᵀ D_i J_i (Thesis §6.4.1)."""
    J, S = draw(5, 4, 2), draw(5, 3, 4)  # [n, outputs, o], [n, rows, outputs]
    rows = list((S @ J).unbind(1))
    expected = sum(J_i.mT @ (S_i.mT @ S_i) @ J_i for J_i, S_i in zip(J, S, strict=True)) / 5
    assert relative_error(output_factor(rows), expected) < RTOL


def test_averaged_draws_are_scaled_by_the_caller(draw):
    """s draws times s^(−1/2) average: the same rows twice give what one gives."""
    row = draw(5, 2)
    assert relative_error(output_factor([row * 2**-0.5] * 2), output_factor([row])) < RTOL


def test_squared_gradient_bound_is_one_number_per_layer():
    """The largest (g_i)_j² over examples and units, from negative entries too; a grid has one each."""
    g = torch.tensor([[[1.0, -3.0], [2.0, 0.5]], [[0.0, 0.25], [-0.5, 0.0]]], dtype=torch.float64)
    assert squared_gradient_bound(g[0]).item() == 9.0
    assert squared_gradient_bound(g[0]).dim() == 0
    assert squared_gradient_bound(g).tolist() == [9.0, 0.25]


def test_squared_gradient_bound_bounds_the_output_factor(draw):
    """α ≥ B_jj for every j: E[g_j²] cannot exceed its maximum (Thesis §6.3.2)."""
    g = draw(50, 4)
    assert squared_gradient_bound(g) >= output_factor([g]).diagonal().max()


def test_the_heuristic_takes_each_layers_own_bound():
    """ACP's α by layer: the largest squared bias gradient of any single example (g_i is ∂ℓ_i/∂b)."""
    model, loss, x, y = cases.case("sigmoid autoencoder")
    optimizer = ACP(model, lr=0.1, output_curvature="heuristic", refresh_every=None)
    optimizer.refresh(lambda: loss(model(x), y))
    layers = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    bounds = []
    for layer in layers:
        g = [
            torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), layer.bias)[0] for i in range(len(x))
        ]
        bounds.append(torch.stack(g).square().max())
        assert relative_error(optimizer.state[layer.weight]["output_curvature"], bounds[-1]) < RTOL
    assert bounds[0] != bounds[1]


# --- blending --------------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(("old", "new"), [(1, 1), (3, 1), (1, 4), (9, 1)])
def test_blended_moments_are_those_of_the_mixed_population(draw, old, new, centered):
    """Weights ρ : 1 − ρ = old : new are that many copies of each minibatch, put together."""
    first, second = draw(6, 3) + 2, 3 * draw(6, 3) - 1  # different means and spreads
    g_first, g_second = draw(6, 2), draw(6, 2)
    blended = Statistics(*input_moments(first, centered), output_factor([g_first])).blend(
        Statistics(*input_moments(second, centered), output_factor([g_second])), old / (old + new)
    )
    everything = torch.cat([first] * old + [second] * new)
    mean, covariance = input_moments(everything, centered)
    assert relative_error(blended.covariance, covariance) < RTOL
    assert (
        relative_error(blended.output, output_factor([torch.cat([g_first] * old + [g_second] * new)])) < RTOL
    )
    if centered:
        assert relative_error(blended.mean, mean) < RTOL
    else:
        assert torch.equal(blended.mean, mean)


def test_repeated_blending_forgets_geometrically(draw):
    """ρ = ½ three times: weights ⅛, ⅛, ¼, ½, so copies 1, 1, 2, 4."""
    batches = [draw(5, 3) + k for k in range(4)]
    blended = Statistics(*input_moments(batches[0]))
    for batch in batches[1:]:
        blended = blended.blend(Statistics(*input_moments(batch)), 0.5)
    copies = [b for b, times in zip(batches, (1, 1, 2, 4), strict=True) for _ in range(times)]
    mean, covariance = input_moments(torch.cat(copies))
    assert relative_error(blended.mean, mean) < RTOL
    assert relative_error(blended.covariance, covariance) < RTOL


def test_blending_with_itself_or_with_weight_zero_changes_nothing(draw):
    statistics = Statistics(*input_moments(draw(6, 3)), output_factor([draw(6, 2)]))
    other = Statistics(*input_moments(draw(6, 3)), output_factor([draw(6, 2)]))
    for blended, expected in [
        (statistics.blend(statistics, 0.3), statistics),
        (other.blend(statistics, 0.0), statistics),
    ]:
        for value, reference in zip(blended, expected, strict=True):
            assert relative_error(value, reference) < RTOL


def test_blending_leaves_out_what_one_side_lacks(draw):
    """A method that starts or stops measuring the output side: the newer one decides."""
    moments = input_moments(draw(6, 3))
    bare, full = Statistics(*moments), Statistics(*moments, torch.tensor(2.0))
    assert bare.blend(bare, 0.5).output is None
    assert full.blend(bare, 0.5).output is None
    assert bare.blend(full, 0.5).output is full.output


@leading_dimensions
def test_blending_broadcasts(draw, leading):
    first, second = draw(*leading, 6, 3), draw(*leading, 6, 3) + 1
    blended = Statistics(*input_moments(first)).blend(Statistics(*input_moments(second)), 0.75)
    mean, covariance = input_moments(torch.cat([first, first, first, second], -2))
    assert relative_error(blended.mean, mean) < RTOL
    assert relative_error(blended.covariance, covariance) < RTOL


def test_a_blended_covariance_stays_positive_semidefinite(draw):
    """Means far apart add a rank-one matrix, never take one away."""
    blended = Statistics(*input_moments(draw(2, 5))).blend(Statistics(*input_moments(draw(2, 5) + 100)), 0.9)
    values = torch.linalg.eigvalsh(blended.covariance)
    assert values.min() > -1e-14 * values.max()  # rounding of a rank-3 matrix


# --- when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "due"),
    [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (100, [0]), (None, [])],
)
def test_refresh_due_counts_from_zero(every, due):
    """Before the first update, and then before every N-th."""
    assert [updates for updates in range(7) if refresh_due(updates, every)] == due
