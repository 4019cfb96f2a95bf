"""What the page's engine has to compute, computed by sogrid: ``python -m lab laboratory`` writes it down.

Every run of :data:`RUNS` starts from the weights that the page draws, sees its minibatches, and, for KFAC,
its draws from the model. The losses of its minibatches are the file :data:`GOLDEN_FILE`, which tests compare
with sogrid (in Python) and with the engine (by Node, and in a browser).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.laboratory.tasks import TASKS, Stream, Task
from sogrid.losses import BinaryCrossEntropyAtLogits, Loss, Quadratic
from sogrid.method import LayerMethod
from sogrid.networks import MLP
from sogrid.optimizers import ACP, KFAC, CenteredGradientDescent, NaturalNN
from sogrid.optimizers.layerwise import Layerwise

__all__ = ["DEFAULTS", "GOLDEN_FILE", "RUNS", "UPDATES", "losses", "write"]

GOLDEN_FILE = Path(__file__).with_name("golden.json")
UPDATES = 100
SEED = 1
WEIGHTS, ORDER, DRAWS = range(3)

DEFAULTS = {
    **{"method": "sgd", "lr": 1.0, "damping": 0.1, "alpha": 1.0, "every": 20},
    **{"bound": None, "momentum": 0.0, "batch": 100},
}
"""Options of a run, by the page's names: λ, ε, α (or "heuristic"), N, κ."""

RUNS = [
    ("digits", {}),
    ("digits", {"lr": 0.1, "momentum": 0.9}),
    ("digits", {"lr": 10.0, "bound": 0.1, "momentum": 0.5}),
    ("digits", {"method": "adam", "lr": 0.003}),
    ("digits", {"method": "centred", "lr": 3.0}),
    ("digits", {"method": "acp"}),
    ("digits", {"method": "acp", "lr": 0.3, "alpha": "heuristic", "every": 7, "batch": 50}),
    ("digits", {"method": "acp", "lr": 10.0, "bound": 0.1}),
    ("digits", {"method": "nnn", "every": 30}),
    ("digits", {"method": "kfac"}),
    ("digits", {"method": "kfac", "lr": 10.0, "damping": 0.01, "bound": 0.1, "every": 50, "batch": 200}),
    ("crescents", {"lr": 0.3}),
    ("crescents", {"lr": 0.1, "momentum": 0.9}),
    ("crescents", {"method": "adam", "lr": 0.01}),
    ("crescents", {"method": "centred", "lr": 0.3}),
    ("crescents", {"method": "acp", "lr": 0.1, "damping": 0.01}),
    ("crescents", {"method": "nnn", "lr": 0.1, "damping": 0.01}),
    ("crescents", {"method": "kfac", "lr": 0.1, "damping": 0.01}),
]
"""(task, options beside :data:`DEFAULTS`): every method on both tasks, with and without what can be added."""


class _Gradient(LayerMethod):
    """Gradient descent as a method of layers, whose step can be bounded."""

    uses_statistics = uses_mean = False

    def update(self, gradient, state, group):
        return -group["lr"] * gradient.w, -group["lr"] * gradient.b


class _Drawn:
    """A loss whose targets are drawn from the page's streams; the seed of KFAC's generator is the update."""

    def _stream(self, generator: torch.Generator) -> Stream:
        return Stream(SEED, DRAWS, generator.initial_seed())


class _Quadratic(_Drawn, Quadratic):
    def sample(self, f, generator=None):
        noise = self._stream(generator).normal(f.numel()).reshape(f.shape)
        return f + torch.tensor(noise * self.variance**0.5).to(f)


class _Logistic(_Drawn, BinaryCrossEntropyAtLogits):
    def sample(self, f, generator=None):
        uniform = torch.tensor(self._stream(generator).uniform(f.numel()).reshape(f.shape))
        return (uniform < f.sigmoid()).to(f)


LOSSES: dict[str, Loss] = {"quadratic": _Quadratic(), "logistic": _Logistic()}


@torch.no_grad()
def network(task: Task) -> MLP:
    """The network with the page's weights."""
    model = MLP(task.sizes, task.hidden, task.output)
    layers = (module for module in model if isinstance(module, torch.nn.Linear))
    for i, layer in enumerate(layers):
        o, n_in = layer.weight.shape
        reach = np.sqrt(6 / (n_in + o))
        draws = (2 * Stream(SEED, WEIGHTS, i).uniform(o * n_in) - 1) * reach
        layer.weight.copy_(torch.tensor(draws.reshape(o, n_in)))
    return model


def minibatches(task: Task, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The page's minibatches, an order drawn for each epoch."""
    for epoch in count():
        order = np.argsort(Stream(SEED, ORDER, epoch).uniform(len(task.x)), kind="stable")
        for chosen in order[: len(order) // size * size].reshape(-1, size):
            yield torch.tensor(task.x[chosen]), torch.tensor(task.y[chosen])


def optimizer(model: MLP, loss: Loss, options: dict[str, Any]) -> torch.optim.Optimizer:
    """What the options name, by torch or by sogrid."""
    method, lr, bound = options["method"], options["lr"], options["bound"]
    shared = {"max_change": bound, "momentum": options["momentum"]}
    kept = shared | {"damping": options["damping"], "refresh_every": options["every"]}
    match method:
        case "adam":
            return torch.optim.Adam(model.parameters(), lr)
        case "sgd" if bound is None:
            return torch.optim.SGD(model.parameters(), lr, options["momentum"])
        case "sgd":
            return Layerwise(_Gradient(), model, lr, {}, refresh_every=None, **shared)
        case "centred":
            return CenteredGradientDescent(model, lr, **shared)
        case "acp":
            return ACP(model, lr, output_curvature=options["alpha"], **kept)
        case "nnn":
            return NaturalNN(model, lr, **kept)
        case "kfac":
            return KFAC(model, lr, loss=loss, **kept)
    raise ValueError(f"method {method!r} is unknown")


def losses(name: str, options: dict[str, Any], updates: int = UPDATES) -> list[float]:
    """The loss of each minibatch before its update.

    Args:
        name: Of a task.
        options: Beside :data:`DEFAULTS`.
        updates: How many.
    """
    options, task = DEFAULTS | options, TASKS[name]()
    model, loss, found = network(task), LOSSES[task.loss], []
    steps = optimizer(model, loss, options)
    for _, (x, y) in zip(range(updates), minibatches(task, options["batch"]), strict=False):
        risk = loss(model(x), y)
        steps.zero_grad()
        risk.backward()
        steps.step()
        found.append(risk.item())
    return found


def write(path: Path = GOLDEN_FILE) -> None:
    """Train all runs and write their losses, with six digits."""
    runs = [
        {
            "task": task,
            "options": DEFAULTS | options,
            "losses": [float(f"{v:.6g}") for v in losses(task, options)],
        }
        for task, options in RUNS
    ]
    lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)
    path.write_text(f'{{"seed": {SEED}, "updates": {UPDATES}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")
