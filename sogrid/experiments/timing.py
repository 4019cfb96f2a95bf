"""What an update costs: the time axis of the figures, and the ratio to SGD.

All methods run in one process, one after the other in each round, so that a busy or throttled machine
slows them alike; medians over rounds are compared. An update is everything a step does: clearing the
gradients, forward, backward, the optimizer, and its share of the refresh (one in 100 updates, timed on
its own). Data are random: values do not matter for time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sogrid.experiments.benchmarks import BATCH, BENCHMARKS, METHODS, REFRESH_EVERY, Task
from sogrid.experiments.records import Record, RecordError, provenance
from sogrid.losses import Loss, Quadratic

__all__ = ["clock", "step_times"]

ROUNDS, WARM_UP = 30, 3
SETTINGS = {"lr": 1e-8, "damping": 1.0, "scale": 2.0}


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
            with ``gradients="matrix"``.
        rounds: Each times one update, and one refresh, of every method.
        device: Where.
        progress: Show a bar.

    Returns:
        A row for each method, with ``update_ms`` (median, refresh share included), ``quartiles_ms`` of
        the step, and ``refresh_ms`` (median of one refresh).
    """
    plan = BENCHMARKS[benchmark]
    task = Task(benchmark, None, None, None, plan.network, plan.loss)
    contestants = {}
    for method in methods:
        name, _, gradients = method.partition(" ")
        settings = {key: SETTINGS[key] for key in (*METHODS[name].settings, "scale")}
        generator = torch.Generator().manual_seed(0)
        model, optimizer = contestants[method] = METHODS[name].build(task, settings, generator, device)
        if gradients:
            optimizer.gradients = gradients
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(BATCH, contestants[methods[0]][0][0].in_features, generator=generator).to(device)
    y = torch.randint(0, 10, (BATCH,), generator=generator).to(device)
    y = x if isinstance(plan.loss, Quadratic) else y
    steps, refreshes = ({method: [] for method in methods} for _ in range(2))
    for i in tqdm(range(WARM_UP + rounds), desc="rounds", disable=not progress, leave=False):
        for method, (model, optimizer) in contestants.items():
            if getattr(optimizer, "uses_statistics", False):
                cost = _clock(lambda m=model, o=optimizer: o.refresh(lambda: plan.loss(m(x), y)), x)
                refreshes[method].append(cost) if i >= WARM_UP else None
            cost = _clock(lambda m=model, o=optimizer: _update(m, o, plan.loss, x, y), x)
            steps[method].append(cost) if i >= WARM_UP else None
    rows = []
    for method in methods:
        refresh = median(refreshes[method]) if refreshes[method] else 0.0
        low, middle, high = quantiles(steps[method], n=4, method="inclusive")
        update = middle + refresh / REFRESH_EVERY
        row = {"update_ms": update, "quartiles_ms": [low, high], "refresh_ms": refresh}
        rows.append({"method": method, **row})
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


def _clock(work: Callable[[], None], x: Tensor) -> float:
    """Milliseconds, with the device drained before and after."""
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    start = perf_counter()
    work()
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    return 1e3 * (perf_counter() - start)
