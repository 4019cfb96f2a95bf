"""The critic's natural gradient against the dense Fisher matrix; the game, its measures and the record."""

import math

import pytest
import references
import torch
from studies import require_whole

from lab.gan import (
    CRITICS,
    GAN,
    GRIDS,
    LOSS,
    Game,
    clock,
    curves,
    distance,
    ends,
    found_modes,
    in_time,
    modes,
    natural_steps,
    prices,
    ratios,
    ring,
    trained,
    verdicts,
)
from sogrid.curvature import fisher, parameter_vector, per_example_gradient
from sogrid.experiments.grid import StackedMLP
from sogrid.kronecker import homogeneous
from sogrid.networks import MLP


@pytest.mark.parametrize("damping", [1.0, 1e-3])
def test_the_kernel_s_step_is_that_of_the_dense_fisher(draw, damping):
    """(F + εI)⁻¹ v with F of all weights together, by an n × n system."""
    model = MLP([2, 5, 4, 1], "tanh", generator=torch.Generator().manual_seed(0)).double()
    x, y = draw(12, 2), (torch.arange(12) % 2).double()[:, None]
    matrix = fisher(model, LOSS, x)
    v = per_example_gradient(model, LOSS, x, y).mean(0)
    expected = torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=torch.float64), v)
    seen = StackedMLP([model]).trace(x[None])
    f = seen.f.detach()
    outputs = seen.pull(torch.ones_like(f))
    weights, residuals = (f.sigmoid() * (-f).sigmoid())[..., 0], LOSS.gradient(f, y)[..., 0]
    steps = natural_steps([homogeneous(h) for h in seen.inputs], outputs, weights, residuals, damping)
    found = torch.cat([part.flatten() for s in steps for part in (s[0, :, :-1], s[0, :, -1])])
    assert len(found) == len(parameter_vector(model))
    assert references.relative_error(found, expected) < 1e-9


def test_the_critic_takes_that_step_within_its_bound():
    """λ = 1 and the bound: the output moves as far as it allows, to first order."""
    settings = {"bound": 1e-4, "damping": 0.1, "generator": 0.0}
    game = Game("natural gradient", [settings], [1])
    real, noise = ring(64, torch.Generator().manual_seed(0))[None], torch.randn(1, 64, 4)
    x = torch.cat([real, game.generator.stack(noise)], 1)
    before, loss = game.critic.stack(x), LOSS(game.critic.stack(x), game.labels)
    game.update(real, noise, noise)
    after = game.critic.stack(x)
    assert float((after - before).square().mean().sqrt()) == pytest.approx(1e-4, rel=0.1)
    assert LOSS(after, game.labels) < loss


def test_distance_is_that_of_a_shift():
    """Of a cloud and the same one moved by v: the mean over directions of |v · direction|, about 2|v|/π."""
    x = torch.randn(50, 2, dtype=torch.float64)
    moved = x + torch.tensor([0.3, 0.0], dtype=torch.float64)
    assert float(distance(x, moved)) == pytest.approx(0.6 / math.pi, rel=1e-2)
    assert float(distance(x, x.flip(0))) < 1e-12


def test_modes_are_counted():
    points = ring(2_000, torch.Generator().manual_seed(0))
    assert modes(points) == 8
    assert modes(points[points[:, 0] > 1]) == 3
    assert modes(torch.zeros(10, 2)) == 0


def test_every_critic_has_as_many_trials_and_plays():
    assert {len(grid) for grid in GRIDS.values()} == {12}
    for name in CRITICS:
        runs = trained(name, GRIDS[name][:2], [5, 6], updates=50)
        assert [len(run["distance"]) for run in runs] == [2, 2]
        alone = trained(name, GRIDS[name][1:2], [6], updates=50)
        if name != "KFAC":  # whose float32 steps are sensitive while the critic is sure of itself
            assert alone[0]["distance"] == pytest.approx(runs[1]["distance"], rel=1e-2)
    assert clock(rounds=1, each=2).keys() == CRITICS.keys()


def test_the_record_is_whole():
    content = require_whole(GAN)
    for losses in (ends(content), in_time(content)):
        assert losses.keys() == CRITICS.keys()
        assert ratios(losses).layout.meta["alt"]
        assert verdicts(losses).keys() == CRITICS.keys() - {"Adam"}
    assert max(found_modes(content).values()) <= 8
    assert min(prices(content).values()) > 0
    for timed in (False, True):
        assert curves(content, timed).layout.meta["alt"]
