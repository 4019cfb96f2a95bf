"""One training loop for every experiment: curves by update and by second, divergence recorded.

Examples are shuffled anew each epoch; an optimizer that keeps statistics refreshes them from a
minibatch of its own. Seconds count training alone: evaluation stops the clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sogrid.experiments.benchmarks import BATCH, METHODS, Task
from sogrid.experiments.records import provenance
from sogrid.linalg import FactorizationError
from sogrid.losses import Loss

__all__ = ["Curve", "evaluation_points", "minibatches", "run", "train"]


@dataclass
class Curve:
    """What a run leaves behind.

    Attributes:
        update: Updates done at each evaluation.
        second: Training seconds spent until then.
        train: Mean loss on (a fixed part of) the training set.
        test: Mean loss on the test set.
        status: ``"finished"`` or ``"diverged"``.
        reason: Why it stopped early, in words.
    """

    update: list[int] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    status: str = "finished"
    reason: str = ""


def evaluation_points(updates: int, per_decade: int = 8, also: Iterable[int] = ()) -> list[int]:
    """Log-spaced update counts from 0 to ``updates``, both included, and those of ``also`` in between.

    Example:
        >>> evaluation_points(100, per_decade=2)
        [0, 1, 3, 10, 32, 100]
    """
    decades = math.log10(max(updates, 1))
    steps = max(1, round(decades * per_decade))
    spaced = (round(10 ** (decades * i / steps)) for i in range(steps + 1))
    return sorted({0, updates, *(p for p in (*spaced, *also) if p <= updates)})


def minibatches(n: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless index minibatches, every epoch in a new order; the last n mod batch are left out.

    Raises:
        ValueError: If there are fewer than ``batch`` examples.
    """
    if n < batch:
        raise ValueError(f"a minibatch of {batch} needs at least that many examples, got {n}")
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n - n % batch].split(batch)


@torch.no_grad()
def evaluate(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, batch: int = 2000) -> float:
    """Mean loss over ``x: [n, ·]`` in evaluation mode."""
    training = model.training
    model.eval()
    parts = [loss.value(model(a), b).sum() for a, b in zip(x.split(batch), y.split(batch), strict=True)]
    model.train(training)
    return float(sum(parts)) / len(x)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    *,
    updates: int,
    points: Iterable[int],
    seed: int,
    batch: int = BATCH,
    evaluate_on: int = 10_000,
    progress: str | None = None,
) -> Curve:
    """Train for a number of updates and return the curve.

    Args:
        model: On the device of the task's data.
        optimizer: Any; one with ``refresh_due`` gets statistics minibatches of its own.
        task: Data and loss.
        updates: How many.
        points: When to evaluate, in updates done.
        seed: Of the data order and of the statistics minibatches.
        batch: Examples per update, and per statistics minibatch.
        evaluate_on: The training curve uses this many of the first training examples.
        progress: Title of a progress bar, or ``None``.
    """
    (x, y), loss, points = task.train, task.loss, set(points)
    order = minibatches(len(x), batch, torch.Generator().manual_seed(seed))
    statistics_order = minibatches(len(x), batch, torch.Generator().manual_seed(seed + 1_000_003))
    some = (x[:evaluate_on], y[:evaluate_on])
    curve, clock = Curve(), 0.0
    bar = tqdm(total=updates, desc=progress, disable=progress is None, mininterval=1.0, leave=False)

    def look(done: int) -> bool:
        values = evaluate(model, loss, *some), evaluate(model, loss, *task.test)
        if not all(map(math.isfinite, values)):
            return False
        curve.update.append(done)
        curve.second.append(round(clock, 4))
        curve.train.append(values[0])
        curve.test.append(values[1])
        bar.set_postfix(train=f"{values[0]:.3g}")
        return True

    def update() -> None:
        if getattr(optimizer, "refresh_due", False):
            s = next(statistics_order)
            optimizer.refresh(lambda: loss(model(x[s]), y[s]))
        i = next(order)
        optimizer.zero_grad()
        value = loss(model(x[i]), y[i])
        if value.device.type == "cpu" and not math.isfinite(value.item()):
            raise FloatingPointError(f"the minibatch loss is {value.item()}")
        value.backward()
        optimizer.step()

    model.train()
    look(0)
    for done in range(1, updates + 1):
        start = perf_counter()
        try:
            update()
        except (FloatingPointError, FactorizationError) as error:
            curve.status, curve.reason = "diverged", f"update {done}: {error}"
            break
        if x.device.type != "cpu" and done in points:
            torch.accelerator.synchronize()
        clock += perf_counter() - start
        bar.update()
        if done in points and not look(done):
            curve.status, curve.reason = "diverged", f"update {done}: the evaluated loss is not finite"
            break
    bar.close()
    return curve


def run(task: Task, method: str, settings: dict[str, Any], *, seed: int, **options) -> dict[str, Any]:
    """Build one of the thesis's methods, train it, and return the run as a record keeps it.

    Args:
        task: The benchmark, its data on the device to use.
        method: Key of :data:`~sogrid.experiments.benchmarks.METHODS`.
        settings: Its hyperparameters and the initialisation's ``scale``.
        seed: Of weights, data order and everything else.
        **options: Passed to :func:`train`.

    Raises:
        ValueError: For an unknown method or settings it does not take.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    generator = torch.Generator().manual_seed(seed)
    model, optimizer = METHODS[method].build(task, settings, generator, task.train[0].device)
    curve = train(model, optimizer, task, seed=seed, progress=method, **options)
    origin = provenance(task.train[0].device)
    return {"method": method, "settings": settings, "seed": seed, **asdict(curve), "provenance": origin}
