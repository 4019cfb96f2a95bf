"""Paths in a plane: two charts name the same functions, and the natural gradient does not see which it is."""

import pytest
import torch
from torch.func import grad, jacrev

from lab.paths import CHARTS, Chart, by_chart, descend, gaps_by_step, largest_gap, predictions, valley

ROUNDING = 1e-12
BOTH = list(CHARTS.values())


@pytest.fixture
def task(draw):
    """Inputs, targets and a start, in float64."""
    x = draw(30)
    return x, (draw(30) > 0).double(), torch.tensor([0.4, 2.5], dtype=torch.float64)


@pytest.mark.parametrize("chart", BOTH, ids=list(CHARTS))
def test_a_chart_goes_there_and_back_and_knows_its_slope(chart, task):
    _, _, theta = task
    phi = chart.numbers(theta)
    assert torch.allclose(chart.weights(phi), theta, atol=ROUNDING)
    assert torch.allclose(jacrev(chart.weights)(phi), chart.jacobian(theta), atol=ROUNDING)


@pytest.mark.parametrize("chart", BOTH, ids=list(CHARTS))
@pytest.mark.parametrize("natural", [False, True])
def test_a_step_is_that_of_autograd_in_the_charts_own_numbers(chart, natural, task):
    x, y, theta = task

    def risk(phi, p_own=None):
        p = predictions(chart.weights(phi), x)
        target = y if p_own is None else p_own
        return -(target * p.log() + (1 - target) * (1 - p).log()).mean()

    phi = chart.numbers(theta)
    step = -0.1 * grad(risk)(phi)
    if natural:
        own = predictions(theta, x)  # the curvature of a divergence from these is the Fisher matrix
        F = jacrev(jacrev(lambda v: risk(v, own)))(phi)
        step = torch.linalg.solve(F, step)
    path = descend(chart, theta, x, y, lr=0.1, steps=1, natural=natural)
    assert torch.allclose(path[1], chart.weights(phi + step), atol=1e-10)


def test_a_linear_chart_changes_nothing_for_the_natural_gradient(task):
    """Exactly, however long the step; gradient descent does see it."""
    x, y, theta = task
    A = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    linear = Chart(lambda v: A @ v, lambda v: torch.linalg.solve(A, v), lambda _: A)
    for natural, same in ((True, True), (False, False)):
        paths = [
            descend(c, theta, x, y, lr=0.3, steps=5, natural=natural) for c in (linear, CHARTS["weights"])
        ]
        assert (largest_gap(paths, x) < 1e-10) == same


def test_in_a_bent_chart_the_gap_is_proportional_to_the_step(task):
    gaps = gaps_by_step(task[2], *task[:2], (0.02, 0.01, 0.005), time=1.0, natural=True)
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.1)
    plain = gaps_by_step(task[2], *task[:2], (0.02, 0.005), time=1.0, natural=False)
    assert plain[0] == pytest.approx(plain[1], rel=0.05)


def test_the_figure_has_a_line_for_each_path_and_their_start(task):
    x, y, theta = task
    path = descend(BOTH[0], theta, x, y, lr=0.1, steps=3, natural=True)
    figure = by_chart({"a": dict.fromkeys("rs", path), "b": dict.fromkeys("rs", path)}, at=(1.0, 3.0))
    assert [t.name for t in figure.data[:4]] == ["a, r", "a, s", "b, r", "b, s"]
    wanted = predictions(path, torch.tensor([1.0, 3.0], dtype=torch.float64))
    drawn = torch.tensor([figure.data[0].x, figure.data[0].y], dtype=torch.float64).mT
    assert torch.allclose(drawn, wanted)
    assert figure.data[-1].x == figure.data[0].x[:1]
    assert figure.layout.meta["alt"]


def test_newton_crosses_the_valley_in_one_step_and_gradient_descent_does_not(draw):
    h = draw(50, 2) @ torch.tensor([[1.0, 1.0], [-0.2, 0.2]], dtype=torch.float64)
    *_, descent, newton = valley(h, (-1.0, 1.9), steps=7).data
    assert len(descent.x) == 8
    assert (newton.x[1], newton.y[1]) == pytest.approx((0, 0), abs=1e-12)
    risks = [
        float((h @ torch.tensor(w, dtype=h.dtype)).square().mean())
        for w in zip(descent.x, descent.y, strict=True)
    ]
    assert sorted(risks, reverse=True) == risks
    assert risks[-1] > 0
