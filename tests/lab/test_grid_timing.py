"""What a grid of configurations costs, beside the loop over them."""

from functools import partial

import pytest
import torch

from lab.grid_timing import grid_memory, grid_times
from sogrid.experiments.benchmarks import Task
from sogrid.losses import Quadratic
from sogrid.networks import MLP


@pytest.fixture
def task(draw):
    """A regression 12-8-5-12 of 100 examples."""
    x = draw(120, 12)
    network = partial(MLP, [12, 8, 5, 12], "tanh", dtype=torch.float64)
    return Task(
        "regression", None, (x[20:], x[20:].roll(1, -1)), (x[:20], x[:20].roll(1, -1)), network, Quadratic()
    )


def test_memory_is_linear_in_the_number_of_configurations(task):
    sizes = [grid_memory("acp", count, task=task, batch=100) for count in (20, 40, 80)]
    assert (sizes[2] - sizes[1]) / (sizes[1] - sizes[0]) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("name", ["standard_sgd", "kfac"])
def test_the_clock_compares_a_grid_with_its_loop(name, task):
    cost = grid_times(name, task=task, count=3, batch=20, rounds=2)
    assert cost["ratio"] == cost["loop_ms"] / cost["grid_ms"] > 0
