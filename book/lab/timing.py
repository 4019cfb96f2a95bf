"""What an update costs: the time axis of the figures, and the ratio to SGD.

All methods run in one process, one after the other in each round, so that a busy or throttled machine
slows them alike; medians over rounds are compared. An update is everything a step does: clearing the
gradients, forward, backward, the optimizer, and its share of the refresh (one in 100 updates, timed on
its own). Data are random: values do not matter for time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sogrid.experiments.benchmarks import BATCH, BENCHMARKS, METHODS, REFRESH_EVERY, Task
from sogrid.experiments.records import Record, RecordError, provenance
from sogrid.losses import Loss, Quadratic

__all__ = ["Contestant", "clock", "contestant", "elapsed_ms", "minibatch", "race", "step_times"]

ROUNDS, WARM_UP = 30, 3
SETTINGS = {"lr": 1e-8, "damping": 1.0, "scale": 2.0}


class Contestant:
    """A network and its optimizer, in a race of step times.

    What is driven in another way than torch's optimizers and ours fills in the verbs anew.

    Args:
        model: The network.
        optimizer: One with ``uses_statistics`` is refreshed.
        loss: Training loss.
    """

    refresh_updates = False
    """Whether a refresh is a whole update at the same time."""
    amortised = False
    """Whether updates differ, some being dearer, so that their mean is what one costs."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss) -> None:
        """See the class."""
        self.model, self.optimizer, self.loss = model, optimizer, loss

    @property
    def keeps_statistics(self) -> bool:
        """Whether there is anything to refresh."""
        return getattr(self.optimizer, "uses_statistics", False)

    def update(self, x: Tensor, y: Tensor) -> None:
        """One update from a minibatch."""
        _update(self.model, self.optimizer, self.loss, x, y)

    def refresh(self, x: Tensor, y: Tensor) -> None:
        """Statistics from a minibatch of their own."""
        self.optimizer.refresh(lambda: self.loss(self.model(x), y))

    def zero_grad(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad()


def contestant(task: Task, method: str, device: str = "cpu") -> Contestant:
    """A method of ours or torch's; see :func:`step_times`."""
    name, *options = method.split(" ")
    settings = {key: SETTINGS[key] for key in (*METHODS[name].settings, "scale")}
    model, optimizer = METHODS[name].build(task, settings, torch.Generator().manual_seed(0), device)
    if options == ["matrix"]:
        optimizer.gradients = "matrix"
    elif options:
        for group in optimizer.param_groups:
            group["rank"] = int(options[1])
    return Contestant(model, optimizer, task.loss)


def minibatch(entry: Contestant, batch: int = BATCH, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random inputs ``[batch, ·]`` of a contestant's network, and targets; values do not matter for time."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, entry.model[0].in_features, generator=generator).to(device)
    y = torch.randint(0, 10, (batch,), generator=generator).to(device)
    return x, x if isinstance(entry.loss, Quadratic) else y


def step_times(
    benchmark: str,
    methods: Sequence[str],
    *,
    rounds: int = ROUNDS,
    device: str = "cpu",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Milliseconds per update of several methods on a benchmark's network.

    Args:
        benchmark: Key of :data:`~sogrid.experiments.benchmarks.BENCHMARKS`.
        methods: Keys of :data:`~sogrid.experiments.benchmarks.METHODS`; ``"acp matrix"`` is ``"acp"``
            with ``gradients="matrix"``, ``"acp rank 100"`` with that ``rank``.
        rounds: Each times one update, and one refresh, of every method.
        device: Where.
        progress: Show a bar.

    Returns:
        A row for each method, with ``update_ms`` (median, refresh share included), ``quartiles_ms`` of
        the step, and ``refresh_ms`` (median of one refresh).
    """
    plan = BENCHMARKS[benchmark]
    task = Task(benchmark, None, None, None, plan.network, plan.loss)
    contestants = {method: contestant(task, method, device) for method in methods}
    batch = minibatch(contestants[methods[0]], device=device)
    return race(contestants, batch, rounds=rounds, progress=progress)


def race(
    contestants: dict[str, Contestant],
    batch: tuple[Tensor, Tensor],
    statistics: tuple[Tensor, Tensor] | None = None,
    *,
    rounds: int = ROUNDS,
    progress: bool = False,
    refresh_every: int = REFRESH_EVERY,
) -> list[dict[str, Any]]:
    """Let contestants take turns.

    Args:
        contestants: By name.
        batch: ``(x, y)`` of every update.
        statistics: ``(x, y)`` of every refresh; default those of the update.
        rounds: Each times one update, and one refresh, of everyone.
        progress: Show a bar.
        refresh_every: Updates that share the cost of a refresh.

    Returns:
        Rows as of :func:`step_times`. Where a refresh is an update at the same time, ``refresh_ms`` is what
        it takes longer than an update.
    """
    statistics = batch if statistics is None else statistics
    steps, refreshes = ({name: [] for name in contestants} for _ in range(2))
    for i in tqdm(range(WARM_UP + rounds), desc="rounds", disable=not progress, leave=False):
        for name, entry in contestants.items():
            if entry.keeps_statistics:
                cost = elapsed_ms(lambda e=entry: e.refresh(*statistics), batch[0])
                refreshes[name].append(cost) if i >= WARM_UP else None
            cost = elapsed_ms(lambda e=entry: e.update(*batch), batch[0])
            steps[name].append(cost) if i >= WARM_UP else None
    rows = []
    for name, entry in contestants.items():
        low, middle, high = quantiles(steps[name], n=4, method="inclusive")
        middle = fmean(steps[name]) if entry.amortised else middle
        refresh = median(refreshes[name]) if refreshes[name] else 0.0
        refresh -= middle if entry.refresh_updates else 0.0
        update = middle + refresh / refresh_every
        row = {"update_ms": update, "quartiles_ms": [low, high], "refresh_ms": refresh}
        rows.append({"method": name, **row})
    return rows


def clock(
    path: str | Path, *, device: str = "cpu", rounds: int = ROUNDS, progress: bool = False
) -> list[tuple]:
    """Measure the step times of a record's methods and put them into the record.

    Args:
        path: Of a record of learning curves.
        device: Where.
        rounds: As in :func:`step_times`.
        progress: Show a bar.

    Returns:
        A table; its columns are method, ms per update, quartiles of the step, ratio to SGD, ms per refresh.

    Raises:
        RecordError: If the record is missing, damaged, holds no learning curves or cannot be written.
    """
    content = Record.read(path)
    methods = list(dict.fromkeys(run["method"] for run in content["runs"] if "update" in run))
    if not methods:
        raise RecordError(f"{path} holds no learning curves to measure the time axis of")
    rows = step_times(
        content["settings"]["benchmark"], methods, rounds=rounds, device=device, progress=progress
    )
    record = Record(path, content["experiment"], content["settings"])
    record.set_clock({"rounds": rounds, "rows": rows, "provenance": provenance(device)})
    sgd = next((row["update_ms"] for row in rows if row["method"] == "standard_sgd"), None)
    return [
        (
            f"  {row['method']}",
            f"{row['update_ms']:.2f}",
            "{:.2f} to {:.2f}".format(*row["quartiles_ms"]),
            "" if sgd is None else f"{row['update_ms'] / sgd:.2f}",
            f"{row['refresh_ms']:.1f}",
        )
        for row in rows
    ]


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


def elapsed_ms(work: Callable[[], Any], x: Tensor) -> float:
    """Milliseconds that work takes on the device of ``x``, which is drained before and after."""
    drain = torch.accelerator.synchronize if x.device.type != "cpu" else lambda: None
    drain()
    start = perf_counter()
    work()
    drain()
    return 1e3 * (perf_counter() - start)
